"""What adapters do to one another: planted angles of their deltas, and effects that must, or must not, add up."""

from __future__ import annotations

import math

import pytest
import torch

from workbench.adapters import Adapter, LowRank, vector
from workbench.errors import UserError
from workbench.evaluate.interference import measure_interference
from workbench.evaluate.statistics import Interval
from workbench.sites import Site

WIDTH = 48
PROMPTS = ["w20 w21 w22 w23", "w30", "w40 w41", "w50 w51 w52"]
OPENERS = ["w7"]


def along(*entries: float, layer: int = 1, **options) -> Adapter:
    v = torch.zeros(WIDTH)
    v[: len(entries)] = torch.tensor(entries)
    return vector(Site(layer), v, **options)


def test_the_angles_of_planted_deltas_are_found(small_model):
    adapters = {"a": along(2.0), "turned": along(1.0, 1.0) * 3, "against": along(-1.0), "later": along(1.0, layer=2)}
    found = measure_interference(small_model, adapters, PROMPTS, OPENERS)
    half = math.sqrt(0.5)
    wanted = torch.tensor([[1, half, -1], [half, 1, -half], [-1, -half, 1]], dtype=torch.float64)
    torch.testing.assert_close(found.cosine[Site(1)][:3, :3], wanted, atol=1e-6, rtol=0)
    assert found.cosine[Site(1)][3].isnan().all(), "it does not act there"
    assert found.length[Site(1)][:3].tolist() == pytest.approx([2.0, 3 * math.sqrt(2), 1.0])
    met = found.cosines()
    assert list(zip(met["first"], met["second"], strict=True)) == [
        ("a", "turned"), ("a", "against"), ("turned", "against"),
    ]  # fmt: skip
    assert list(found.frame()["adapter"]) == [*adapters, "joint", "excess"]


def test_only_tokens_that_both_change_are_compared(small_model):
    pair = [along(1.0, positions="prompt", name="p"), along(1.0, positions="last", name="l")]
    found = measure_interference(small_model, pair, PROMPTS, OPENERS)
    assert found.names == ("p", "l")
    assert found.cosine[Site(1)][0, 1].item() == pytest.approx(1.0)
    apart = [along(1.0, positions="first:1"), along(1.0, positions="generated")]
    assert measure_interference(small_model, apart, PROMPTS, OPENERS).cosine[Site(1)][0, 1].isnan()


def test_deltas_are_of_the_plain_models_states(small_model):
    """The second reads what the first has written where they are nested; here it must not."""
    reads = Adapter({Site(2): LowRank(torch.eye(WIDTH)[:, :1], torch.zeros(1), torch.eye(WIDTH)[:1])})
    alone = measure_interference(small_model, [reads, along(0.0, 1.0)], PROMPTS, OPENERS)
    beside = measure_interference(small_model, [reads, along(50.0, 1.0)], PROMPTS, OPENERS)
    assert torch.equal(alone.length[Site(2)][:1], beside.length[Site(2)][:1])


def test_what_cancels_is_told_from_what_adds_up(small_model):
    push = along(*([3.0] * 5))
    against = measure_interference(small_model, [push, -push], PROMPTS, OPENERS)
    assert against.joint.value == pytest.approx(0.0, abs=1e-5)
    assert against.excess.value == pytest.approx(-sum(one.value for one in against.single), abs=1e-5)
    assert against.cosine[Site(1)][0, 1].item() == pytest.approx(-1.0)
    idle = measure_interference(small_model, [push, push * 0], PROMPTS, OPENERS)
    assert (idle.joint, idle.excess) == (idle.single[0], Interval(0.0, 0.0, 0.0))
    twice = measure_interference(small_model, [push, push], PROMPTS, OPENERS)
    whole = measure_interference(small_model, [push * 2, push * 0], PROMPTS, OPENERS)
    assert twice.joint.value == pytest.approx(whole.single[0].value, abs=1e-5)


def test_one_adapter_alone_does_not_interfere(small_model):
    with pytest.raises(UserError, match="1 adapters cannot interfere; give two or more"):
        measure_interference(small_model, [along(1.0)], PROMPTS, OPENERS)
    with pytest.raises(UserError, match=r"has width 3 at resid_post.1"):
        measure_interference(small_model, [along(1.0), vector(Site(1), torch.ones(3))], PROMPTS, OPENERS)
