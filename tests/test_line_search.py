"""A line-search step says what the pasted model does, and finds a strength that reaches the target."""

import pytest
import torch

from tests.conftest import make_model
from workbench.adapters.adapter import Adapter, LowRank
from workbench.convert import ConverterFits
from workbench.evaluate.behaviour import log_odds
from workbench.forecast import candidates_of, forecast_pastes, gradients, paste_candidate
from workbench.line_search import _reaching, line_search
from workbench.profile import profile_model
from workbench.sites import Site

PROMPTS = [f"w{i} w{(5 * i) % 150}" for i in range(24)]


@pytest.fixture(scope="module")
def pair():
    donor, recipient = make_model("llama"), make_model("gpt2", seed=1)
    prompts = [f"w{i} w{(3 * i) % 150}" for i in range(60)]
    fits = ConverterFits(profile_model(donor, prompts), profile_model(recipient, prompts))
    g = torch.Generator().manual_seed(0)
    part = LowRank(torch.randn(48, 2, generator=g) / 48, torch.randn(2, generator=g), torch.randn(2, 48, generator=g))
    return recipient, Adapter({Site(1): part}), fits, gradients(recipient, PROMPTS, ["w7"])


def test_what_is_found_is_what_the_pasted_model_does(pair):
    model, adapter, fits, on = pair
    forecasts = forecast_pastes(adapter, fits, candidates_of(adapter, 3, [("ridge", 0.3)]), on, {"other": on}, target=1.0,
                                strength=1.0)  # fmt: skip
    plain = log_odds(model, PROMPTS, ["w7"]).mean()
    found = line_search(model, adapter, fits, forecasts, PROMPTS, ["w7"], target=0.5, max_sigma=1e9)
    for before, after in zip(forecasts, found, strict=True):
        pasted = paste_candidate(adapter, fits, after.candidate, after.strength)
        assert float(log_odds(model, PROMPTS, ["w7"], pasted).mean() - plain) == pytest.approx(after.on, abs=1e-6)
        assert after.sigma / before.sigma == pytest.approx(after.strength / before.strength)
        assert 0.25 <= after.strength <= 1.5


def test_more_steps_come_closer_to_a_target_within_reach(pair):
    model, adapter, fits, on = pair
    (first,) = forecast_pastes(adapter, fits, candidates_of(adapter, 3, [("ridge", 0.3)], [1]), on, target=1.0,
                               strength=0.5)  # fmt: skip
    (reach,) = line_search(model, adapter, fits, [first], PROMPTS, ["w7"], target=0.0, steps=0)
    target = 1.5 * reach.on  # past what strength 0.5 does
    ends = [line_search(model, adapter, fits, [first], PROMPTS, ["w7"], target=target, steps=n, max_sigma=1e9)[0].on
            for n in (0, 3)]  # fmt: skip
    assert abs(ends[1] - target) < abs(ends[0] - target)


@pytest.mark.parametrize(
    ("target", "slope", "bend", "strength"),
    [(2.0, 2.0, 0.0, 1.0), (3.0, 2.0, 1.0, 1.0), (2.0, 2.0, -1.0, 1.0), (1.0, -1.0, 0.0, 0.0), (2.0, -1.0, 1.0, 2.0)],
)
def test_the_curve_is_solved(target, slope, bend, strength):
    assert _reaching(target, slope, bend) == pytest.approx(strength)
