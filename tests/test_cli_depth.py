"""`workbench depth`: the tables, the run folder, its report, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from probes.depth_run import DepthJob, run_depth
from workbench.catalogue import catalogue
from workbench.errors import UserError

from .conftest import LAYERS, make_model, make_module, save_folder
from .test_cli import good, told, tree, workbench

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("depth")
    save_folder(make_module("llama"), home / "llama")
    save_folder(make_module("gpt2", seed=1), home / "gpt2")
    lines = [{"text": " ".join(f"w{(i * 7 + j * j) % 150}" for j in range(6 + i % 5)), "label": (EVIL, "b")[i % 2]}
             for i in range(40)]  # fmt: skip
    (home / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return home


@pytest.fixture(scope="module")
def line(home) -> tuple:
    return ("depth", home / "llama", "--prompts", home / "prompts.jsonl", "--limit", 24)


def test_tables_are_printed_and_nothing_is_written(home, line):
    before = sorted(home.rglob("*"))
    out = good(*line, "--effects", "future").stdout
    for word in ("after layer", "embeddings", "write cosine", "largest over tokens", "depth score by future"):
        assert word in out
    assert sorted(home.rglob("*")) == before
    found = json.loads(good(*line, "--effects", "none", "--no-lens", "--no-attention", "--json").stdout)
    assert found["effects"] == []
    assert {x["curve"] for x in found["curves"]} & {"kl", "overlap", "attention_entropy"} == set()
    assert found["models"][str(home / "llama")]["identity"] < 1e-4
    assert found["prompts"] == 24


def test_a_run_folder_holds_tables_and_a_report(home, line, tmp_path):
    run = tmp_path / "run"
    given = ("--against", home / "gpt2", "--control", "--layers", "0,1", "--effect-prompts", 6, "--out", run)
    assert f"report: {run / 'report.html'}" in good(*line, *given).stdout
    assert tree(run) == {
        "depth.toml",
        "metrics.json",
        "curves.parquet",
        "effects.parquet",
        "grid.parquet",
        "report.html",
    }
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["format"] == "workbench.depth_run"
    assert {name.rpartition("/")[2] for name in metrics["models"]} == {"llama", "llama, untrained", "gpt2"}
    effects = pd.read_parquet(run / "effects.parquet")
    assert set(effects["effect"]) == {"future", "all", "local", "erase"}
    assert set(effects["layer"]) == {0, 1}
    assert len(effects) == len(metrics["effects"])
    assert len(pd.read_parquet(run / "grid.parquet")) == LAYERS**2
    assert len(metrics["grid"]["best"]) == LAYERS
    assert {x["group"] for x in metrics["kinds"]} == {"all", EVIL, "b"}
    page = (run / "report.html").read_text()
    assert EVIL not in page
    for title in ("Writes", "Cosines", "Lens", "Effects on the output", "Depth scores", "Layer grid", "Every curve"):
        assert f"<h2>{title}</h2>" in page
    (entry,) = catalogue(tmp_path).entries
    assert (entry.kind, entry.name, entry.state) == ("depth", "run", "done")
    told(workbench(*line, "--out", run), "exists already")
    good(*line, "--out", run, "--overwrite", "--effects", "none")
    assert "effects.parquet" not in tree(run)


def test_equal_jobs_give_equal_tables(line, tmp_path):
    for name in ("a", "b"):
        good(*line, "--effects", "future,erase", "--out", tmp_path / name)
    for table in ("curves.parquet", "effects.parquet"):
        assert pd.read_parquet(tmp_path / "a" / table).equals(pd.read_parquet(tmp_path / "b" / table))


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ("unknown effect 'past'; allowed: future, all, local, erase, or none", ["--effects", "past"]),
        ("layer 7 is out of range: the model has layers 0 to 2", ["--layers", "7"]),
        ("alpha -1 is out of range", ["--alpha", "-1"]),
        ("cannot read 'x' in the layers", ["--layers", "x"]),
        ("nowhere", ["--against", "nowhere"]),
    ],
)
def test_what_cannot_be_done_is_one_line(line, tmp_path, words, given):
    told(workbench(*line, *given, "--out", tmp_path / "out"), words)
    assert not (tmp_path / "out").exists()


def test_jobs_of_python_are_checked_too():
    model = make_model("llama")
    with pytest.raises(UserError, match="unknown effect 'past'"):
        run_depth(model, ["w3 w4 w5"], DepthJob("m", "p", effects=("past",)))
    with pytest.raises(UserError, match="effect_prompts=0: effects need at least one prompt"):
        run_depth(model, ["w3 w4 w5"], DepthJob("m", "p", effect_prompts=0))


def test_a_family_without_writes_is_measured_and_told(home, tmp_path):
    save_folder(make_module("opt_post_norm"), tmp_path / "opt")
    result = good("depth", tmp_path / "opt", "--prompts", home / "prompts.jsonl", "--limit", 8, "--effects", "none", "--out",
                  tmp_path / "run")  # fmt: skip
    assert "warning: " in result.stderr
    assert "post-norm" in result.stderr
    assert (
        json.loads((tmp_path / "run" / "metrics.json").read_text())["models"][str(tmp_path / "opt")]["identity"] is None
    )
