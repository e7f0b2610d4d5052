"""`workbench transport` on the bundled recipient: the run folder, its report, going on, and how bad input is told."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from probes.transport_report import write_transport_report
from workbench.errors import UserError
from workbench.summary import plain
from workbench.transport import TransportGrid
from workbench.transport_plots import pair_title

from .test_cli import good, told, workbench

LINE = ("transport", "bundled:recipient", "--prompts", "bundled:profile", "--limit", 160, "--folds", 2, "--shards", 4,
        "--dtype", "float32")  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transport") / "run"
    result = good(*LINE, "--layers", "1-3", "--alpha", "gcv", "--out", folder)
    for word in ("resid_post.1", "ridge", "shuffled", "ridge with BOS", f"report: {folder / 'report.html'}"):
        assert word in result.stdout
    return folder


def test_the_run_folder_holds_the_grid_and_every_figure(run):
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics) == {"format", "schema", "job", "grid", "efficiency", "features", "causal", "shortcut", "warnings",
                            "environment"}  # fmt: skip
    grid = TransportGrid.load(run / "grid")
    pairs = {(str(a), str(b)) for a, b in grid.pairs}
    assert pairs == {
        ("resid_post.1", "resid_post.2"),
        ("resid_post.1", "resid_post.3"),
        ("resid_post.2", "resid_post.3"),
    }
    cells = [grid.cell(a, b) for a, b in grid.pairs]
    controls = [grid.cell(a, b, arm="shuffled") for a, b in grid.pairs]
    for cell, control in zip(cells, controls, strict=True):
        assert cell["r2_uniform_low"] > 0.5 > 0.05 > control["r2_uniform_high"] > control["r2_uniform_low"] > -0.05
    for name in ("efficiency", "features", "causal", "shortcut"):
        table = pd.read_parquet(run / f"{name}.parquet")
        assert len(table)
        if "source" in table:
            assert set(zip(table["source"], table["target"], strict=True)) == pairs
    sizes = metrics["efficiency"]["sizes"]
    assert all(0 < s["efficiency"] <= 1 and s["wachter_count"] > 0 for s in sizes)
    assert all(p["transported"] > 0 and p["r2"] > p["control_r2"] for p in metrics["features"]["pairs"])
    names = pd.read_parquet(run / "features.parquet")["name"]
    assert names.str.len().min() > 0
    assert (names != "(silent)").mean() > 0.9
    assert {p["tokens"] for p in metrics["features"]["pairs"]} == {cells[0]["n_held_out"]}
    by_arm = {(x["source"], x["target"], x["arm"]): x for x in metrics["causal"]["lines"]}
    for a, b in pairs:
        assert by_arm[a, b, "transported"]["delta"] < by_arm[a, b, "mean"]["delta"]
        assert by_arm[a, b, "untouched"]["delta"] == 0
    assert metrics["causal"]["prompts"] == "bundled:evaluation_text"
    assert {line["search"] for line in metrics["shortcut"]["lines"]} == {"single", "greedy"}
    assert not [p for p in run.rglob("*") if p.suffix in (".pkl", ".pt", ".npy")]


def test_the_report_is_one_page_with_every_section_and_no_network(run):
    text = (run / "report.html").read_text(encoding="utf-8")
    for title in (
        "Grid",
        "From resid_post 1",
        "Into resid_post 3",
        "With BOS",
        "Efficiency",
        "Features",
        "Feature by feature",
        "Causal",
        "Shortcuts",
        "Provenance",
    ):
        assert f"<h2>{title}</h2>" in text
    for words in ("shuffled (control)", "identity + bias", "A linear map predicts the later layer with R²",
                  "Written into the model, the map&#39;s prediction costs", "Leaving out block", "features by the tokens",
                  "part of what the map costs is that"):  # fmt: skip
        assert words in text, words
    assert '<script src="http' not in text
    assert write_transport_report(run).read_text(encoding="utf-8") == text


def test_the_report_shows_the_ceiling_its_noise_and_what_is_left(run):
    """At full rank sum rho^2 / rank(y), d / (n - 1) of independent data, and the adjusted R2 of the two."""
    text = (run / "report.html").read_text(encoding="utf-8")
    section = text.split("<h2>Efficiency</h2>")[1].split("<h2>")[0]
    assert "ceiling, in sample" in section
    table, grid = pd.read_parquet(run / "efficiency.parquet"), TransportGrid.load(run / "grid")
    for a, b in grid.pairs:
        ceiling = table[(table["source"] == str(a)) & (table["target"] == str(b))]["ceiling"].iloc[-1]
        noise = 128 / (grid.cell(a, b)["n_train"] - 1)
        row = re.sub(r"<[^>]+>", " ", section.split(pair_title(a, b))[-1].split("</tr>")[0]).split()
        assert row[-4:] == [plain(ceiling), plain(noise), plain(1 - (1 - ceiling) / (1 - noise)), "0"]


def test_a_run_goes_on_where_it_was_and_json_is_what_it_wrote(run):
    before = (run / "grid" / "grid.json").stat().st_mtime_ns
    result = good(*LINE, "--layers", "1-3", "--alpha", "gcv", "--out", run, "--json")
    assert json.loads(result.stdout)["grid"]["lines"] == json.loads((run / "metrics.json").read_text())["grid"]["lines"]
    assert (run / "grid" / "grid.json").stat().st_mtime_ns == before


def test_the_grid_alone_and_nothing_of_another_job_stays(tmp_path):
    good(*LINE, "--layers", "0,3", "--alpha", 0.01, "--out", tmp_path / "run")
    assert (tmp_path / "run" / "causal.parquet").exists()
    good(*LINE, "--layers", "0,3", "--alpha", 0.001, "--grid-only", "--out", tmp_path / "run")
    assert not (tmp_path / "run" / "causal.parquet").exists()
    assert len(TransportGrid.load(tmp_path / "run" / "grid").pairs) == 1
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<h2>Grid</h2>" in text
    assert "<h2>Causal</h2>" not in text


def test_sources_by_attention_are_those_of_the_model_that_runs(tmp_path):
    result = good(*LINE, "--layers", "1-3", "--alpha", "gcv", "--positions", "attention", "--out", tmp_path / "run")
    assert "causal arms write at the same token alone" in result.stderr
    grid = TransportGrid.load(tmp_path / "run" / "grid")
    assert grid.meta["positions"] == "attention"
    assert set(grid.meta["routing"]) == {f"{a}>{b}" for a, b in grid.pairs}
    for a, b in grid.pairs:
        found, cell = grid.meta["routing"][f"{a}>{b}"], grid.cell(a, b)
        assert 0 < found["weight"] < 1
        assert 0 < found["itself"] + found["previous"] < 1
        assert cell["r2_uniform_low"] > grid.cell(a, b, arm="shuffled")["r2_uniform_high"]
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<h2>Routes</h2>" in text
    assert "that the attention between the two layers sends most weight to" in text


def test_other_positions_leave_out_what_they_cannot_have_and_say_so(tmp_path):
    result = good(*LINE, "--layers", "2,3", "--alpha", "gcv", "--positions", "previous", "--out", tmp_path / "run")
    for word in ("features are measured at the same token alone", "causal arms write at the same token alone",
                 "blocks are skipped between resid_post sites"):  # fmt: skip
        assert word in result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--pairs", "1:2", "--layers", "1,2"), "both --pairs and --sites or --layers"),
        (("--pairs", "1>2"), "cannot read the pair '1>2'"),
        (("--causal", "few"), "unknown choice of causal pairs 'few'"),
        (("--keep-maps", "none"), "unknown choice of maps to keep 'none'"),
        (("--layers", "0,9"), "layer 9 is out of range: the model has layers 0 to 3"),
        (("--layers", "2"), "no pairs of sites to fit"),
        (("--alpha", "best"), "alpha 'best' is neither a number nor cv"),
        (("--positions", "next"), "unknown positions 'next'; allowed: same, previous, random, shuffled, attention"),
        (("--holdout", "1.5"), "--holdout is a share of the prompts"),
        (("--shards", "100"), "160 prompts are too few for 2 folds and 100 shards"),
        (("--layers", "0", "--sites", "resid_pre.1"), "both --sites and --layers"),
        (("--dictionary", "bundled:nothing"), "not bundled; allowed: bundled:recipient.resid_post"),
        (("--tokens", "some"), "unknown tokens 'some'"),
    ],
)
def test_bad_input_is_told_in_one_line(tmp_path, options, words):
    told(workbench(*LINE, *options, "--out", tmp_path / "run"), words)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    told(workbench(*LINE, "--out", tmp_path), "is not a transport run: it holds no transport.toml")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(UserError, match="has no results of a transport"):
        write_transport_report(tmp_path)
