"""The factorised solver against the formulas that it stands for."""

import pytest
import torch

from workbench.errors import UserError
from workbench.maps.quality import mahalanobis
from workbench.maps.solver import Solver


def rows(n, d, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g, dtype=torch.float64) @ torch.randn(d, d, generator=g, dtype=torch.float64)


@pytest.mark.parametrize(("n", "d"), [(200, 12), (9, 30)])
def test_lengths_equal_mahalanobis_in_the_covariance(n, d):
    x, delta = rows(n, d), rows(5, d, seed=1)
    torch.testing.assert_close(Solver.factor(x).length(delta), mahalanobis(delta, x.T.cov()), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("n", "d"), [(50, 8), (6, 20)])
def test_without_a_penalty_and_uncentred_it_is_the_pseudo_inverse(n, d):
    x, y = rows(n, d), rows(n, 7, seed=2)
    wanted = torch.linalg.pinv(x) @ y[:, :7]
    torch.testing.assert_close(Solver.factor(x, centre=False).coefficients(y, 0.0), wanted, rtol=1e-6, atol=1e-8)
    u = rows(3, d, seed=3)
    torch.testing.assert_close(Solver.factor(x, centre=False).project(u, y, 0.0), u @ wanted, rtol=1e-6, atol=1e-8)


def test_a_relative_cut_drops_small_directions():
    x = rows(40, 6) @ torch.diag(torch.tensor([1.0, 1, 1, 1, 1, 1e-6], dtype=torch.float64))
    assert len(Solver.factor(x, centre=False).s) == 6
    assert len(Solver.factor(x, centre=False, rtol=1e-4).s) == 5


def test_rows_that_do_not_vary_or_are_not_finite_are_refused():
    with pytest.raises(UserError, match="do not vary"):
        Solver.factor(torch.ones(5, 3))
    with pytest.raises(UserError, match="NaN"):
        Solver.factor(torch.full((5, 3), float("nan")))
