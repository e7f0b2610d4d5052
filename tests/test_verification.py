"""`verify_backends`: what agrees is said to agree, and what does not is found and named."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from tests.conftest import make_module, save_folder, word_tokenizer
from workbench import verification
from workbench.backends import NAMES
from workbench.backends.hooks import HooksBackend
from workbench.cli import app
from workbench.errors import UserError
from workbench.verification import verify_backends
from workbench.verification_table import summary_lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    return save_folder(make_module("gemma2"), tmp_path_factory.mktemp("model"))


def test_the_backends_agree_with_the_model_at_every_layer(folder):
    found = verify_backends(folder, repeats=1)
    assert found.agrees
    assert [b.name for b in found.backends] == ["hooks", "nnsight", "transformer-lens"]
    for one in found.backends:
        assert not one.refused
        assert len(one.points) == 6
        assert one.cost > 0
        assert one.same_tokens
    given = {d.what for d in found.differences if d.against == "model" and d.backend == "nnsight"}
    assert given == {"resid_post.0", "resid_post.1", "resid_post.2", "logits"}  # the last one is before the final norm
    others = {d.what for d in found.differences if d.against == "hooks" and d.backend == "transformer-lens"}
    assert {"mlp_act.1", "attn_out.0", "edited resid_post.2", "edited logits"} <= others
    assert json.loads(json.dumps(found.to_dict()))["agrees"] is True


def test_the_last_hidden_state_that_is_compared_is_that_before_the_final_norm():
    module = make_module("llama")
    before = dict(vars(module.config))
    found = verify_backends(module, tokenizer=word_tokenizer(), backends=["hooks"], layers=[-1], repeats=1)
    assert {d.what: d.largest for d in found.differences} == {"resid_post.2": 0.0, "logits": 0.0}
    assert vars(module.config) == before


def test_a_backend_that_reads_something_else_is_found(folder, monkeypatch: pytest.MonkeyPatch):
    class Off(HooksBackend):
        name = "nnsight"

        def read(self, model, sites, take=None):
            def wrong(site, h):
                return take(site, h * 1.01 if str(site) == "attn_out.1" else h)

            return super().read(model, sites, take and wrong)

    real = verification.open_backend
    monkeypatch.setattr(verification, "open_backend", lambda name, *a: Off() if name == "nnsight" else real(name, *a))
    found = verify_backends(folder, backends=["hooks", "nnsight"], repeats=1)
    assert not found.agrees
    assert [d.what for d in found.differences if not d.agrees] == ["attn_out.1"]
    assert "DISAGREE" in list(summary_lines(found))[-1]
    result = CliRunner().invoke(app, ["verify", str(folder), "--backends", "hooks,nnsight", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["agrees"] is False


def test_a_family_that_a_backend_does_not_take_is_told_and_is_no_disagreement():
    found = verify_backends(make_module("falcon_new"), tokenizer=word_tokenizer(), repeats=1)
    assert found.agrees
    assert ["cannot wrap" in b.refused for b in found.backends] == [False, False, True]
    assert any(line.startswith("transformer-lens: refused: ") for line in summary_lines(found))


def test_a_loaded_module_stays_as_it_was():
    module = make_module("gpt2")
    names, ids = list(module.state_dict()), torch.arange(3, 9)[None]
    before = module(ids).logits
    verify_backends(module, tokenizer=word_tokenizer(), layers=[0], repeats=1)
    assert list(module.state_dict()) == names
    assert torch.equal(module(ids).logits, before)


def test_the_verb_prints_every_layer_and_what_each_backend_costs(folder):
    result = CliRunner().invoke(app, ["verify", str(folder), "--layers", "0,-1"])
    assert result.exit_code == 0
    for text in (
        "resid_post.0",
        "mlp_act.2",
        "logits",
        "edited resid_post.2",
        *NAMES,
        "of a plain one",
        "agree to 1e-05",
    ):
        assert text in result.stdout
    assert "resid_post.1" not in result.stdout
    lines = result.stdout.splitlines()
    assert lines[1].split() == ["what", "norm", *("max", "rel") * 3]
    assert next(line for line in lines if line.startswith("mlp_act.2")).split()[2] == "="
    assert "shown there as =" in result.stdout


def test_half_precision_has_a_tolerance_of_its_own():
    found = verify_backends(make_module("llama").bfloat16(), tokenizer=word_tokenizer(), layers=[1], repeats=1)
    assert (found.dtype, found.tolerance, found.agrees) == ("bfloat16", 5e-2, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backends": ["hooks", "jax"]}, "unknown backend 'jax'; allowed: hooks, transformer-lens, nnsight"),
        ({"backends": []}, "unknown backend .none.; allowed"),
        ({"layers": [7]}, "layer 7 is out of range"),
    ],
)
def test_bad_arguments_are_refused(options, message, folder):
    with pytest.raises(UserError, match=message):
        verify_backends(folder, **options)
