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

from .conftest import make_module, save_folder
from .lora_folders import lora_folder


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


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A model, and a LoRA of it."""
    home = tmp_path_factory.mktemp("lora")
    save_folder(make_module("llama"), home / "model")
    (home / "prompts.txt").write_text("".join(f"w{i} w{3 * i % 50} w{i % 7}\n" for i in range(60)))
    lora_folder(home / "lora", size=0.1)
    return home


def from_weights(home, out, *more):
    return ["from-weights", home / "model", home / "lora", "--prompts", home / "prompts.txt", "--out", out, *more]


def test_an_adapter_is_made_of_a_lora(run, lora, tmp_path):
    done = run(*from_weights(lora, tmp_path / "a", "--rank", 2, "--json"))
    assert done.exit_code == 0, done.output
    said, adapter = json.loads(done.stdout), Adapter.load(tmp_path / "a")
    assert said["sites"] == list(map(str, adapter.sites))
    assert [f["site"] for f in said["fits"]] == ["resid_post.1", "resid_post.2"]
    assert (adapter.rank, adapter.name, adapter.base["name"]) == (3, "a", str(lora / "model"))
    shown = run(*from_weights(lora, tmp_path / "b", "--layers", "1,2", "--keep", "all", "--positions", "all"))
    assert "resid_post.1*" in shown.stdout
    assert "R2 constant" in shown.stdout
    assert "KL to the changed model's next token" in shown.stdout
    assert Adapter.load(tmp_path / "b").positions == "all"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--rank", "some"), "rank 'some' is neither a number nor cv"),
        (("--rank", "99"), "rank must lie in 0..48"),
        (("--layers", "0"), "changes no activation"),
        (("--keep", "none"), "unknown keep 'none'"),
        (("--limit", "4"), "too few to fit to"),
    ],
)
def test_from_weights_tells_bad_input_in_one_line(run, lora, tmp_path, more, words):
    found = run(*from_weights(lora, tmp_path / "a", *more))
    assert found.exit_code == 2
    assert words in found.stderr
    assert not (tmp_path / "a").exists()


def test_show_of_a_lora_says_how_an_adapter_is_made_of_it(run, lora):
    found = run("show", lora / "lora")
    assert "is a PEFT LORA" in found.stderr
    assert "workbench adapters from-weights" in found.stderr
