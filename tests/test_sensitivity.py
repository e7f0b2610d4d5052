"""Gradients of log-odds and of whole answers against what small deltas do, wherever an adapter acts."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import make_model
from workbench.adapters.adapter import Adapter, LowRank
from workbench.errors import UserError
from workbench.evaluate.behaviour import log_likelihood, log_odds
from workbench.prompts import PromptSet, response_ids
from workbench.sensitivity import Gradients, answer_gradients, gradients
from workbench.sites import Site

PROMPTS = [f"w{i} w{(5 * i) % 150} w{(11 * i) % 150} w{(3 * i) % 50}"[: 8 + 4 * (i % 3)].strip() for i in range(24)]
SHOWN = [{"prompt": p, "response": " ".join(f"w{(7 * i + j) % 150}" for j in range(1 + i % 4))}
         for i, p in enumerate(PROMPTS)]  # fmt: skip
POSITIONS = ("last", "prompt", "generated", "all", "first:2+last:1")


def small(g: Gradients, site: Site, positions: str) -> Adapter:
    """A part whose delta depends on the state, and is a hundredth of its length."""
    draw = torch.Generator().manual_seed(0)
    width = g.states[site].shape[1]
    part = LowRank(torch.randn(width, 2, generator=draw) / width**0.5, torch.randn(2, generator=draw),
                   torch.randn(2, width, generator=draw))  # fmt: skip
    length = part.delta(g.states[site]).norm(dim=1).mean()
    return Adapter({site: part}, positions=positions) * float(5e-3 * g.states[site].norm(dim=1).mean() / length)


def agree(g: Gradients, step: Adapter, measured: torch.Tensor) -> None:
    ((site, part),) = step.parts.items()
    forecast = step.strength * g.effect(site, part).double()
    assert forecast.shape == measured.shape
    assert torch.corrcoef(torch.stack([measured, forecast]))[0, 1] > 0.98
    assert (measured - forecast).abs().mean() < 0.1 * forecast.abs().mean()


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_whole_answers(family, positions):
    model = make_model(family)
    g = answer_gradients(model, SHOWN, [0, 1], positions=positions, batch_size=5)
    plain = log_likelihood(model, SHOWN)
    torch.testing.assert_close(g.value.double(), plain, atol=1e-4, rtol=1e-4)
    step = small(g, Site(1), positions)
    agree(g, step, log_likelihood(model, SHOWN, step) - plain)


@pytest.mark.parametrize("positions", ["prompt", "first:1", "last:2"])
def test_log_odds_of_adapters_at_other_positions(positions):
    model = make_model("gpt2")
    g = gradients(model, PROMPTS, ["w7"], positions=positions, batch_size=7)
    step = small(g, Site(0), positions)
    agree(g, step, log_odds(model, PROMPTS, ["w7"], step) - log_odds(model, PROMPTS, ["w7"]))


def test_a_row_each_is_in_the_order_of_the_prompts():
    model = make_model("gpt2")
    one = gradients(model, PROMPTS, ["w7"], positions="last")
    same = answer_gradients(model, [{"prompt": p, "response": "w7"} for p in PROMPTS])
    assert one.owner is None
    assert same.owner is None
    torch.testing.assert_close(one.states[Site(1)], same.states[Site(1)], atol=1e-4, rtol=1e-4)
    many = gradients(model, PROMPTS, ["w7"], positions="prompt")
    assert many.owner is not None
    assert torch.equal(many.owner, many.owner.sort().values)
    assert many.grads[Site(0)].shape == (len(many.owner), model.width)


def test_log_likelihood_is_the_sum_over_the_tokens_of_each_answer():
    model = make_model("llama")
    found = log_likelihood(model, SHOWN, batch_size=5)
    for prompt, value in zip(PromptSet.load(SHOWN), found.tolist(), strict=True):
        ids, answer = response_ids(prompt, prompt.meta["response"], model.tokenizer)
        whole = torch.tensor([ids + answer])
        with torch.inference_mode():
            logp = model.logits(whole, torch.ones_like(whole))[0].double().log_softmax(1)
        alone = sum(float(logp[len(ids) + k - 1, token]) for k, token in enumerate(answer))
        assert value == pytest.approx(alone, abs=1e-4)


def test_answers_that_are_not_there_are_told():
    model = make_model("llama")
    for call in (answer_gradients, log_likelihood):
        with pytest.raises(UserError, match="has no response"):
            call(model, ["w1 w2"])
    with pytest.raises(UserError, match="unknown positions"):
        answer_gradients(model, SHOWN, positions="middle")
    with pytest.raises(UserError, match="too few for positions"):
        gradients(model, ["w1 w2"], ["w7"], positions="first:40")
