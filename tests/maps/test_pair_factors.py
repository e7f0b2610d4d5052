"""Converters solved in the coordinates of two factorised sides, against the fitters of rows and moments."""

import pytest
import torch

from workbench.errors import UserError
from workbench.maps import Moments, fit_map, fit_pair, fit_procrustes, fit_ridge, partial_least_squares
from workbench.maps.autoencoder import fit_autoencoder
from workbench.maps.pair_factors import PairFactors
from workbench.maps.quality import quality, r2
from workbench.maps.similarity import debiased_cka, svcca
from workbench.maps.solver import Solver


def rows(n: int, dx: int, dy: int, noise: float = 0.1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, min(dx, dy), generator=g)
    x, y = (z @ torch.randn(z.shape[1], d, generator=g) + noise * torch.randn(n, d, generator=g) + 1 for d in (dx, dy))
    return x, y


def factors(x: torch.Tensor, y: torch.Tensor) -> PairFactors:
    return PairFactors.of_rows(Solver.factor(x), Solver.factor(y))


@pytest.fixture(scope="module")
def many():
    return rows(120, 12, 9)


def close(a, b):
    torch.testing.assert_close(a.weight.double(), b.weight.double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.bias.double(), b.bias.double(), rtol=1e-4, atol=1e-4)


def test_each_kind_equals_its_fitter_where_rows_are_many(many):
    x, y = many
    pair, moments = factors(x, y), Moments().update({"x": x, "y": y})
    for cores, there, back in (
        (pair.ridge(0.1), fit_ridge(x, y, alpha=0.1).map, fit_ridge(y, x, alpha=0.1).map),
        (pair.procrustes(), fit_procrustes(x, y), fit_procrustes(y, x)),
        (pair.reduced_rank(3, 0.1), *(fit_map([moments], "reduced_rank", rank=3, alpha=0.1, source=a, target=b).map
                                      for a, b in ("xy", "yx"))),
        (pair.pls(4), *(partial_least_squares(moments, a, b, components=4).map(4) for a, b in ("xy", "yx"))),
        *((cores, fit.there, fit.back) for cores, fit in (
            (pair.whitened(), fit_pair(moments, "whitened")),
            (pair.cycle(1.0), fit_pair(moments, "cycle", alpha=0.1, tolerance=1e-6, max_iterations=200)))),
    ):  # fmt: skip
        made = pair.maps(cores)
        close(made[0], there)
        close(made[1], back)


def test_sums_in_place_of_rows_give_the_same_factors(many):
    x, y = many
    m = Moments().update({"x": x[:50], "y": y[:50]}).update({"x": x[50:], "y": y[50:]})
    sides = (Solver.of_products(m.cov(name, name), m.mean(name), m.n) for name in "xy")
    summed, kept = PairFactors.of_cross(*sides, m.cov("x", "y")), factors(x, y)
    for a, b in zip(summed.maps(summed.reduced_rank(3)), kept.maps(kept.reduced_rank(3)), strict=True):
        close(a, b)


def test_with_fewer_rows_than_columns_ridge_is_ridge_and_nothing_leaves_the_span():
    x, y = rows(20, 50, 40)
    pair = factors(x, y)
    close(pair.maps(pair.ridge(0.1))[0], fit_ridge(x, y, alpha=0.1).map)
    outside = torch.linalg.qr(torch.cat([x - x.mean(0), torch.eye(50)[:30]]).T).Q[:, -20:].double()
    for cores in (pair.procrustes(), pair.reduced_rank(4), pair.pls(64), pair.whitened(), pair.cycle(1.0)):
        weight = pair.maps(cores)[0].weight.double()
        assert (outside.T @ weight).norm() < 1e-4 * weight.norm()


def test_a_rotation_is_recovered_and_its_way_back_undoes_it():
    x, _ = rows(90, 8, 8)
    q = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(3))).Q
    pair = factors(x, x @ q)
    there, back = pair.maps(pair.procrustes())
    torch.testing.assert_close(there.weight, q, rtol=0, atol=1e-6)
    torch.testing.assert_close(back(there(x)), x, rtol=1e-4, atol=1e-4)


def test_reading_and_writing_equal_the_maps(many):
    pair = factors(*many)
    cores = pair.cycle(0.5)
    there, back = pair.maps(cores)
    g = torch.Generator().manual_seed(0)
    v, u = torch.randn(9, 2, generator=g), torch.randn(2, 9, generator=g)
    torch.testing.assert_close(pair.read(cores.there, v).float(), there.weight @ v, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pair.write(cores.back, u).float(), u @ back.weight, rtol=1e-4, atol=1e-5)


def test_likeness_is_that_of_the_rows(many):
    x, y = many
    pair, m = factors(x, y), Moments().update({"x": x, "y": y})
    lengths = tuple((r.double() - r.double().mean(0)).square().sum(1) for r in (x, y))
    assert pair.cka(lengths) == pytest.approx(debiased_cka(m, [{"x": x, "y": y}]), abs=1e-6)
    assert pair.svcca() == pytest.approx(svcca(m), abs=1e-6)
    noise = torch.randn(120, 9, generator=torch.Generator().manual_seed(7))
    pair = factors(x, noise)
    apart = pair.cka((lengths[0], (noise.double() - noise.double().mean(0)).square().sum(1)))
    assert abs(apart) < 0.1 < pair.svcca()  # the debiased one alone says that they are not alike


def test_a_rank_below_one_is_refused(many):
    with pytest.raises(UserError, match="must be 1 or more; got 0"):
        factors(*many).reduced_rank(0)


def test_a_relu_net_learns_what_no_linear_map_can_and_is_the_same_twice():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(800, 4, generator=g)
    y = x.abs()
    made, again = (fit_autoencoder(x[:600], y[:600], hidden=64, steps=600, seed=1) for _ in range(2))
    assert torch.equal(made.read, again.read)
    linear = fit_ridge(x[:600], y[:600], alpha=0.01).map
    assert r2(y[600:], made(x[600:])).weighted > 0.9 > 0.2 > r2(y[600:], linear(x[600:])).weighted
    scored = quality(made, x[600:], y[600:], back=made)
    assert (scored.n, scored.d, scored.rank, scored.as_dict()["condition"]) == (600, 4, 4, None)


def test_a_relu_net_refuses_rows_that_do_not_pair_and_constants():
    with pytest.raises(UserError, match="pair row by row"):
        fit_autoencoder(torch.randn(5, 2), torch.randn(4, 2))
    with pytest.raises(UserError, match="constant"):
        fit_autoencoder(torch.randn(5, 2), torch.ones(5, 2))


@pytest.mark.parametrize("n", [400, 30])
def test_gcv_chooses_as_its_formula_does(n):
    """n RSS / (n - tr H)^2 from the hat matrix, the mean among its degrees of freedom; also of fewer rows than columns."""
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, 40, generator=g, dtype=torch.float64) * torch.logspace(0, -1.5, 40, dtype=torch.float64)
    y = x @ torch.randn(40, 5, generator=g, dtype=torch.float64) + 2 * torch.randn(
        n, 5, generator=g, dtype=torch.float64
    )
    alphas, scores = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0), []
    centred = x - x.mean(0)
    unit = float(centred.square().sum() / 40)
    for alpha in alphas:
        hat = 1 / n + centred @ torch.linalg.solve(
            centred.T @ centred + alpha * unit * torch.eye(40).double(), centred.T
        )
        scores.append(float(n * (y - hat @ y).square().sum() / (n - hat.trace()) ** 2))
    pair = PairFactors.of_rows(Solver.factor(x), Solver.factor(y))
    assert pair.gcv_alpha(alphas) == alphas[scores.index(min(scores))]


def test_gcv_without_a_degree_of_freedom_is_refused():
    x = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    pair = PairFactors.of_rows(Solver.factor(x), Solver.factor(2 * x))
    with pytest.raises(UserError, match="6 rows leave no degree of freedom to choose a ridge strength by"):
        pair.gcv_alpha([0.0])
