"""`workbench lens`: a prompt layer by layer, with a lens and an adapter, and fitting; bad input told in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from probes.lens import Lens
from workbench.adapters.adapter import vector
from workbench.models import load
from workbench.sites import Site

from .conftest import LAYERS, WIDTH, make_module, save_folder
from .test_cli import good, told, tree, workbench


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("lens")
    save_folder(make_module("llama"), home / "llama")
    save_folder(make_module("gpt2", seed=1), home / "gpt2")
    (home / "prompts.txt").write_text("".join(f"w{i} w{3 * i % 50} w{i % 7} w{i % 31}\n" for i in range(60)))
    base = load(home / "llama").fingerprint
    vector(Site(1), torch.linspace(-2, 2, WIDTH), base=base, name="push").save(home / "adapter")
    good("lens", home / "llama", "--fit", "--prompts", home / "prompts.txt", "--out", home / "tuned", "--epochs", 1)
    return home


def test_a_prompt_is_shown_layer_by_layer(home):
    out = good("lens", home / "llama", "--text", "w3 w4 w5").stdout
    for word in ("likeliest next token, logit lens", "embeddings", "w5", "entropy (nats)", "rank of the answer"):
        assert word in out
    said = json.loads(good("lens", home / "llama", "--text", "w3 w4 w5", "--plain", "--top", 2, "--json").stdout)
    assert (said["lens"], said["adapter"], said["answers"]) == ("logit", "", "final")
    assert len(said["cells"]) == (LAYERS + 1) * 4, "a BOS and three words"
    last = said["cells"][-1]
    assert (last["site"], last["answer_rank"], last["answer"]) == (f"resid_post.{LAYERS - 1}", 1, last["top"])
    assert len(last["likeliest"]) == 2


def test_a_lens_is_fitted_once_and_looked_through(home):
    assert tree(home / "tuned") == {"config.json", "params.safetensors"}
    found = Lens.load(home / "tuned")
    assert found.kind == "tuned"
    assert len(found.meta["figures"]) == LAYERS
    line = ("lens", home / "llama", "--text", "w3 w4", "--lens", home / "tuned")
    both = json.loads(good(*line, "--adapter", home / "adapter", "--strength", 2, "--json", "--last", 1).stdout)
    assert (both["lens"], both["adapter"], len(both["cells"])) == ("tuned", "push", LAYERS + 1)
    assert "tuned lens" in good(*line, "--kind", "tuned").stdout


def test_fits_print_their_figures(home, tmp_path):
    line = ("lens", home / "llama", "--fit", "--prompts", home / "prompts.txt", "--out")
    result = good(*line, tmp_path / "closed", "--epochs", 0, "--limit", 40)
    for word in ("held-out prompts, with 95 % intervals", "closed form", "transport"):
        assert word in result.stdout
    assert "the fit was no better than its start, which is kept" in result.stderr
    said = json.loads(good(*line, tmp_path / "jacobian", "--kind", "jacobian", "--limit", 4, "--json").stdout)
    assert (said["kind"], said["prompts"]) == ("jacobian", 4)
    assert set(said["relative_error"]) == {"resid_pre.0", "resid_post.0", "resid_post.1"}
    assert "relative error of its Jacobians at most" in good(*line, tmp_path / "jacobian", "--kind", "jacobian", "--limit", 2,
                                                             "--overwrite").stdout  # fmt: skip


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ((), "nothing to look at: give --text"),
        (("--text", "w1", "--kind", "deep"), "unknown kind of lens 'deep'; allowed: logit, tuned, jacobian"),
        (("--text", "w1", "--kind", "tuned"), "a tuned lens is fitted first: `workbench lens"),
        (("--text", "w1", "--prompts", "x.txt"), "--prompts and --out are of --fit"),
        (("--fit", "--text", "w1"), "leave --text, --lens and --adapter out"),
        (("--fit",), "--fit needs --prompts to fit on and --out"),
        (("--fit", "--kind", "logit", "--prompts", "x", "--out", "y"), "a logit lens needs no fit"),
        (("--fit", "--prompts", "prompts.txt", "--out", "y", "--alpha", "cv"), 'is a number or "gcv"'),
        (("--text", "w1", "--lens", "nowhere"), "nowhere is not a lens"),
        (("--text", "w1", "--lens", "tuned", "--kind", "jacobian"), "is a tuned lens, not a jacobian one"),
    ],
)
def test_bad_input_is_told_in_one_line(home, line, words, monkeypatch):
    monkeypatch.chdir(home)
    told(workbench("lens", home / "llama", *line), words)
    assert not (home / "y").exists()


def test_what_belongs_to_another_model_is_refused_by_name(home):
    told(
        workbench("lens", home / "gpt2", "--text", "w1 w2", "--lens", home / "tuned"),
        "this lens belongs to",
        "llama",
        "gpt2",
    )
    told(workbench("lens", home / "gpt2", "--text", "w1 w2", "--adapter", home / "adapter"), "this adapter belongs to")
    told(
        workbench("lens", home / "llama", "--fit", "--prompts", home / "prompts.txt", "--out", home / "tuned"),
        "exists already",
    )
