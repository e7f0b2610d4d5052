"""Canonical correlations: the reference's numbers, its defects mended, and what noise looks like (checks 6, 8, 9)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.cross_decomposition import CCA

from workbench.errors import UserError
from workbench.maps import CanonicalCorrelations, Moments, Spectrum, optimal_ranks, subspace_size
from workbench.maps.cca import DIM_LIN_NULL, null_squares

from .example_rows import F64, activations, folds, moments, noise


def reference_ceiling(x: np.ndarray, y: np.ndarray, eps: float = 1e-12) -> tuple[np.ndarray, np.ndarray]:
    """(rho, ceiling of every rank) as `transport_efficiency.py:23-63` of the released code computes them."""
    x, y = x - x.mean(0), y - y.mean(0)

    def inverse_root(s: np.ndarray) -> np.ndarray:
        w, v = np.linalg.eigh(s)
        return v @ np.diag(np.maximum(w, eps) ** -0.5) @ v.T

    n = len(x)
    c = inverse_root(y.T @ y / n) @ (y.T @ x / n) @ inverse_root(x.T @ x / n)
    rho = np.linalg.svd(c, compute_uv=False)
    return rho, (rho**2).cumsum() / x.shape[1]


def test_6_rho_and_ceiling_are_the_references_on_full_rank_data():
    x, y = activations(1500, 40)
    found = CanonicalCorrelations.of(moments(x, y))
    rho, ceiling = reference_ceiling(x.numpy(), y.numpy())
    np.testing.assert_allclose(found.rho, rho, atol=1e-6)
    np.testing.assert_allclose(found.ceiling(), ceiling, atol=1e-6)
    assert found.dim_lin == pytest.approx(rho.sum() ** 2 / (rho**2).sum(), abs=1e-6)
    assert found.sum_rho2 == pytest.approx((rho**2).sum(), abs=1e-6)


def test_6_the_ceiling_is_the_in_sample_whitened_reduced_rank():
    x, y = activations(1500, 40)
    train = moments(x, y)
    curve = optimal_ranks(Spectrum.of(train), metric="whitened").curve(train, train=train)
    torch.testing.assert_close(curve.r2_whitened[1:], CanonicalCorrelations.of(train).ceiling(), atol=1e-9, rtol=0)


def test_leading_variates_are_scikit_learns():
    x, y = activations(600, 8, 5)
    found = CanonicalCorrelations.of(moments(x, y))
    known = CCA(n_components=1, tol=1e-12, max_iter=10_000).fit(x.numpy(), y.numpy())
    u, v = known.transform(x.numpy(), y.numpy())
    assert float(found.rho[0]) == pytest.approx(np.corrcoef(u[:, 0], v[:, 0])[0, 1], abs=1e-6)
    mine = (x - x.mean(0)) @ found.left
    torch.testing.assert_close(mine.T @ mine / 600, torch.eye(5, dtype=F64), atol=1e-8, rtol=0)
    torch.testing.assert_close(found.correlations(moments(x, y)), found.rho, atol=1e-9, rtol=0)


@pytest.mark.parametrize("products", [torch.float64, torch.float32])
def test_8_the_ceiling_of_a_target_of_lower_rank_is_one(products):
    x = noise(3000, 96)
    y = x @ noise(96, 24, seed=1) @ noise(24, 96, seed=2)
    train = Moments(products=products).update({"x": x, "y": y})
    found = CanonicalCorrelations.of(train)
    assert (found.rank_x, found.rank_y) == (96, 24)
    assert float(found.ceiling()[-1]) == pytest.approx(1, abs=1e-6)
    whitened = optimal_ranks(Spectrum.of(train), metric="whitened").curve(train, train=train).r2_whitened
    assert float(whitened.max()) == pytest.approx(1, abs=1e-6)
    efficiency = whitened[24] / found.ceiling()[23]
    assert float(efficiency) <= 1 + 1e-6
    _, reference = reference_ceiling(x.numpy(), y.numpy())
    assert reference[-1] == pytest.approx(0.25, abs=0.01)


@pytest.fixture(scope="module")
def null():
    return noise(20_000, 300), noise(20_000, 300, seed=1)


def test_9_null_data_carry_nothing(null):
    size = subspace_size(folds(*null, 4))
    found = CanonicalCorrelations.of(moments(*null))
    ceiling = float(found.ceiling()[-1])
    assert ceiling == pytest.approx(300 / 20_000, rel=0.1)
    assert found.inflation == pytest.approx(300 / 19_999)
    assert float(found.ceiling(corrected=True).abs().max()) < 1e-3
    assert 0.70 <= size.dim_lin / 300 <= 0.74
    assert size.dim_lin_null / 300 == pytest.approx(size.dim_lin / 300, abs=0.01)
    assert size.wachter_count == 0
    assert size.held_out_count == 0
    assert abs(size.held_out_sum) < 0.1
    assert size.sum_rho2 == pytest.approx(size.sum_rho2_null, rel=0.02)


def test_9_a_planted_channel_is_counted_exactly(null):
    x, other = null
    y = other.clone()
    y[:, :8] += 1.4 * x[:, :8]  # rho^2 = 1.4^2 / (1 + 1.4^2) = 0.662 each
    size = subspace_size(folds(x, y, 4))
    truth = 8 * 1.96 / 2.96
    assert size.wachter_count == 8
    assert size.held_out_count == 8
    assert size.held_out_sum == pytest.approx(truth, rel=0.05)
    assert size.sum_rho2 == pytest.approx(truth + 4.4, abs=0.4)
    assert size.dim_lin > 100
    full = CanonicalCorrelations.of(moments(x, y))
    assert float(full.ceiling(corrected=True)[-1]) * 300 == pytest.approx(truth, rel=0.02)


def test_9_a_rank_8_channel_with_strong_signal_has_the_expected_size(null):
    x, other = null
    y = other.clone()
    y[:, :8] += 10 * x[:, :8]
    found = CanonicalCorrelations.of(moments(x, y))
    assert found.wachter_count == 8
    assert 11.5 <= found.sum_rho2 <= 13.0


def test_9_the_held_out_bar_is_where_chance_ends():
    """Few rows and dimensions: hardly ever a count in a hundred sets of independent data, and a correlation between once
    and twice the bar, 0.078, counts."""
    false = sum(subspace_size(folds(noise(200, 4, seed=i), noise(200, 4, seed=1000 + i), 4)).held_out_count
                for i in range(100))  # fmt: skip
    assert false <= 5
    x, y = noise(2000, 4), noise(2000, 4, seed=1)
    y[:, 0] += 0.12 * x[:, 0]  # 0.133 held out
    assert subspace_size(folds(x, y, 4)).held_out_count == 1


def test_the_null_law_has_its_known_edges_and_moments():
    assert float(null_squares(50, 50, 100_000).sum()) == pytest.approx(2500 / 99_999)
    law = null_squares(400, 400, 200_000)
    assert float(law.sqrt().sum()) ** 2 / float(law.sum()) / 400 == pytest.approx(DIM_LIN_NULL, abs=0.002)
    assert math.isclose(DIM_LIN_NULL, 0.7205, abs_tol=1e-4)
    narrow = null_squares(20, 60, 5000)
    assert len(narrow) == 20
    assert bool((narrow.diff() <= 0).all())
    found = CanonicalCorrelations.of(moments(noise(5000, 20), noise(5000, 60, seed=1))).rho.square()
    torch.testing.assert_close(narrow, found, rtol=0.15, atol=5e-4)


def test_refusals():
    x, y = activations(50, 30)
    with pytest.raises(UserError, match="need more than 61 rows; got 50"):
        CanonicalCorrelations.of(moments(x, y))
    with pytest.raises(UserError, match="y is constant, so it correlates with nothing"):
        CanonicalCorrelations.of(moments(noise(50, 3), torch.ones(50, 3)))
    with pytest.raises(UserError, match="at least two parts; got 1"):
        subspace_size([moments(x, y)])
