"""`workbench adapters`: showing and exporting, from the command line."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from workbench.adapters import Adapter, vector
from workbench.adapters.pyreft import read
from workbench.cli import app
from workbench.sites import Site


@pytest.fixture
def run():
    return lambda *args: CliRunner().invoke(app, ["adapters", *map(str, args)])


def test_show_says_where_and_how(run, tmp_path):
    found = run("show", "bundled:reasoning")
    assert found.exit_code == 0, found.output
    assert "resid_post" in found.stdout
    assert "no, it reads" in found.stdout
    assert "of bundled:donor, strength 1" in found.stdout
    torch.save(torch.ones(4), tmp_path / "v.pt")
    said = json.loads(run("show", tmp_path / "v.pt", "--site", "mlp_out.3", "--positions", "last", "--json").stdout)
    part = {
        "site": "mlp_out.3",
        "positions": "last",
        "width": 4,
        "rank": 1,
        "act": "linear",
        "dtype": "float32",
        "constant": 2.0,
    }
    assert said["parts"] == [part]


def test_show_tells_the_terms_apart(run, tmp_path):
    first, last = (vector(Site(1), torch.ones(4), positions=positions) for positions in ("first:1", "last"))
    (first + last * 2).save(tmp_path / "a")
    parts = json.loads(run("show", tmp_path / "a", "--json").stdout)["parts"]
    assert [(p["positions"], p["constant"]) for p in parts] == [("first:1", 2.0), ("last", 4.0)]


def test_export_to_pyreft_and_to_vectors(run, tmp_path):
    out = run("export", "bundled:reasoning", "--to", "pyreft", "--out", tmp_path / "p", "--json")
    assert json.loads(out.stdout) == {"out": str(tmp_path / "p"), "to": "pyreft"}
    ours = Adapter.load("bundled:reasoning")
    assert dict(read(tmp_path / "p").parts) == dict(ours.parts)
    vector(Site(2), torch.ones(4)).save(tmp_path / "v")
    done = run("export", tmp_path / "v", "--to", "safetensors", "--out", tmp_path / "v.safetensors")
    assert done.exit_code == 0
    assert Adapter.load(tmp_path / "v.safetensors").parts == vector(Site(2), torch.ones(4)).parts


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("export", "bundled:reasoning", "--to", "gguf", "--out", "x.gguf"), "is no constant at resid_post"),
        (("export", "bundled:reasoning", "--to", "onnx", "--out", "x"), "unknown format 'onnx'"),
        (("show", "bundled:reasoning", "--site", "3"), "leave site out"),
        (("show", "no/such"), "does not exist"),
    ],
)
def test_errors_are_one_line(run, args, said):
    done = run(*args)
    assert done.exit_code == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
