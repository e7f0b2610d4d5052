"""`workbench train`: what it makes and prints, how it goes on after a stop, and how bad input is told."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from workbench.adapters import Adapter
from workbench.cli import app
from workbench.sites import Site

from .conftest import ctrl_c_in_training, make_module, save_folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("train")
    save_folder(make_module("llama"), home / "model")
    lines = [{"prompt": f"w{i} w{3 * i % 50}", "response": "w7 w8"} for i in range(16)]
    (home / "shown.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return home


def line(home, out, *more):
    return ["train", str(home / "model"), "--demonstrations", str(home / "shown.jsonl"), "--out", str(out), "--steps", "6",
            "--batch-size", "4", *map(str, more)]  # fmt: skip


def run(*args):
    return CliRunner().invoke(app, line(*args))


def test_an_adapter_is_trained_as_asked(home, tmp_path):
    asked = ("--kind", "loreft", "--layers", "0,-1", "--positions", "first:2", "--rank", 3, "--validation", "0.25")
    found = run(home, tmp_path / "a", *asked, "--validate-every", 2, "--patience", 2, "--json")
    assert found.exit_code == 0, found.output
    said, adapter = json.loads(found.stdout), Adapter.load(tmp_path / "a")
    assert said["sites"] == ["resid_post.0", "resid_post.2"] == list(map(str, adapter.sites))
    assert (adapter.positions, adapter.rank, adapter.name, adapter.meta["kind"]) == ("first:2", 3, "a", "loreft")
    assert [step for step, _ in said["validation"]] == [2, 4, 6][: len(said["validation"])]
    assert adapter.meta["training"]["best_step"] == said["best_step"]
    plain = run(home, tmp_path / "b", "--validation", home / "shown.jsonl")
    assert "nodireft at resid_post.2, 6 steps: loss" in plain.stdout  # two thirds of three layers
    assert "which is kept" in plain.stdout


def test_the_same_command_goes_on_after_ctrl_c(home, tmp_path, monkeypatch):
    assert run(home, tmp_path / "whole", "--name", "x").exit_code == 0
    with ctrl_c_in_training(monkeypatch, after=2):
        stopped = run(home, tmp_path / "cut", "--name", "x")
    assert stopped.exit_code == 130
    assert "2 of 6 steps are kept; run the same again to go on" in stopped.stderr
    again = run(home, tmp_path / "cut", "--name", "x")
    assert "going on after 2 of 6 steps" in again.stderr
    assert {p.name: p.read_bytes() for p in (tmp_path / "cut").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()
    }
    assert Adapter.load(tmp_path / "cut").parts[Site(2)].rank == 4


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--kind", "lora"), "unknown adapter kind 'lora'; allowed: nodireft, loreft, direft, vector"),
        (("--positions", "middle"), "unknown positions 'middle'"),
        (("--positions", "last:9"), "too few for positions 'last:9'"),
        (("--layers", "7"), "layer 7 is out of range"),
        (("--layers", "0", "--sites", "resid_post.0"), "give one of them"),
        (("--validation", "1.5"), "--validation 1.5: a share"),
        (("--validation", "gone.jsonl"), "gone.jsonl"),
        (("--patience", "2"), "patience needs demonstrations to validate on"),
        (("--profile", "gone"), "gone"),
    ],
)
def test_bad_input_is_told_in_one_line(home, tmp_path, more, words):
    found = run(home, tmp_path / "a", *more)
    assert found.exit_code == 2, found.output
    assert words in found.stderr
    assert not (tmp_path / "a").exists()
    assert found.stdout == ""
