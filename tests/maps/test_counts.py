"""FLOPs of moments, fits and folds are those that are counted while they run; decompositions are counted by nobody."""

from __future__ import annotations

import pytest
import torch

from workbench.adapters.adapter import LowRank
from workbench.maps import Moments, counts
from workbench.maps.fit import fit_procrustes
from workbench.maps.linear_map import LinearMap
from workbench.maps.reduced_rank import optimal_ranks
from workbench.maps.ridge import fit_ridge_targets
from workbench.maps.solver import Solver
from workbench.maps.spectrum import Spectrum
from workbench.paste import fold_gram, fold_part

from ..work.counting import counted

N, D, E = 700, 300, 40  # D is wider than one strip of a symmetric product


def rows(n: int, *widths: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, d, generator=g) for d in widths]


@pytest.mark.parametrize("pairs", [None, [], [(0, 1)], [(1, 0), (0, 2), (2, 2)]])
def test_moments(pairs):
    x, y, z = rows(N, D, E, D)
    named = None if pairs is None else [("abc"[i], "abc"[j]) for i, j in pairs]
    moments = Moments(pairs=named, products=torch.float32)
    found = counted(lambda: moments.update({"a": x, "b": y, "c": z}))
    assert found == counts.moments_flops(N, [D, E, D], pairs)


@pytest.mark.parametrize(("alpha", "folds"), [("cv", 3), ("gcv", 0), (0.1, 0)])
def test_ridge(alpha, folds):
    x, y, z = rows(900, D, E, D)
    parts = [Moments().update({"x": x[i::3], "y": y[i::3], "z": z[i::3]}) for i in range(3)]
    alphas = [0.1, 1.0, 10.0]
    found = counted(lambda: fit_ridge_targets(parts, "x", ["y", "z"], alpha=alpha, alphas=alphas))
    expected = counts.ridge_flops(D, [E, D], alphas=3, folds=folds) - (1 + folds) * counts.eigh_flops(D)
    assert found == pytest.approx(expected, rel=0.002)  # beside it biases and means, a vector each


def test_procrustes_and_reduced_rank():
    x, y = rows(N, D, E)
    assert counted(lambda: fit_procrustes(x, y)) == pytest.approx(
        counts.procrustes_flops(N, D, E) - counts.svd_flops(D, E), rel=1e-9
    )
    moments = Moments().update({"x": x, "y": y})
    found = counted(lambda: optimal_ranks(Spectrum.of(moments, "x"), "y").map(7))
    expected = counts.reduced_rank_flops(D, E, 7) - counts.eigh_flops(D) - counts.eigh_flops(E)
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [60, 500])
def test_factors_and_folds(n):
    recipient, donor, rank = D, 90, 4
    x, y = rows(n, recipient, donor)
    part = LowRank(torch.randn(donor, rank), torch.randn(rank), torch.randn(rank, donor))
    small = sum(counts.eigh_flops(min(n, d)) for d in (recipient, donor))
    found = counted(lambda: (Solver.factor(x), Solver.factor(y)))
    assert found == counts.factor_flops(n, recipient) + counts.factor_flops(n, donor) - small
    ours, theirs = Solver.factor(x, centre=False), Solver.factor(y, centre=False)
    assert ours.q.shape[0] == recipient

    def solved() -> None:
        ours.coefficients(y @ part.V, 0.1)
        theirs.project(part.U, x, 0.1)

    assert counted(solved) == counts.solver_fold_flops(n, recipient, donor, rank)
    whole = counts.gram_fold_flops(n, recipient, donor, rank)
    found = counted(lambda: fold_gram(part, x, y))
    if n < donor:  # the products; solves and factors are not counted
        left = 2 * (counts.cholesky_flops(n) + 2 * counts.product_flops(n, n, rank))
        assert whole - left <= found <= 1.02 * (whole - left)  # an estimate of the smallest eigenvalue beside them
    else:
        assert found == pytest.approx(whole - small, rel=1e-9)


def test_a_fold_through_maps_that_are_there():
    part = LowRank(torch.randn(50, 4), torch.randn(4), torch.randn(4, 50))
    there, back = LinearMap.zeros(70, 50), LinearMap.zeros(50, 70)
    assert counted(lambda: fold_part(part, there, back)) == counts.formed_fold_flops(70, 50, 4)


def test_forming_pseudo_inverses_costs_what_the_gram_saves():
    formed = counts.pinv_flops(1030, 4096, 3072) + counts.pinv_flops(1030, 3072, 4096)
    assert formed > 5 * counts.gram_fold_flops(1030, 4096, 3072, 8)


def test_one_strip_is_the_whole_product_and_a_gpu_has_longer_ones():
    assert counts.symmetric_flops(600, 10, "cuda") == counts.product_flops(600, 10, 600)
    assert counts.symmetric_flops(600, 10) < counts.product_flops(600, 10, 600)
