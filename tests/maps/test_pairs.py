"""Pairs of maps: the closed step is a minimiser, the objective never rises, cycles close, refusals."""

from __future__ import annotations

import pytest
import torch

from workbench.errors import UserError
from workbench.maps import Spectrum, fit_pair
from workbench.maps.pairs import _best_given_back, _miss

from .example_rows import F64, activations, moments, noise, relative


@pytest.fixture(scope="module")
def rows():
    shared = noise(800, 10)
    x = shared @ noise(10, 14, seed=1) + 0.4 * noise(800, 14, seed=2) + 3
    return x, 50 * (shared @ noise(10, 9, seed=3) + 0.4 * noise(800, 9, seed=4)) - 1


def cycle_error(pair, x: torch.Tensor) -> float:
    return float((pair.back(pair.there(x)) - x).square().sum() / (x - x.mean(0)).square().sum())


def test_the_step_has_no_gradient_left():
    x, y = activations(200, 7, 5)
    train = moments(x, y)
    sx, sy, sxy = train.cov("x", "x") / 200, train.cov("y", "y") / 200, train.cov("x", "y") / 200
    b = noise(5, 7, seed=9)
    a = _best_given_back(sx, sy, sxy, b, 0.7, 0.01).requires_grad_()
    around = _miss(sx, sx, sx, a @ b) + _miss(sy, sy, sy, b @ a)
    (_miss(sx, sxy, sy, a) + 0.7 * around + 0.01 * a.square().sum()).backward()
    assert float(a.grad.abs().max()) <= 1e-9 * float(sx.abs().max())


def test_the_objective_never_rises_and_cycles_close(rows):
    train = moments(*rows)
    apart, together = fit_pair(train, "ridge", dtype=F64), fit_pair(train, "cycle", cycle=5.0, dtype=F64)
    assert together.converged
    steps = torch.tensor(together.objective, dtype=F64).diff()
    assert bool((steps <= 1e-12).all())
    assert float(steps.sum()) < 0
    assert cycle_error(together, rows[0]) < cycle_error(apart, rows[0])


def test_without_the_cycle_it_is_the_ridge_pair(rows):
    train = moments(*rows)
    apart, together = fit_pair(train, "ridge", dtype=F64), fit_pair(train, "cycle", cycle=0.0, dtype=F64)
    assert relative(together.there.weight, apart.there.weight) <= 1e-8
    assert relative(together.back.weight, apart.back.weight) <= 1e-8
    spectrum = Spectrum.of(train)
    assert relative(apart.there.weight, spectrum.ridge("y", 0.01 * spectrum.unit).weight) <= 1e-12


def test_the_units_of_a_side_do_not_matter(rows):
    x, y = rows
    plain, scaled = fit_pair(moments(x, y), dtype=F64), fit_pair(moments(x, 1000 * y), dtype=F64)
    assert relative(scaled.there.weight, 1000 * plain.there.weight) <= 1e-6
    assert relative(scaled.back.weight, plain.back.weight / 1000) <= 1e-6


def test_whitened_pairs_keep_all_variance_and_undo_one_another():
    x, y = activations(2000, 12)
    pair = fit_pair(moments(x, y), "whitened", shrink=0.0, dtype=F64)
    assert cycle_error(pair, x) <= 1e-16
    torch.testing.assert_close(pair.there(x).T.cov(), y.T.cov(), rtol=1e-6, atol=1e-8)
    turn = torch.linalg.qr(noise(12, 12, seed=4)).Q
    found = fit_pair(moments(x, x @ turn + 2), "whitened", shrink=0.0, dtype=F64)
    assert relative(found.there(x), x @ turn + 2) <= 1e-8


def test_refusals_and_notes(rows):
    train = moments(*rows)
    with pytest.raises(UserError, match="ridge, whitened, cycle; got 'both'"):
        fit_pair(train, "both")
    with pytest.raises(UserError, match="whitened has no option 'cycle'; it has shrink"):
        fit_pair(train, "whitened", cycle=1.0)
    with pytest.raises(UserError, match="cycle must be a number from 0 up; got -1"):
        fit_pair(train, cycle=-1.0)
    assert "raise max_iterations" in fit_pair(train, max_iterations=1).notes[-1]
