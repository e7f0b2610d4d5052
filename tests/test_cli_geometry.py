"""`workbench geometry`: the tables, the run folder, and what is refused in one line."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from workbench.catalogue import catalogue

from .conftest import make_module, save_folder
from .test_cli import good, told, workbench


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("geometry")
    save_folder(make_module("gpt_neox"), home / "model")
    save_folder(make_module("opt_post_norm"), home / "post")
    (home / "prompts.txt").write_text("".join(f"w{i} w{3 * i % 50} w{i % 7}\n" for i in range(6)))
    return home


def test_tables_are_printed_and_nothing_is_written(home):
    before = sorted(home.rglob("*"))
    line = ["geometry", home / "model", "--prompts", home / "prompts.txt", "--layers", "-1", "--lengths", "2"]
    result = good(*line)
    assert "orthogonal" in result.stdout
    assert "stale" in result.stdout
    found = json.loads(good(*line, "--json", "--limit", 4).stdout)
    assert found["sequences"] == 4
    assert found["parallel_blocks"] is True
    assert {one["layer"] for one in found["costs"]} == {2}
    assert {one["length"] for one in found["runs"]} == {2}
    assert sorted(home.rglob("*")) == before


def test_a_run_folder_holds_every_table_and_a_report(home, tmp_path):
    run = tmp_path / "run"
    line = ["geometry", home / "model", "--prompts", home / "prompts.txt", "--out", run]
    assert f"report: {run / 'report.html'}" in good(*line, "--lengths", "1,2").stdout
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["format"] == "workbench.geometry_run"
    assert len(pd.read_parquet(run / "costs.parquet")) == len(metrics["costs"]) == 27
    assert len(pd.read_parquet(run / "runs.parquet")) == 15
    assert len(pd.read_parquet(run / "lengths.parquet")) == 6
    assert len(pd.read_parquet(run / "sizes.parquet")) == 6
    page = (run / "report.html").read_text()
    assert "<h2>Cost of each part</h2>" in page
    assert "run attention and MLP in parallel" in page
    (entry,) = catalogue(tmp_path).entries
    assert (entry.kind, entry.name, entry.state) == ("geometry", "run", "done")
    told(workbench(*line), "exists already")


@pytest.mark.parametrize(
    ("words", "model", "line"),
    [
        ("post-norm", "post", []),
        ("has layers 0 to 2", "model", ["--layers", "5"]),
        ("has 3 blocks", "model", ["--lengths", "9"]),
        ("unknown tokens 'some'", "model", ["--positions", "some"]),
    ],
)
def test_what_cannot_be_done_is_one_line(home, tmp_path, words, model, line):
    out = tmp_path / "out"
    told(workbench("geometry", home / model, "--prompts", home / "prompts.txt", *line, "--out", out, "--quiet"), words)
    assert not out.exists()
