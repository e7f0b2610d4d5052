"""Block and channel scores on planted truths, and the curve of folding with its controls."""

from __future__ import annotations

import logging

import pytest
import torch

from probes.fold_curve import fold_curve
from probes.linearity import SOURCES, linearity
from workbench.errors import UserError
from workbench.fold_plots import block_linearity, channel_scores, fold_loss
from workbench.models import load

from ..conftest import LAYERS, make_model, make_module, word_tokenizer

PROMPTS = [f"w{i} w{3 * i % 50} w{i % 7} w{i % 31} w{5 * i % 90} w{i % 11} w{i * i % 83}" for i in range(240)]


def linear_gpt2():
    """A GPT-2 whose networks are linear maps of what they are given."""
    module = make_module("gpt2")
    for block in module.transformer.h:
        block.mlp.act = torch.nn.Identity()
    return load(module, tokenizer=word_tokenizer())


def test_a_linear_network_is_found_and_the_control_finds_nothing():
    found = linearity(linear_gpt2(), PROMPTS)
    assert all(one.value > 0.9999 for one in found.r2["ffn"])
    for c in found.channels:
        assert float(c.score.abs().max()) == 0
    for what in SOURCES:
        assert all(one.value < 0.1 for one in found.control[what]), what
        assert len(found.r2[what]) == LAYERS


def test_a_nonlinear_network_is_less_so_and_the_shortcut_makes_the_block_look_linear(gpt2):
    found = linearity(gpt2, PROMPTS, seed=1)
    for layer in range(LAYERS):
        assert found.r2["ffn"][layer].value < 0.999
        one = found.r2["block"][layer]
        assert one.low <= one.value <= one.high
    table = found.frame()
    assert len(table) == LAYERS
    assert len(found.channel_frame()) == LAYERS * 4 * 48
    assert "<table" in found._repr_html_()
    assert "plain networks" in repr(found)
    assert block_linearity(table).layout.yaxis.title.text == "R² on held-out prompts"
    assert len(channel_scores(found.channel_frame()).data) == LAYERS


def test_the_figures_do_not_depend_on_the_batches(gpt2):
    one, other = (linearity(gpt2, PROMPTS[:120], tokens=tokens) for tokens in (4096, 64))
    for what in SOURCES:
        for a, b in zip(one.r2[what], other.r2[what], strict=True):
            assert a.value == pytest.approx(b.value, abs=1e-4)
    for a, b in zip(one.channels, other.channels, strict=True):
        torch.testing.assert_close(a.score, b.score, rtol=1e-4, atol=1e-7)


def test_gated_networks_have_scores_and_no_lines(llama):
    found = linearity(llama, PROMPTS)
    assert found.gated
    assert found.channel_frame()["slope"].isna().all()
    assert (found.channel_frame()["r2"] <= 1).all()


def test_too_few_prompts_are_told(gpt2):
    with pytest.raises(UserError, match="held-out prompts do not make 8 shards"):
        linearity(gpt2, PROMPTS[:16])


def test_the_curve_has_every_arm_beside_its_controls(gpt2, caplog):
    with caplog.at_level(logging.WARNING, "workbench"):
        curve = fold_curve(gpt2, PROMPTS, (0.25, 0.5), repeats=1, answers=0)
    arms = {key[1:] for key in curve.scores}
    assert arms == {("identity", "least"), ("mean", "least"), ("affine", "least"), ("refit", "least"),
                    ("affine", "random"), ("refit", "random")}  # fmt: skip
    assert "identity leaves out the activation" in caplog.text
    table = curve.frame()
    assert len(table) == 1 + 2 * len(arms)
    assert table["rise"][0] == 0
    assert (table["speedup"] > 0).all()
    assert table[table["theta"] == 0.5]["weights"].iloc[0] == pytest.approx(0.5 + 1 / 8)
    assert "<table" in curve._repr_html_()
    assert {trace.name for trace in fold_loss(table).data} >= {"refit", "affine, random channels", "identity"}
    with pytest.raises(UserError, match=r"no arm 0\.9 refit least; there are"):
        curve.loss(0.9, "refit")


def test_a_gated_model_has_refit_and_mean(llama):
    curve = fold_curve(llama, PROMPTS, (0.5,), speed=False, answers=4)
    assert {key[1:] for key in curve.scores} == {("mean", "least"), ("refit", "least"), ("refit", "random")}
    assert curve.frame()["tokens_per_s"].isna().all()
    with pytest.raises(UserError, match="is gated"):
        fold_curve(llama, PROMPTS, (0.5,), methods=("affine",))


def test_a_fold_that_cannot_be_is_refused(gpt2):
    with pytest.raises(UserError, match="no theta given"):
        fold_curve(gpt2, PROMPTS, ())
    with pytest.raises(UserError, match=r"from 0 to less than 1; got 1\.5"):
        fold_curve(gpt2, PROMPTS, (1.5,))
    with pytest.raises(UserError, match="mixture of experts"):
        linearity(make_model("mixtral"), PROMPTS)


def test_the_bundled_recipient_loses_less_by_refit_than_by_lines_than_by_chance():
    """refit <= affine + .01 <= random channels, where random channels cost that much at all (at a quarter of the channels
    they do not: 0.003 nats); and the rule of training, `identity`, is a catastrophe."""
    curve = fold_curve(load("bundled:recipient"), "bundled:evaluation_text", speed=False)
    for theta in (0.25, 0.5, 0.75):
        refit, affine, random = (
            curve.loss(theta, "refit"),
            curve.loss(theta, "affine"),
            curve.loss(theta, "affine", "random"),
        )
        assert refit <= affine + 0.01, theta
        assert affine <= random, theta
        assert theta == 0.25 or affine + 0.01 <= random, theta
        assert refit <= curve.loss(theta, "mean") + 0.01, theta
        assert curve.loss(theta, "identity") - curve.plain_loss > 1, theta
