"""`workbench fold`: the table, the scores, the folder that is made; bad input told in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from workbench.models import load

from .conftest import make_module, save_folder
from .test_cli import good, told, workbench


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("fold")
    for family in ("gpt2", "llama", "mixtral"):
        save_folder(make_module(family), home / family)
    (home / "prompts.txt").write_text(
        "".join(f"w{i} w{3 * i % 50} w{i % 7} w{i % 31} w{i * i % 83}\n" for i in range(120))
    )
    return home


def test_a_model_is_folded_and_the_folder_is_a_model(home):
    line = ("fold", home / "gpt2", "--prompts", home / "prompts.txt", "--theta", 0.5, "--thetas", "0.25")
    out = good(*line, "--out", home / "folded").stdout
    for word in ("refit", "identity", "random", "tokens/s", "62.5% of the networks' weights"):
        assert word in out
    assert load(home / "folded").family == "folded-gpt2"
    assert good(
        "generate", home / "folded", "--prompts", home / "prompts.txt", "--limit", 2, "--max-new-tokens", 2
    ).stdout
    told(workbench(*line, "--out", home / "folded"), "exists already")


def test_the_table_as_json(home):
    said = json.loads(good("fold", home / "llama", "--prompts", home / "prompts.txt", "--thetas", "", "--json").stdout)
    assert said["gated"]
    assert said["folded"] is None
    assert {(a["theta"], a["method"], a["channels"]) for a in said["arms"]} == {
        (0.0, "dense", ""), (0.5, "mean", "least"), (0.5, "refit", "least"), (0.5, "refit", "random")}  # fmt: skip


def test_the_scores(home):
    line = ("fold", home / "gpt2", "--prompts", home / "prompts.txt", "--scores")
    assert "what the block writes" in good(*line).stdout
    assert len(json.loads(good(*line, "--json").stdout)["layers"]) == 3


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (("gpt2", "--theta", 1), "theta is the share of channels that are idle, from 0 to less than 1; got 1"),
        (("gpt2", "--theta", -0.25), "got -0.25"),
        (("gpt2", "--thetas", "half"), "cannot read the thetas 'half'"),
        (("gpt2", "--method", "zero"), "unknown method 'zero'; allowed: identity, mean, affine, refit"),
        (("gpt2", "--holdout", 1), "--holdout is a share of the prompts between 0 and 1"),
        (("gpt2", "--scores", "--out", "x"), "--scores folds nothing"),
        (("gpt2", "--out", "prompts.txt"), "exists already"),
        (("llama", "--method", "affine"), "is a product of two maps of its input, so that 'affine' does not apply"),
    ],
)
def test_bad_input_is_told_in_one_line(home, line, words, monkeypatch):
    monkeypatch.chdir(home)
    told(workbench("fold", *line, "--prompts", "prompts.txt"), words)
    assert not (home / "x").exists()


def test_a_mixture_of_experts_is_refused(home):
    result = workbench("fold", home / "mixtral", "--prompts", home / "prompts.txt")
    assert result.exit_code == 2
    last = result.stderr.splitlines()[-1]
    assert "error: " in last
    assert (
        "block 0 is a mixture of experts, each of which sees tokens of its own; only dense networks can be folded"
        in last
    )
