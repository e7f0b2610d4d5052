"""Controls: as long as the paste, blind to what it carries, and the constant part of it."""

import pytest
import torch

from tests.conftest import make_model
from workbench.adapters.adapter import Adapter, LowRank, vector
from workbench.convert import ConverterFits
from workbench.errors import UserError
from workbench.evaluate.controls import (
    at_length,
    delta_norm,
    mean_delta,
    random_converter,
    shuffled_pairs,
    sigma_length,
)
from workbench.forecast import Candidate, paste_candidate
from workbench.profile import profile_model
from workbench.sensitivity import gradients
from workbench.sites import Site

PROMPTS = [f"w{i} w{(3 * i) % 150} w{i % 7}" for i in range(120)]
CANDIDATE = Candidate(((Site(1), Site(2)),), "ridge", 0.1)


@pytest.fixture(scope="module")
def made():
    """(adapter of the donor, fits, states of the recipient, its gradients' model)."""
    donor, recipient = make_model("llama"), make_model("gpt2", seed=1)
    fits = ConverterFits(profile_model(donor, PROMPTS), profile_model(recipient, PROMPTS))
    draw = torch.Generator().manual_seed(0)
    part = LowRank(
        torch.randn(48, 2, generator=draw), torch.randn(2, generator=draw), torch.randn(2, 48, generator=draw)
    )
    return (
        Adapter({Site(1): part}, name="test", base=donor.fingerprint),
        fits,
        gradients(recipient, PROMPTS[:20], ["w7"]).states,
    )


@pytest.mark.parametrize("make", [random_converter, shuffled_pairs])
def test_a_control_is_an_adapter_of_the_recipient_that_follows_its_seed(made, make):
    adapter, fits, states = made
    paste = paste_candidate(adapter, fits, CANDIDATE)
    control = make(adapter, fits, CANDIDATE, 5)
    assert list(control.parts) == list(paste.parts) == [Site(2)]
    assert control.base == fits.recipient.fingerprint
    assert control.rank == adapter.rank
    assert control == make(adapter, fits, CANDIDATE, 5)
    assert control != make(adapter, fits, CANDIDATE, 6)
    a, b = (x.delta(Site(2), states[Site(2)]).flatten() for x in (paste, control))
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.5


def test_lengths(made):
    adapter, fits, states = made
    paste = paste_candidate(adapter, fits, CANDIDATE)
    length = sigma_length(paste, fits, states)
    assert sigma_length(paste * -2, fits, states) == pytest.approx(2 * length, rel=1e-5)
    scaled = at_length(shuffled_pairs(adapter, fits, CANDIDATE, 0), length, fits, states)
    assert sigma_length(scaled, fits, states) == pytest.approx(length, rel=1e-5)
    with pytest.raises(UserError, match="is zero"):
        at_length(paste * 0, 1.0, fits, states)


def test_the_mean_delta_is_the_constant_part(made):
    adapter, fits, states = made
    paste = paste_candidate(adapter, fits, CANDIDATE, 0.5)
    mean, here = mean_delta(paste, states), states[Site(2)]
    torch.testing.assert_close(mean.delta(Site(2), here)[3], paste.delta(Site(2), here).mean(0), atol=1e-4, rtol=1e-4)
    steering = vector(Site(2), torch.randn(48), base=paste.base)
    torch.testing.assert_close(mean_delta(steering, states).parts[Site(2)].U, steering.parts[Site(2)].U)


def test_a_half_precision_adapter_is_controlled_too(made):
    adapter, fits, _ = made
    half = random_converter(adapter.to(torch.bfloat16), fits, CANDIDATE, 0)
    assert all(part.V.dtype == torch.float32 for part in half.parts.values())


def test_random_converters_write_along_the_profile(made):
    """At one length in standard deviations they are about as long as shuffled pairs in plain length, not far shorter."""
    adapter, fits, states = made
    norms = {}
    for make in (random_converter, shuffled_pairs):
        drawn = [at_length(make(adapter, fits, CANDIDATE, seed), 3.0, fits, states) for seed in range(4)]
        norms[make] = sum(delta_norm(a, states) for a in drawn)
    assert 0.2 < norms[random_converter] / norms[shuffled_pairs] < 5
