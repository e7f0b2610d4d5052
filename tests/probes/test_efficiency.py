"""Transport efficiency: bounded by 1, 1 where all is carried, and not the truncation's failure."""

from __future__ import annotations

import pytest
import torch

from probes.efficiency import transport_efficiency
from workbench.errors import UserError
from workbench.maps.moments import Moments

F64 = torch.float64


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def split(x: torch.Tensor, y: torch.Tensor, cut: int, products: torch.dtype = F64) -> tuple[list[Moments], Moments]:
    def summed(a: torch.Tensor, b: torch.Tensor) -> Moments:
        return Moments(products=products).update({"x": a, "y": b})

    return [summed(*ab) for ab in zip(x[:cut].chunk(3), y[:cut].chunk(3), strict=True)], summed(x[cut:], y[cut:])


@pytest.mark.parametrize("products", [torch.float64, torch.float32])
def test_8_an_exact_map_of_lower_rank_has_efficiency_one(products):
    x = noise(4000, 96)
    y = x @ noise(96, 24, seed=1) @ noise(24, 96, seed=2)
    found = transport_efficiency(*split(x, y, 3000, products), alpha=0)
    assert len(found.ranks) == 24
    assert float(found.ceiling[-1]) == pytest.approx(1, abs=1e-6)
    assert float(found.bound[-1]) == pytest.approx(1, abs=1e-6)
    assert float(found.efficiency[-1]) == pytest.approx(1, abs=1e-6)
    assert bool((found.efficiency <= 1 + 1e-6).all())
    assert found.size.rank_y == 24


@pytest.mark.parametrize("alpha", ["cv", 0, 0.1])
def test_no_map_does_better_than_the_bound(alpha):
    x = noise(6000, 48) @ (torch.logspace(0, -1.5, 48, dtype=F64)[:, None] * torch.linalg.qr(noise(48, 48, seed=1)).Q)
    y = x @ noise(48, 48, seed=2) / 4 + noise(6000, 48, seed=3)
    found = transport_efficiency(*split(x, y, 4500), alpha=alpha)
    assert bool((found.efficiency <= 1 + 1e-9).all())
    assert bool((found.efficiency_truncated <= 1 + 1e-9).all())
    assert bool((found.bound.diff() >= -1e-12).all())
    assert bool((found.optimal[2:20] > found.truncated[2:20]).all())
    assert bool((found.ceiling_corrected < found.ceiling).all())
    assert (found.n_train, found.n_held_out) == (4500, 1500)


@pytest.mark.parametrize("alpha", [0, 0.1])
def test_the_best_of_each_rank_is_best_in_the_whitened_metric(alpha):
    """Against rows: B K R R' K^-1, B the ridge map, K = Syy^(-1/2), R the leading directions of what B carries, whitened."""
    x = noise(600, 12) * torch.logspace(0, -1, 12, dtype=F64)
    y = x @ noise(12, 10, seed=2) * torch.logspace(0, -1.5, 10, dtype=F64) + 0.1 * noise(600, 10, seed=3)
    found = transport_efficiency(*split(x, y, 450), alpha=alpha)
    centred, target = x[:450] - x[:450].mean(0), y[:450] - y[:450].mean(0)
    penalised = centred.T @ centred + found.alpha_absolute * torch.eye(12, dtype=F64)
    ridge = torch.linalg.solve(penalised, centred.T @ target)
    values, vectors = torch.linalg.eigh(target.T @ target / 450)
    k, root = (vectors @ torch.diag(values**power) @ vectors.T for power in (-0.5, 0.5))
    directions = torch.linalg.eigh(k @ ridge.T @ penalised @ ridge @ k)[1].flip(1)
    held_x, held_y = x[450:] - x[:450].mean(0), y[450:] - y[:450].mean(0)
    for i, rank in enumerate(found.ranks.tolist()):
        kept = directions[:, :rank] @ directions[:, :rank].T
        error = (held_y - held_x @ ridge @ k @ kept @ root) @ k
        assert float(found.optimal[i]) == pytest.approx(
            1 - float(error.square().sum() / (held_y @ k).square().sum()), abs=1e-9
        )


def test_independent_sides_carry_nothing_and_the_inflation_says_so():
    found = transport_efficiency(*split(noise(8000, 60), noise(8000, 60, seed=1), 6000), alpha=0)
    assert float(found.bound[-1]) == pytest.approx(found.bound_inflation, rel=0.1)
    assert float(found.ceiling[-1]) == pytest.approx(found.ceiling_inflation, rel=0.1)
    assert float(found.optimal[-1]) < 0
    assert float(found.ceiling_corrected.abs().max()) < 2e-3
    assert found.size.wachter_count == 0


def test_refusals():
    x, y = noise(400, 30), noise(400, 30, seed=1)
    with pytest.raises(UserError, match="need more than 61 rows; got 20"):
        transport_efficiency(*split(x, y, 380))
    with pytest.raises(UserError, match="no moments of training rows"):
        transport_efficiency([], split(x, y, 200)[1])
