"""A folded language model is an ordinary one: it saves, loads, generates, and is as near to the dense one as was planned."""

from __future__ import annotations

import json
import logging

import pytest
import torch
import transformers as tf

from workbench.errors import UserError
from workbench.folding.architecture import register_folder, save_folded
from workbench.folding.fold import fold_model
from workbench.models import load

from ..conftest import WIDTH, make_model, word_tokenizer

PROMPTS = [{"text": f"w{i} w{3 * i % 50} w{i % 7} w{i % 31} w{5 * i % 90} w{i % 11}"} for i in range(80)]
IDS = torch.arange(3, 35).view(2, 16)


def logits(module) -> torch.Tensor:
    with torch.inference_mode():
        return module(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "phi3", "bloom", "gemma3"])
def test_a_folded_model_saves_loads_and_generates(family, tmp_path):
    model = make_model(family)
    before = logits(model.module)
    folded = fold_model(model, PROMPTS, theta=0.5)
    assert torch.equal(logits(model.module), before), "the model itself stays as it is"
    made = logits(folded.model.module)
    assert not torch.equal(made, before)
    folded.save(tmp_path / "folded")
    again = load(tmp_path / "folded")
    assert torch.equal(logits(again.module), made)
    assert again.family == f"folded-{model.family}"
    options = {"max_new_tokens": 6, "min_new_tokens": 6}
    assert again.generate(["w1 w2", "w5"], **options) == folded.model.generate(["w1 w2", "w5"], **options)
    assert again.parameters < model.parameters
    assert folded.plan.ratio < 1
    assert again.fingerprint["weights"] != model.fingerprint["weights"]


def test_transformers_itself_opens_it_once_told(tmp_path):
    fold_model(make_model("gpt2"), PROMPTS, theta=0.25).save(tmp_path / "folded")
    assert register_folder(tmp_path / "folded")
    module = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "folded").eval()
    assert torch.equal(logits(module), logits(load(tmp_path / "folded").module))
    module.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()), logits(module))
    assert "register_folder" in (tmp_path / "folded" / "README.md").read_text()
    assert not list((tmp_path / "folded").glob("*.py")), "no code lies in the folder"


def test_nothing_idle_is_the_same_model_bit_for_bit():
    model = make_model("gpt2")
    folded = fold_model(model, PROMPTS, theta=0)
    assert torch.equal(logits(folded.model.module), logits(model.module))
    assert folded.plan.ratio == 1


def test_layers_may_differ(tmp_path):
    model = make_model("gpt2")
    folded = fold_model(model, PROMPTS, theta=(0.75, 0.5, 0.0), method="affine")
    assert [len(i) for i in folded.plan.idle] == [3 * WIDTH, 2 * WIDTH, 0]
    folded.save(tmp_path / "folded")
    again = load(tmp_path / "folded")
    assert torch.equal(logits(again.module), logits(folded.model.module))
    assert [len(block["ffn"]["inputs"]) for block in again.module.config.folding["layers"]] == [1, 1]
    assert list(folded.frame()["idle"]) == [144, 96, 0]


def test_weights_left_are_those_of_the_paper():
    folded = fold_model(make_model("gpt2"), PROMPTS, theta=0.75, method="mean")
    assert folded.plan.ratio == pytest.approx(1 - 0.75 + 1 / 8)


def test_a_linear_activation_is_folded_without_loss():
    module = make_model("gpt2").module
    for block in module.transformer.h:
        block.mlp.act = torch.nn.Identity()
    model = load(module, tokenizer=word_tokenizer())
    for method in ("identity", "affine", "refit"):
        folded = fold_model(model, PROMPTS, theta=0.75, method=method, alpha=1e-9 if method == "refit" else "cv")
        torch.testing.assert_close(logits(folded.model.module), logits(module), rtol=1e-3, atol=2e-3)


def test_identity_says_what_it_costs(caplog):
    with caplog.at_level(logging.WARNING, "workbench"):
        folded = fold_model(make_model("gpt2"), PROMPTS, theta=0.5, method="identity")
    assert folded.rise is not None
    assert f"loss {folded.rise.value:+.2f} nats per token" in caplog.text
    assert "identity leaves out the activation of channels that were trained with it" in caplog.text


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("gpt2", {"theta": 1.0}, "theta is the share of channels that are idle, from 0 to less than 1; got 1"),
        ("gpt2", {"theta": -0.5}, "got -0.5"),
        ("gpt2", {"theta": (0.5,)}, "theta has 1 values for 3 layers"),
        ("gpt2", {"method": "zero"}, "unknown method 'zero'; allowed: identity, mean, affine, refit"),
        ("llama", {"method": "affine"}, "is gated: its channel"),
        ("llama", {"method": "identity"}, "use refit, which fits the channels' sum to x itself"),
        ("mixtral", {}, "is a mixture of experts"),
    ],
)
def test_bad_input_is_refused(family, options, words):
    with pytest.raises(UserError) as told:
        fold_model(make_model(family), PROMPTS[:8], **options)
    assert words in str(told.value)
    assert "\n" not in str(told.value)


def test_a_folded_model_is_not_folded_again():
    folded = fold_model(make_model("gpt2"), PROMPTS, theta=0.5, method="mean")
    with pytest.raises(UserError, match="is folded already"):
        fold_model(folded.model, PROMPTS)


def test_damaged_folders_are_told(tmp_path):
    fold_model(make_model("gpt2"), PROMPTS, theta=0.5, method="mean").save(tmp_path / "folded")
    config = json.loads((tmp_path / "folded" / "config.json").read_text())
    for change, words in (
        ({"folding": None}, "does not say what was folded; fold it again"),
        ({"folding": {**config["folding"], "class": "GPT9LMHeadModel"}}, "has no GPT9LMHeadModel of type 'gpt2'"),
        ({"folding": {**config["folding"], "base": "gpt9"}}, "of type 'gpt9'"),
        ({"folding": {**config["folding"], "layers": [{"ffn": {}, "active": 1}]}}, "does not fit its family"),
        ({"folding": {**config["folding"], "layers": []}}, "the weights of"),
    ):
        (tmp_path / "folded" / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError) as told:
            load(tmp_path / "folded")
        assert words in str(told.value), change
    assert not register_folder(tmp_path / "nowhere")


def test_only_folded_models_are_saved_as_such(gpt2):
    with pytest.raises(UserError, match="is not folded; fold it first"):
        save_folded(gpt2, "nowhere")
