"""On the bundled pair: what is probed stands beside its controls, directions steer, here and pasted, and an eraser erases."""

from __future__ import annotations

import pytest

from probes.directions import find_directions
from probes.erasers import erase_label
from probes.linear import train_probes
from probes.probe_transfer import transfer_probe
from workbench.convert import fit_converters
from workbench.evaluate.behaviour import kl_on_text, log_odds
from workbench.models import load
from workbench.paste import paste_adapter
from workbench.profile import profile_model
from workbench.prompts import PromptSet
from workbench.sites import Site

pytestmark = pytest.mark.slow
SORRY = ("sorry",)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    home = tmp_path_factory.mktemp("pair")
    prompts = PromptSet.load("bundled:profile", limit=1200)
    models = {name: load(f"bundled:{name}", device="cpu") for name in ("donor", "recipient")}
    return {name: (model, profile_model(model, prompts, home / name)) for name, model in models.items()}


@pytest.fixture(scope="module")
def tokens(pair, tmp_path_factory):
    """Every token of fewer prompts, of the recipient."""
    prompts = PromptSet.load("bundled:profile", limit=300)
    return profile_model(pair["recipient"][0], prompts, tmp_path_factory.mktemp("tokens") / "s", tokens="all")


@pytest.mark.parametrize("label", [{"label": "label", "classes": ["refusal"]}, {"label": "label", "classes": ["reasoning"]},
                                   {"label": "text:plus,minus"}], ids=["refusal", "reasoning", "in an expression"])  # fmt: skip
def test_behaviours_and_tokens_are_probed_at_every_layer_beside_controls(pair, tokens, label):
    given = dict(label)
    store = tokens if str(given["label"]).startswith("text:") else pair["recipient"][1]
    curve = train_probes(store, given.pop("label"), **given)
    assert len(curve.lines) == 4
    for line in curve.lines:
        assert line.score.auroc.low > 0.95
        assert line.score.accuracy.value > line.score.chance
        assert line.shuffled.accuracy.value < line.score.chance + 0.05
        assert line.selectivity.low > 0
    assert curve.words["all"].accuracy.value > 0.95  # and the words say it too: no probe here shows more than reading


def test_directions_steer_and_pasted_steer_the_other_model(pair):
    donor, store = pair["donor"]
    recipient, theirs = pair["recipient"]
    prompts = PromptSet.load("bundled:evaluation_refusal", limit=40)
    plain = {m.name: float(log_odds(m, prompts, SORRY).mean()) for m in (donor, recipient)}
    found = find_directions(store, "group", "harmful", "harmless", sites=[3])
    converters = fit_converters(store, theirs, [(Site(3), Site(3))])
    for direction in found:
        assert direction.auroc.low > 0.9
        adapter = direction.adapter(positions="last")
        gain = float(log_odds(donor, prompts, SORRY, adapter).mean()) - plain[donor.name]
        back = float(log_odds(donor, prompts, SORRY, -adapter).mean()) - plain[donor.name]
        assert gain > 0.2 > -0.2 > back
        pasted = paste_adapter(adapter, converters, recipient_fingerprint=recipient.fingerprint)
        assert float(log_odds(recipient, prompts, SORRY, pasted).mean()) - plain[recipient.name] > 0.2


def test_an_eraser_takes_the_probe_to_chance_and_costs_perplexity(pair):
    model, store = pair["recipient"]
    found = erase_label(store, "label", 2, positions="last")
    assert found.before.accuracy.low > 0.95
    assert found.after.accuracy.low < found.after.chance + 0.05
    assert found.after.accuracy.value < found.after.chance + 0.08
    assert found.covariance < 1e-6
    cost = kl_on_text(model, PromptSet.load("bundled:evaluation_text", limit=20), found.adapter(positions="last"))
    assert cost.kl.value > 0
    assert cost.perplexity_edited > cost.perplexity_base


def test_a_probe_of_the_donor_reads_the_recipient_through_a_converter(pair):
    _, store = pair["donor"]
    _, theirs = pair["recipient"]
    (line,) = train_probes(store, "group", sites=[3], positions="last").lines
    (converter,) = fit_converters(store, theirs, [(Site(3), Site(3))])
    found = transfer_probe(line.probe, theirs, None, converter.to_donor, site=3)
    assert found.moved.accuracy.low > found.moved.chance
    assert found.lost.value < 0.3
