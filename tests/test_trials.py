"""A trial says what the pasted model does, on target and off it, and the best trial has the most gain less damage."""

import pytest
import torch

from tests.conftest import make_model
from workbench.adapters.adapter import Adapter, LowRank, vector
from workbench.convert import ConverterFits
from workbench.evaluate.behaviour import log_odds
from workbench.forecast import Candidate, candidates_of, forecast_pastes, paste_candidate, rank
from workbench.profile import profile_model
from workbench.prompts import PromptSet, encode, pad
from workbench.sensitivity import gradients
from workbench.sites import Site
from workbench.trials import STRENGTHS, Trial, TrialSets, try_pastes

ON = PromptSet.load([f"w{i} w{(5 * i) % 150}" for i in range(30)])
AWAY = PromptSet.load([f"w{i} w{(7 * i) % 150} w3" for i in range(40, 60)])
TEXTS = PromptSet.load([{"text": " ".join(f"w{(i * k) % 150}" for k in range(3 + i % 4))} for i in range(1, 12)])
ONE = Candidate(((Site(1), Site(1)),), "ridge", 0.3)


@pytest.fixture(scope="module")
def model():
    return make_model("gpt2", seed=1)


@pytest.fixture(scope="module")
def sets(model):
    return TrialSets(model, (ON, ["w7"]), {"away": (AWAY, ["w9"])}, TEXTS, limit=20)


@pytest.fixture(scope="module")
def step(model):
    return vector(Site(1), torch.randn(model.width, generator=torch.Generator().manual_seed(0)))


def test_a_trial_is_what_the_pasted_model_does(model, sets, step):
    found = sets.trial(ONE, step)
    before, after = (log_odds(model, ON[:20], ["w7"], a) for a in (None, step))
    assert found.on == pytest.approx(float((after - before).mean()), abs=1e-5)
    assert found.gain == pytest.approx(float((after.sigmoid() - before.sigmoid()).mean()), abs=1e-6)
    before, after = (log_odds(model, AWAY[:20], ["w9"], a) for a in (None, step))
    assert found.off_rate == {"away": pytest.approx(float((after.sigmoid() - before.sigmoid()).abs().mean()), abs=1e-6)}


def test_text_is_cut_and_its_next_token_compared(model, sets, step):
    ids, mask = pad(
        [row[: max(1, round(len(row) / 2))] for row in encode(TEXTS, model.tokenizer)], model.pad_id, "left"
    )
    with torch.inference_mode():
        p = model.logits(ids, mask, last_only=True)[:, 0].double().log_softmax(1)
        with step.on(model):
            q = model.logits(ids, mask, last_only=True)[:, 0].double().log_softmax(1)
    kl = float((p.exp() * (p - q)).sum(1).mean())
    assert sets.trial(ONE, step).kl == pytest.approx(kl, rel=1e-4)
    moved = float((p.exp() - q.exp()).abs().sum(1).mean() / 2)  # no set of tokens moves by more
    assert moved <= Trial(ONE, 1.0, 0.0, 0.0, {}, kl).damage


def test_strength_0_does_nothing_and_sets_may_be_missing(model, step):
    found = TrialSets(model, (ON, ["w7"])).trial(ONE, step * 0)
    assert (found.on, found.gain, found.damage, found.off_rate) == (0, 0, 0, {})


def test_merit_is_gain_less_the_worst_damage():
    trial = Trial(ONE, 1.0, 2.0, 0.5, {"a": 0.1, "b": 0.3}, 0.02)
    assert trial.damage == 0.3
    assert Trial(ONE, 1.0, 2.0, 0.5, {}, 0.02).damage == pytest.approx(0.1)
    assert (trial.merit(), trial.merit(-1.0)) == (pytest.approx(0.2), pytest.approx(-0.8))
    assert trial.as_dict()["pairs"] == [["resid_post.1", "resid_post.1"]]


@pytest.fixture(scope="module")
def pair(model):
    donor = make_model("llama")
    prompts = [f"w{i} w{(3 * i) % 150}" for i in range(60)]
    fits = ConverterFits(profile_model(donor, prompts), profile_model(model, prompts))
    g = torch.Generator().manual_seed(0)
    part = LowRank(torch.randn(48, 2, generator=g) / 48, torch.randn(2, generator=g), torch.randn(2, 48, generator=g))
    adapter = Adapter({Site(1): part})
    on = gradients(model, ON, ["w7"])
    made = forecast_pastes(adapter, fits, candidates_of(adapter, 3, [("ridge", 0.1), ("ridge", 1.0)]), on, target=1.0)
    return adapter, fits, rank(made, 1.0)


@pytest.mark.parametrize("target", [2.0, -2.0])
def test_trials_come_best_first_and_are_of_the_pastes_they_name(sets, pair, target):
    adapter, fits, ranked = pair
    found = try_pastes(sets, adapter, fits, ranked[:2], target=target, max_sigma=1e9)
    assert sorted(t.strength for t in found) == sorted(STRENGTHS * 2)
    merits = [t.merit(target) for t in found]
    assert merits == sorted(merits, reverse=True)
    again = sets.trial(found[0].candidate, paste_candidate(adapter, fits, found[0].candidate, found[0].strength))
    assert again == found[0]


def test_no_trial_is_longer_than_the_bound(sets, pair):
    adapter, fits, ranked = pair
    first = ranked[0]
    bound = 1.5 * first.sigma / first.strength  # what strength 1.5 makes
    found = try_pastes(sets, adapter, fits, [first], target=1.0, max_sigma=bound)
    assert sorted(t.strength for t in found) == [0.5, 1.0, pytest.approx(1.5)]
