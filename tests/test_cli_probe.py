"""`workbench probe`: the table, the run folder, and what is refused in one line."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch

from probes.probe import Probe
from workbench.adapters import Adapter
from workbench.catalogue import catalogue
from workbench.sites import Site

from .probes.labelled import planted, write_labelled
from .test_cli import good, told, workbench

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    x, y, _ = planted(400, 6, gap=4.0)
    path = tmp_path_factory.mktemp("store") / "s"
    noise = torch.randn(400, 6, generator=torch.Generator().manual_seed(1))
    write_labelled(path, {Site(0): noise, Site(1): x}, label=[(EVIL, "yes")[int(i)] for i in y],
                   meta=[{"n": int(i), "number": i / 7} for i in range(400)])  # fmt: skip
    return path


def test_a_table_is_printed_and_nothing_is_written(store):
    before = sorted(store.parent.rglob("*"))
    result = good("probe", store, "--label", "label")
    assert "resid_post.1" in result.stdout
    assert "words or tokens alone, positions all" in result.stdout
    assert sorted(store.parent.rglob("*")) == before
    found = json.loads(good("probe", store, "--label", "label", "--layers", 1, "--no-controls", "--json").stdout)
    (line,) = found["lines"]
    assert line["site"] == "resid_post.1"
    assert line["accuracy"] > 0.9
    assert found["words"] == {}
    assert "control" not in line


def test_a_run_folder_holds_probes_directions_an_eraser_and_a_report(store, tmp_path):
    run = tmp_path / "run"
    result = good("probe", store, "--label", "label", "--towards", "yes", "--positions", "all,last", "--out", run)
    assert f"report: {run / 'report.html'}" in result.stdout
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["format"] == "workbench.probe_run"
    assert metrics["best"]["site"] == "resid_post.1"
    assert abs(metrics["erasure"]["after"]["accuracy"] - 0.5) < 0.15
    assert len(pd.read_parquet(run / "probes.parquet")) == len(metrics["lines"]) == 4
    probe = Probe.load(run / "probes" / "all" / "resid_post.1")
    assert probe.classes == (EVIL, "yes")
    assert Adapter.load(run / "adapters" / "mean_difference.resid_post.1").layers == [1]
    assert Adapter.load(run / "adapters" / "eraser.resid_post.1").rank == 1
    page = (run / "report.html").read_text()
    assert EVIL not in page
    assert "<h2>Directions</h2>" in page
    assert "<h2>Eraser</h2>" in page
    (entry, *others) = catalogue(tmp_path).entries
    assert (entry.kind, entry.name, entry.state) == ("probe", "run", "done")
    assert {e.kind for e in others} == {"adapter", "saved probe"}
    told(workbench("probe", store, "--label", "label", "--out", run), "exists already")
    good("probe", store, "--label", "label", "--out", run, "--overwrite", "--no-controls")
    assert not (run / "adapters").exists()


def test_a_quantity_is_probed(store):
    found = json.loads(good("probe", store, "--label", "number", "--quantity", "--kind", "ridge", "--json").stdout)
    assert found["score"] == "r2"
    assert all(line["r2"] < 0.2 for line in found["lines"])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("has no column 'nonsense' to take as label; it has label", ["--label", "nonsense"]),
        ("unknown kind of probe 'svm'; allowed: logistic", ["--label", "label", "--kind", "svm"]),
        ("has 400 classes and a probe takes at most 100", ["--label", "n"]),
        ("take ridge or sparse", ["--label", "n", "--quantity"]),
        ("has no class 'maybe'", ["--label", "label", "--classes", "maybe"]),
        ("has no class 'maybe'", ["--label", "label", "--towards", "maybe"]),
        ("leave --towards out", ["--label", "number", "--quantity", "--kind", "ridge", "--towards", "yes"]),
        ("layer 7 is out of range", ["--label", "label", "--layers", "7"]),
        ("give one of them", ["--label", "label", "--layers", "0", "--sites", "resid_post.0"]),
        ("--penalty -1 is out of range", ["--label", "label", "--penalty", "-1"]),
        ("unknown positions 'middle'", ["--label", "label", "--positions", "middle"]),
        ("holdout is the share", ["--label", "label", "--holdout", "2"]),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line(store, tmp_path, words, line):
    told(workbench("probe", store, *line, "--out", tmp_path / "out"), words)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_store_is_told(tmp_path):
    told(workbench("probe", tmp_path, "--label", "label"), "manifest.json")
