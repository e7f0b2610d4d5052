"""The forecast against what it forecasts: small deltas measured, gradients by finite differences."""

import pytest
import torch

from tests.conftest import make_model
from workbench.adapters.adapter import Adapter, LowRank, vector
from workbench.convert import ConverterFits, fit_converters
from workbench.errors import UserError
from workbench.evaluate.behaviour import log_odds
from workbench.forecast import (
    Candidate,
    Forecast,
    candidates_of,
    forecast_frame,
    forecast_pastes,
    matched_candidates,
    paste_candidate,
    rank,
)
from workbench.paste import paste_adapter
from workbench.profile import profile_model
from workbench.prompts import PromptSet, encode, pad
from workbench.sensitivity import fisher, gradients
from workbench.sites import Site

PROMPTS = [f"w{i} w{(5 * i) % 150} w{(11 * i) % 150}"[: 4 + 4 * (i % 3)].strip() for i in range(40)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_forecast_the_effect_of_a_small_delta(family):
    model = make_model(family)
    g = gradients(model, PROMPTS, ["w7"])
    torch.testing.assert_close(g.value.double(), log_odds(model, PROMPTS, ["w7"]), atol=1e-4, rtol=1e-4)
    direction = torch.randn(model.width, generator=torch.Generator().manual_seed(0))
    for site in (Site(0), Site(1), Site(2)):
        step = vector(site, 1e-2 * direction / direction.norm() * g.states[site].norm(dim=1).mean())
        measured = log_odds(model, PROMPTS, ["w7"], step) - g.value.double()
        forecast = g.effect(site, step.parts[site]).double()
        assert torch.corrcoef(torch.stack([measured, forecast]))[0, 1] > 0.98
        assert (measured.mean() - forecast.mean()).abs() < 0.1 * forecast.abs().mean() + 1e-3


def test_gradients_leave_the_model_as_it_was():
    model = make_model("llama")
    flags = [p.requires_grad for p in model.module.parameters()]
    gradients(model, PROMPTS[:4], ["w7"])
    assert [p.requires_grad for p in model.module.parameters()] == flags
    assert all(p.grad is None for p in model.module.parameters())


def test_fisher_gradients_forecast_the_kl_of_the_next_token():
    model = make_model("gpt2")
    site = Site(1)
    samples = fisher(model, PROMPTS, [site], samples=64)
    direction = torch.randn(model.width, generator=torch.Generator().manual_seed(1))
    step = vector(site, 2e-2 * direction / direction.norm() * samples[0].states[site].norm(dim=1).mean())
    forecast = torch.stack([g.effect(site, step.parts[site]).square().mean() / 2 for g in samples]).mean()
    ids, mask = pad(encode(PromptSet.load(PROMPTS), model.tokenizer), model.pad_id, "left")
    with torch.inference_mode():
        p = model.logits(ids, mask, last_only=True)[:, 0].double().log_softmax(1)
        with step.on(model):
            q = model.logits(ids, mask, last_only=True)[:, 0].double().log_softmax(1)
    measured = (p.exp() * (p - q)).sum(1).mean()
    assert 0.7 < forecast / measured < 1.4


def test_a_forecast_of_pastes_agrees_with_the_pastes():
    donor, recipient = make_model("llama"), make_model("gpt2", seed=1)
    prompts = [f"w{i} w{(3 * i) % 150}" for i in range(80)]
    fits = ConverterFits(profile_model(donor, prompts), profile_model(recipient, prompts))
    g = torch.Generator().manual_seed(0)
    part = LowRank(torch.randn(48, 2, generator=g) / 48, torch.randn(2, generator=g), torch.randn(2, 48, generator=g))
    adapter = Adapter({Site(1): part})
    candidates = candidates_of(adapter, recipient.n_layers, [("ridge", 0.1), ("ridge", 1.0)])
    assert len(candidates) == 6
    on = gradients(recipient, PROMPTS, ["w7"])
    made = forecast_pastes(adapter, fits, candidates, on, {"other": on}, target=1.0, strength=0.01)
    plain = log_odds(recipient, PROMPTS, ["w7"])
    for f in made:
        ((d, r),) = f.candidate.pairs
        pasted = Adapter({r: fits.fold(part, d, r, f.candidate.method, f.candidate.alpha)}, strength=0.01)
        measured = float((log_odds(recipient, PROMPTS, ["w7"], pasted) - plain).mean())
        assert measured == pytest.approx(f.on, abs=0.05 * abs(f.on) + 1e-4)
        assert f.off["other"] == pytest.approx(f.on)


def forecast(on: float, off: float = 0.0, sigma: float = 1.0, layer: int = 0) -> Forecast:
    return Forecast(Candidate(((Site(0), Site(layer)),), "ridge", 0.1), 1.0, on, 0.1, {}, {"other": off}, 0.0, sigma)


def test_ranking_prefers_reach_then_little_damage_then_shortness():
    reached, damaging, short, weak = forecast(2.0, sigma=3.0), forecast(2.0, off=0.2), forecast(2.0), forecast(0.5)
    wrong = forecast(-2.0)
    assert rank([weak, wrong, damaging, reached, short], 2.0) == [short, reached, damaging, weak, wrong]
    with pytest.raises(UserError, match="no candidate"):
        rank([], 1.0)


def test_strength_reaches_for_the_target_within_its_bounds():
    from workbench.forecast import _strength

    bounds = (0.25, 1.5)
    assert _strength(2.0, 1.0, 1.0, 4.0, bounds) == 0.5
    assert _strength(0.1, 1.0, 1.0, 4.0, bounds) == 1.5
    assert _strength(0.1, 8.0, 1.0, 4.0, bounds) == 0.5  # not longer than 4 sigma
    assert _strength(-1.0, 1.0, 1.0, 4.0, bounds) == 0.25  # the wrong way: as little as may be


def test_a_candidate_becomes_the_paste_that_its_converters_make():
    donor, recipient = make_model("llama"), make_model("gpt2", seed=1)
    prompts = [f"w{i} w{(3 * i) % 150}" for i in range(80)]
    fits = ConverterFits(profile_model(donor, prompts), profile_model(recipient, prompts))
    draw = torch.Generator().manual_seed(2)
    parts = {Site(l): LowRank(torch.randn(48, 2, generator=draw), torch.randn(2, generator=draw),
                              torch.randn(2, 48, generator=draw)) for l in (0, 1)}  # fmt: skip
    adapter = Adapter(parts, strength=0.7, name="two", base=donor.fingerprint)
    candidate = Candidate(((Site(0), Site(2)), (Site(1), Site(2))), "ridge", 0.3)  # both meet at one site
    paste = paste_candidate(adapter, fits, candidate, 0.5)
    converters = fit_converters(fits.donor, fits.recipient, candidate.pairs, alpha=0.3)
    reference = paste_adapter(adapter, converters, recipient_fingerprint=recipient.fingerprint, strength=0.5)
    h = fits.recipient.read(Site(2))
    torch.testing.assert_close(paste.delta(Site(2), h), reference.delta(Site(2), h), atol=1e-3, rtol=1e-3)
    assert (paste.name, paste.base, paste.strength) == ("two paste", recipient.fingerprint, 0.5)
    paste.check(recipient)
    with pytest.raises(UserError, match="belongs to"):
        paste.check(make_model("gpt2", seed=2))


def test_forecasts_as_a_table():
    made = [Forecast(Candidate(((Site(1), Site(r)),), "ridge", 0.1), 1.0, 0.5 - r, 0.1, {"plain": 0.2}, {"plain": 0.01}, 0.0,
                     2.0) for r in (0, 1)]  # fmt: skip
    frame = forecast_frame(made, [0.4, -0.3])
    assert list(frame["paste"]) == ["1>0 ridge 0.1", "1>1 ridge 0.1"]
    assert list(frame["measured on"]) == [0.4, -0.3]
    assert list(frame["off: plain"]) == [0.2, 0.2]
    assert "measured on" not in forecast_frame(made)


def test_neutral_texts_are_cut_where_the_measurement_cuts_them():
    """After a whole text a model is sure of its end, and no delta would seem to do harm."""
    model, texts = make_model("gpt2"), [f"w{i} w{i + 1} w{i + 2} w{i + 3}" for i in range(6)]
    cut = [t.rsplit(" ", 2)[0] for t in texts]
    halves = fisher(model, [{"text": t} for t in texts], [0], samples=1)[0]
    whole = fisher(model, [{"text": t} for t in cut], [0], samples=1, split=1.0)[0]
    torch.testing.assert_close(halves.states[Site(0)], whole.states[Site(0)], atol=1e-4, rtol=1e-4)


def test_both_points_of_a_layer_are_read_in_the_order_in_which_they_run():
    model = make_model("llama")
    g = gradients(model, PROMPTS[:6], ["w7"], ["resid_post.1", "resid_pre.1", "resid_pre.2"])
    torch.testing.assert_close(g.grads[Site(1)], g.grads[Site(2, "resid_pre")])
    assert not torch.allclose(g.grads[Site(1)], g.grads[Site(1, "resid_pre")])


def test_an_adapter_of_several_layers_is_pasted_whole():
    donor, recipient = make_model("llama"), make_model("gpt2", seed=1)
    prompts = [f"w{i} w{(3 * i) % 150}" for i in range(80)]
    fits = ConverterFits(profile_model(donor, prompts), profile_model(recipient, prompts))
    g = torch.Generator().manual_seed(0)
    adapter = Adapter({
        Site(l): LowRank(torch.randn(48, 2, generator=g) / 48, torch.randn(2, generator=g), torch.randn(2, 48, generator=g))
        for l in (0, 2)
    })  # fmt: skip
    on = gradients(recipient, PROMPTS, ["w7"])
    methods = [("ridge", 0.1), ("ridge", 1.0)]
    found = matched_candidates(adapter, fits, on, 1.0, donor.n_layers, methods)
    assert all([d for d, _ in c.pairs] == [Site(0), Site(2)] for c in found)
    assert all(c.pairs[0][1] <= c.pairs[1][1] for c in found)
    made = forecast_pastes(adapter, fits, found, on, target=1.0, strength=1.0)
    best = max(f.on for f in made if f.candidate.alpha == 0.1)
    by_forecast = next(f for f in made if f.candidate.alpha == 0.1)  # the first of each converter
    assert by_forecast.on == pytest.approx(best)
