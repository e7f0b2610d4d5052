"""Channels and refits on planted truths: what is linear is found, batches add up, and nothing else is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from workbench.errors import UserError
from workbench.folding.calibration import Channels, ChannelSums, Passing, calibrate, refit_maps
from workbench.folding.ffn import FFN
from workbench.folding.plan import drawn, least, linear_schedule, plan_fold, shares, swapped

WIDTH, HIDDEN = 12, 40
RNG = torch.Generator().manual_seed(3)


class Network(nn.Module):
    """down(act(up(x))) in float64."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH), act
        self.double()

    def forward(self, x):
        return self.down(self.act(self.up(x)))


def made(act: nn.Module | None = None, seed: int = 0) -> tuple[nn.ModuleDict, FFN]:
    torch.manual_seed(seed)
    ffn = FFN("mlp", ("up",), "down", "act", WIDTH, HIDDEN, gated=False)
    return nn.ModuleDict({"mlp": Network(act or nn.GELU())}).eval(), ffn


def batches(model, x, size=100):
    return [(lambda part=part: model["mlp"](part), None) for part in x.split(size)]


def rows(n: int = 1200) -> torch.Tensor:
    return torch.randn(n, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_channels_of_an_identity_have_score_zero_and_the_line_itself():
    model, ffn = made(nn.Identity())
    (found,) = calibrate(model, [ffn], batches(model, rows()))
    assert found.score.abs().max() == 0
    torch.testing.assert_close(found.slope, torch.ones(HIDDEN).double())
    torch.testing.assert_close(found.offset, torch.zeros(HIDDEN).double(), atol=1e-10, rtol=0)


def test_a_channel_in_the_linear_regime_is_found():
    model, ffn = made()
    planted = [3, 17, 30]
    with torch.no_grad():
        model["mlp"].up.bias[planted] = torch.tensor([30.0, 40.0, -30.0]).double()  # where GELU is u, u and 0
    (found,) = calibrate(model, [ffn], batches(model, rows()))
    assert set(least([found], 3 / HIDDEN)[0].tolist()) == set(planted)
    torch.testing.assert_close(found.slope[planted], torch.tensor([1.0, 1.0, 0.0]).double(), atol=1e-6, rtol=0)


def test_lines_are_those_of_least_squares_and_batches_add_up():
    model, ffn = made()
    x = rows()
    (whole,), (parts,) = (calibrate(model, [ffn], batches(model, x, size)) for size in (len(x), 7))
    for name in ("mean", "variance", "error", "slope", "offset"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name), rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        u = model["mlp"].up(x)
        z = model["mlp"].act(u)
    design = torch.stack([u[:, 5], torch.ones(len(x)).double()], 1)
    line = torch.linalg.lstsq(design, z[:, 5]).solution
    torch.testing.assert_close(torch.stack([whole.slope[5], whole.offset[5]]), line, rtol=1e-8, atol=1e-10)
    error = (z[:, 5] - design @ line).square().mean() * model["mlp"].down.weight[:, 5].square().sum()
    torch.testing.assert_close(whole.score[5], error.detach(), rtol=1e-8, atol=0)


def test_a_gated_channel_is_scored_by_the_best_map_of_x():
    x = rows(3000)
    w = torch.randn(WIDTH, 2, dtype=torch.float64, generator=RNG)
    linear, product = x @ w[:, :1], (x @ w[:, :1]) * (x @ w[:, 1:])
    sums = ChannelSums(gated=True)
    for part in torch.cat([x, linear, product], 1).split(500):
        sums.update(Passing(part[:, :WIDTH], None, part[:, WIDTH:], part[:, :WIDTH]))
    found = sums.channels(torch.ones(2).double())
    assert found.slope is None
    assert found.r2[0] > 1 - 1e-9
    assert found.r2[1] < 0.2, "a product of two independent maps of normal rows is no map of them"


def test_each_method_is_what_it_says():
    model, ffn = made()
    x = rows()
    (found,) = calibrate(model, [ffn], batches(model, x))
    idle = least([found], 0.5)
    fits = refit_maps(model, [ffn], {"least": idle}, batches(model, x))["least"]
    kept = torch.ones(HIDDEN, dtype=torch.bool)
    kept[idle[0]] = False
    mlp, error = model["mlp"], {}
    with torch.no_grad():
        u = mlp.up(x)
        z, whole = mlp.act(u), mlp(x)
        stands_for = {"identity": u, "mean": found.mean.expand_as(u), "affine": found.slope * u + found.offset}
        for method in ("identity", "mean", "affine", "refit"):
            plan = plan_fold(model, [ffn], [found], idle, method, fits)
            with swapped(model, plan.modules(model)):
                y = model["mlp"](x)
            if method in stands_for:
                torch.testing.assert_close(y, mlp.down(torch.where(kept, z, stands_for[method])), rtol=1e-5, atol=1e-5)
            error[method] = float((y - whole).square().sum())
    assert error["refit"] <= error["affine"] <= error["mean"]
    assert error["affine"] < error["identity"]
    assert model["mlp"] is mlp, "what was there comes back"


def test_a_refit_finds_a_planted_map():
    """A network of odd symmetry around a shift has a linear part; of channels far in the linear regime all is."""
    model, ffn = made()
    with torch.no_grad():
        model["mlp"].up.bias[:20] += 30
    (found,) = calibrate(model, [ffn], batches(model, rows()))
    idle = [torch.arange(20)]
    (fit,) = refit_maps(model, [ffn], {"a": idle}, batches(model, rows()), alpha=1e-9)["a"]
    mlp = model["mlp"]
    planted = mlp.up.weight[:20].T @ mlp.down.weight[:, :20].T
    torch.testing.assert_close(fit.map.weight.double(), planted.detach(), rtol=1e-3, atol=1e-4)
    (none,) = refit_maps(model, [ffn], {"a": [torch.arange(0)]}, batches(model, rows()))["a"]
    assert none is None
    assert found.n == 1200


def test_channels_that_never_vary_leave_a_constant():
    model, ffn = made(nn.ReLU())
    with torch.no_grad():
        model["mlp"].up.bias[:4] = -100
    (fit,) = refit_maps(model, [ffn], {"dead": [torch.arange(4)]}, batches(model, rows()))["dead"]
    assert not fit.map.weight.any()
    assert not fit.map.bias.any()


def example() -> list[Channels]:
    one = torch.arange(8).double()
    return [Channels(9, one, one + 1, one.flip(0) + 1, one + 1, one, one)] * 3


def test_idle_channels_are_the_least_or_drawn():
    channels = example()
    assert [len(i) for i in least(channels, (0.0, 0.25, 0.5))] == [0, 2, 4]
    assert [len(i) for i in drawn(channels, 0.5)] == [4, 4, 4]
    assert torch.equal(drawn(channels, 0.5, seed=1)[0], drawn(channels, 0.5, seed=1)[0])
    score = channels[0].score
    assert score[least(channels, 0.5)[0]].max() <= score.sort().values[3]


def test_shares_and_the_schedule():
    assert shares(0.5, 3) == (0.5, 0.5, 0.5)
    assert linear_schedule(0.5, 4)[-1] == 0
    assert list(linear_schedule(0.75, 6)[:-1]) == sorted(linear_schedule(0.75, 6)[:-1])
    with pytest.raises(UserError, match="theta has 2 values for 3 layers"):
        shares((0.1, 0.2), 3)
    with pytest.raises(UserError, match=r"from 0 to less than 1; got 1"):
        shares((0.1, 1.0, 0.2), 3)


def test_bad_plans_are_refused():
    model, ffn = made()
    channels, idle = example()[:1], [torch.arange(2)]
    with pytest.raises(UserError, match="unknown method 'zero'; allowed: identity, mean, affine, refit"):
        plan_fold(model, [ffn], channels, idle, "zero")
    with pytest.raises(UserError, match="a refit needs its fits"):
        plan_fold(model, [ffn], channels, idle, "refit")
    gated = FFN("mlp", ("up", "up"), "down", "act", WIDTH, HIDDEN, gated=True)
    for method in ("identity", "affine"):
        with pytest.raises(UserError, match=r"mlp is gated: its channel act\(g\) \* v is a product of two maps of x"):
            plan_fold(model, [gated], channels, idle, method)
