"""Several adapters at once: each delta on the same state, at its own positions, by its own schedule."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import make_model
from workbench.adapters import Adapter, Blend, LowRank, Schedule, vector
from workbench.backends import torch_hooks
from workbench.errors import UserError
from workbench.evaluate.behaviour import kl_on_text, log_odds
from workbench.models import Model
from workbench.prompts import Prompt, PromptSet, pad
from workbench.sites import Site

ROWS = [[1, 20, 21, 22, 23, 24], [1, 30, 31], [1], [1, 40, 41, 42]]
PROMPTS = ["w20 w21 w22 w23", "w30", "w40 w41"]
SITE = Site(1)


def random_adapter(seed: int, site: Site = SITE, positions: str = "last") -> Adapter:
    g = torch.Generator().manual_seed(seed)
    shapes = ((48, 3), (3,), (3, 48))
    return Adapter({site: LowRank(*(torch.randn(*shape, generator=g) for shape in shapes))}, positions)


def states(model: Model, *contexts, site: Site = SITE) -> torch.Tensor:
    ids, mask = pad(ROWS, 0, "left")
    with torch.inference_mode():
        for context in contexts:
            context.__enter__()
        try:
            with model.read([site]) as seen:
                model.run(ids, mask)
        finally:
            for context in reversed(contexts):
                context.__exit__(None, None, None)
    return seen[site]


def test_one_adapter_in_a_blend_is_the_adapter_to_the_bit(small_model):
    adapter = random_adapter(0) * 0.7
    assert torch.equal(
        states(small_model, adapter.on(small_model)), states(small_model, Blend([adapter]).on(small_model))
    )
    twice = Blend([adapter * 2]) * 0.5
    assert torch.equal(states(small_model, adapter.on(small_model)), states(small_model, twice.on(small_model)))


def test_deltas_are_of_the_same_state_and_add_up(small_model):
    a, b = random_adapter(0), random_adapter(1, positions="prompt") * -0.5
    plain = states(small_model)
    got = states(small_model, Blend([a, b]).on(small_model))
    real = pad(ROWS, 0, "left")[1].bool()
    wanted = plain.clone()
    wanted[real] += b.delta(SITE, plain[real])
    wanted[:, -1] += a.delta(SITE, plain[:, -1])
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-5)
    assert torch.equal(got[~real], plain[~real])
    nested = states(small_model, a.on(small_model), b.on(small_model))  # the second sees what the first has written
    assert (nested - got).abs().max() > 1e-2
    turned = states(small_model, Blend([b, a]).on(small_model))
    torch.testing.assert_close(turned, got, atol=1e-4, rtol=1e-5)


def test_adapters_of_equal_positions_blend_as_they_add(small_model):
    a, b = random_adapter(0) * 2, random_adapter(1)
    got = states(small_model, Blend([a, b]).on(small_model))
    torch.testing.assert_close(got, states(small_model, (a + b).on(small_model)), atol=1e-4, rtol=1e-5)


def test_adapters_at_several_sites_and_without_strength(small_model):
    a, b = random_adapter(0, Site(0)), random_adapter(1, Site(2))
    blend = Blend([a, b, random_adapter(2) * 0])
    assert blend.sites == [Site(0), SITE, Site(2)]
    both = states(small_model, blend.on(small_model), site=Site(2))
    assert torch.equal(both, states(small_model, a.on(small_model), b.on(small_model), site=Site(2)))
    hooks = [m for m in small_model.module.modules() if m._forward_hooks]
    with Blend([a * 0]).on(small_model):
        assert [m for m in small_model.module.modules() if m._forward_hooks] == hooks
    assert torch.equal(states(small_model, Blend([a * 0]).on(small_model)), states(small_model))


@pytest.mark.parametrize("schedule", ["constant", "linear:3", "first:2"])
@pytest.mark.parametrize("positions", ["generated", "all"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_schedule_is_followed_token_by_token(small_model, schedule, positions, use_cache):
    """Read before and after the edit, in each pass of a generation."""
    adapter = vector(SITE, torch.full((48,), 4.0), positions=positions)
    before, after = [], []
    with (
        small_model.edit({SITE: lambda h, where: before.append((h.clone(), where.position, where.prompt_length)) or h}),
        Blend([adapter], schedule).on(small_model),
        small_model.edit({SITE: lambda h, where: after.append(h.clone()) or h}),
    ):
        small_model.generate(PROMPTS, max_new_tokens=5, min_new_tokens=5, use_cache=use_cache)
    assert len(after) == 5
    for (h, position, prompt), edited in zip(before, after, strict=True):
        for row, column in torch.cartesian_prod(torch.arange(3), torch.arange(position.shape[1])).tolist():
            at, token = position[row, column].item(), (position[row, column] - prompt[row]).item() + 1
            factor = {"constant": 1.0, "linear:3": max(0.0, 1 - (token - 1) / 3), "first:2": float(token <= 2)}[
                schedule
            ]
            if token < 1:
                factor = 1.0 if positions == "all" and at >= 0 else 0.0
            shift = (edited - h)[row, column]
            torch.testing.assert_close(shift, torch.full((48,), 4.0 * factor), atol=1e-4, rtol=0)
            assert factor or torch.equal(edited[row, column], h[row, column])


def test_a_blend_generates_as_an_argument_and_as_a_context(small_model):
    blend = Blend([random_adapter(0), random_adapter(1, positions="generated") * 0.5], ["constant", "first:2"])
    given = small_model.generate(PROMPTS, max_new_tokens=6, adapter=blend)
    with blend.on(small_model):
        assert small_model.generate(PROMPTS, max_new_tokens=6) == given
    one = random_adapter(0)
    alone = small_model.generate(PROMPTS, max_new_tokens=6, adapter=one)
    with one.on(small_model):
        assert small_model.generate(PROMPTS, max_new_tokens=6) == alone
    assert given != small_model.generate(PROMPTS, max_new_tokens=6)


@given(st.integers(1, 50), st.integers(-5, 60))
def test_schedules_fall_from_one_and_touch_n_tokens(n, token):
    linear, first = Schedule(f"linear:{n}"), Schedule(f"first:{n}")
    for schedule in (linear, first):
        assert (schedule.factor(token) > 0) == (token <= n)
        assert schedule.factor(token + 1) <= schedule.factor(token) <= 1
        assert schedule.factor(min(token, 1)) == 1
    assert linear.factor(token) <= first.factor(token)
    assert Schedule().factor(token) == 1


@pytest.mark.parametrize(
    "text", ["linear", "first:0", "first:-1", "linear:x", "constant:3", "exp:3", "", "first:" + "9" * 40]
)
def test_unknown_schedules_are_refused(text):
    with pytest.raises(UserError, match=r"unknown schedule .*allowed: constant, linear:n, first:n"):
        Schedule(text)


def test_blends_that_cannot_be_are_refused(llama):
    a = random_adapter(0)
    with pytest.raises(UserError, match="over generated tokens and positions 'last' hold none"):
        Blend([a], "first:3")
    with pytest.raises(UserError, match="2 schedules do not go with 1 adapters"):
        Blend([a], ["constant", "constant"])
    with pytest.raises(UserError, match="at least one adapter"):
        Blend([])
    other = replace(a, base={"name": "another", "weights": "0" * 64})
    with pytest.raises(UserError, match="belongs to another"), Blend([a, other]).on(llama):
        pass
    with Blend([a, other]).on(llama, allow_mismatch=True):
        pass


@pytest.mark.parametrize("backend", ["transformer-lens", "nnsight"])
def test_a_blend_is_the_same_on_every_backend(backend):
    from tests.backends.test_contract import model_of

    blend = Blend([random_adapter(0), random_adapter(1, positions="generated")], ["constant", "linear:4"])
    plain, other = (
        model_of("gpt2", name).generate(PROMPTS, max_new_tokens=6, adapter=blend) for name in ("hooks", backend)
    )
    assert plain == other


def test_beams_follow_a_schedule():
    model = make_model("gpt2")
    seen: list[list[float]] = []
    inner = vector(SITE, torch.full((48,), 1.0), positions="generated")
    before: list[torch.Tensor] = []
    with (
        torch_hooks.edit(model, {SITE: lambda h, w: before.append(h.clone()) or h}),
        Blend([inner], "first:1").on(model),
        torch_hooks.edit(model, {SITE: lambda h, w: seen.append((h - before[-1]).mean((1, 2)).round().tolist()) or h}),
    ):
        model.generate(PROMPTS[:2], max_new_tokens=4, min_new_tokens=4, num_beams=3)
    assert seen == [[0.0] * 6, [1.0] * 6, [0.0] * 6, [0.0] * 6]


@pytest.mark.parametrize("positions", ["first:2", "last:2", "first:2+last"])
def test_a_prompt_that_is_too_short_for_the_positions_is_named(small_model, positions):
    adapter = vector(SITE, torch.ones(48), positions=positions)
    with pytest.raises(
        UserError,
        match=rf"prompt 2 of the batch \(from 0\) has 1 tokens, too few for positions '{re.escape(positions)}', which name 2",
    ):
        states(small_model, adapter.on(small_model))
    assert torch.equal(states(small_model, (adapter * 0).on(small_model)), states(small_model))
    named = PromptSet((Prompt(None, "w20 w21", "long"), Prompt(None, "w30", "short")))
    for use in (
        lambda: small_model.generate(named, adapter=adapter, max_new_tokens=2),
        lambda: small_model.generate(named, adapter=Blend([adapter * 0.5, adapter]), max_new_tokens=2),
        lambda: log_odds(small_model, named, ["w7"], adapter),
    ):
        with pytest.raises(
            UserError, match=r"prompt 'short' has 1 tokens, too few for positions '.*2.*', which name 2"
        ):
            use()
    small_model.generate(named[:1], adapter=adapter, max_new_tokens=2)  # the tokens that follow are no prompts


def test_neutral_texts_are_cut_where_the_positions_have_room(small_model):
    adapter = vector(SITE, torch.ones(48), positions="first:5")
    texts = ["w20 w21 w22 w23 w24", "w30 w31", "w40 w41 w42 w43"]
    assert kl_on_text(small_model, texts, adapter).per_text.shape == (2,)
    with pytest.raises(UserError, match="none of the neutral texts has 6 tokens"):
        kl_on_text(small_model, texts[1:2], adapter)
