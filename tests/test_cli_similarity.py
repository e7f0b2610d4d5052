"""`workbench similarity`: the table, the run folder, and what is refused in one line."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from workbench.catalogue import catalogue
from workbench.sites import Site

from .store.made import made_store, noise
from .test_cli import good, told, workbench

EVIL = "<script>alert(1)</script>"
TEXTS = [" ".join(f"w{i}x{j}" for j in range(4)) for i in range(30)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("stores")
    x = noise(120, 6)
    made_store(home / "a", {Site(0): x, Site(1): x + noise(120, 6, 1)}, TEXTS)
    made_store(home / "b", {Site(0): x @ noise(6, 6, 2), Site(1): noise(120, 6, 3)}, TEXTS, model=EVIL)
    made_store(home / "other", {Site(0): x}, [f"v{t}" for t in TEXTS])
    return home


def test_a_table_is_printed_and_nothing_is_written(home):
    before = sorted(home.rglob("*"))
    result = good("similarity", home / "a", home / "b", "--measures", "cka,knn", "--permutations", 3)
    assert "resid_post.1" in result.stdout
    assert sorted(home.rglob("*")) == before
    found = json.loads(good("similarity", home / "a", "--measures", "cka", "--sites-a", "1", "--json").stdout)
    assert [line["value"] for line in found["pairs"]] == [pytest.approx(1.0)]
    assert found["summary"][0]["measure"] == "cka"


def test_a_run_folder_holds_every_pair_and_a_report(home, tmp_path):
    run = tmp_path / "run"
    line = ["similarity", home / "a", home / "b", "--permutations", 3, "--out", run]
    assert f"report: {run / 'report.html'}" in good(*line).stdout
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["format"] == "workbench.similarity_run"
    assert len(metrics["summary"]) == 7
    frame = pd.read_parquet(run / "similarity.parquet")
    assert len(frame) == 7 * 4
    page = (run / "report.html").read_text()
    assert EVIL not in page
    assert "<h2>Best partners</h2>" in page
    assert "<h2>linear CKA, debiased</h2>" in page
    (entry,) = catalogue(tmp_path).entries
    assert (entry.kind, entry.name, entry.state) == ("similarity", "run", "done")
    told(workbench(*line), "exists already")
    good(*line, "--overwrite", "--measures", "cka")
    assert len(pd.read_parquet(run / "similarity.parquet")) == 4


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("they differ in prompts", ["other"]),
        ("unknown measure 'cosine'; allowed: cka", ["b", "--measures", "cosine"]),
        ("layer 9 is out of range", ["b", "--sites-a", "9"]),
        ("has no resid_mid.0", ["b", "--sites-b", "resid_mid.0"]),
        ("unknown pairing 'first'", ["b", "--pairing", "first"]),
        ("must be at least 8", ["b", "--max-rows", "2"]),
    ],
)
def test_what_cannot_be_done_is_one_line(home, tmp_path, words, line):
    out = tmp_path / "out"
    told(workbench("similarity", home / "a", home / line[0], *line[1:], "--out", out), words)
    assert not out.exists()
