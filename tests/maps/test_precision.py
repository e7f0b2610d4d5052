"""Products in float32: a direction that does not vary is not one that varies little, and the files say which they are."""

from __future__ import annotations

import pytest
import torch

from workbench.errors import UserError
from workbench.maps import (
    CanonicalCorrelations,
    GroupedMoments,
    Moments,
    Spectrum,
    Whitener,
    fit_map,
    fit_pair,
    partial_least_squares,
    score_map,
)
from workbench.maps.similarity import svcca

from .example_rows import noise

F32, F64 = torch.float32, torch.float64
both = pytest.mark.parametrize("products", [F64, F32])


def of_rank(n: int, d: int, r: int, seed: int = 0) -> torch.Tensor:
    return noise(n, r, seed=seed) @ noise(r, d, seed=seed + 1) / r**0.5


@both
@pytest.mark.parametrize("batch", [500, 9000])
def test_a_rank_is_the_datas_whatever_the_precision_and_the_batch(products, batch):
    x = of_rank(9000, 64, 20)
    y = x @ noise(64, 48, seed=5)
    found = Moments(products=products)
    for start in range(0, len(x), batch):
        found.update({"x": x[start : start + batch], "y": y[start : start + batch]})
    cca = CanonicalCorrelations.of(found)
    assert (cca.rank_x, cca.rank_y) == (20, 20)
    assert float(cca.ceiling()[-1]) == pytest.approx(1, abs=1e-6)
    assert Whitener.of_block(found, "y").rank == 20
    assert Spectrum.of(found).rank == 20
    assert svcca(found, variance=1.0) == pytest.approx(1, abs=1e-6)


@both
def test_whitened_r2_of_an_exact_map_is_one(products):
    x = noise(6000, 64)
    y = x @ of_rank(64, 48, 12)
    train, held = (Moments(products=products).update({"x": x[s], "y": y[s]}) for s in (slice(4000), slice(4000, None)))
    fitted = fit_map([train], "lstsq").map
    assert score_map(fitted, held, train=train).r2_whitened == pytest.approx(1, abs=1e-5)


@both
def test_least_squares_of_a_source_of_lower_rank_have_the_least_norm(products):
    x = of_rank(4000, 64, 20)
    y = x[:, :8] + 0.1 * noise(4000, 8, seed=9)
    known = torch.linalg.pinv(x - x.mean(0), rtol=1e-9) @ (y - y.mean(0))
    found = fit_map([Moments(products=products).update({"x": x, "y": y})], "lstsq", dtype=F64).map.weight
    assert float((found - known).norm() / known.norm()) < 1e-4


@both
def test_pls_finds_no_more_components_than_there_are(products):
    x = of_rank(4000, 40, 3)
    train = Moments(products=products).update({"x": x, "y": x @ noise(40, 6, seed=7)})
    assert partial_least_squares(train, components=10).highest == 3


def test_pls_of_nothing_but_rounding_is_refused():
    x = noise(4000, 5) * torch.tensor([1.0, 1.0, 1.0, 1.0, 1e-4], dtype=F64)
    x = x - x.mean(0)
    x[:, :4] -= x[:, 4:] @ torch.linalg.lstsq(x[:, 4:], x[:, :4]).solution  # what y is made of varies with nothing else
    with pytest.raises(UserError, match="too small for products in float32: use ridge"):
        partial_least_squares(Moments(products=F32).update({"x": x, "y": x[:, 4:]}), components=1)


@both
def test_a_cycle_without_penalty_is_fitted_where_a_side_has_fewer_directions(products):
    x = of_rank(3000, 40, 5)
    y = x @ torch.linalg.qr(noise(40, 40, seed=3)).Q
    found = fit_pair(Moments(products=products).update({"x": x, "y": y}), alpha=0.0, max_iterations=5)
    assert float((found.back(found.there(x.float())) - x).norm() / x.norm()) < 1e-2


def test_a_penalised_map_keeps_the_directions_that_least_squares_leave_out():
    x = noise(4000, 10) * torch.tensor([1.0] * 9 + [2e-4], dtype=F64)
    y = x @ noise(10, 4, seed=2)
    spectrum = Spectrum.of(Moments(products=F32).update({"x": x, "y": y}))
    assert spectrum.rank == 9
    assert int((spectrum.gain(0.0) > 0).sum()) == 9
    assert int((spectrum.gain(1e-9 * spectrum.unit) > 0).sum()) == 10


@both
def test_a_column_that_stands_still_far_from_the_shift_does_not_vary(products):
    rows = {"x": noise(9000, 3).to(F32), "y": noise(9000, 2, seed=1).to(F32)}
    rows["y"][:, 1] = 4.9
    shift = {"x": torch.zeros(3), "y": torch.full((2,), 0.1)}
    held = Moments(products=products, shift=shift).update(rows)
    score = score_map(fit_map([held], "ridge", alpha=0.1).map, held)
    assert torch.isnan(score.per_output).tolist() == [False, True]


def test_massive_rows_of_one_group_cost_the_others_no_digits():
    x = noise(4000, 4).to(F32)
    first = torch.arange(4000) % 20 == 0
    x[first, 0] += 1e4
    grouped = GroupedMoments("kind", products=F32).update({"x": x}, kind=["bos" if at else "word" for at in first])
    known = Moments().update({"x": x[~first]})
    torch.testing.assert_close(grouped.total(kind="word").squares("x"), known.squares("x"), rtol=1e-5, atol=0)


def test_a_sum_has_the_lower_precision(tmp_path):
    rows = {"x": noise(50, 3)}
    fine, coarse = Moments().update(rows), Moments(products=F32).update(rows)
    for found in (fine + coarse, coarse + fine, (fine + coarse) - fine, Moments() + coarse):
        assert found.products == F32
    assert (fine + fine).products == F64
    a, b = (GroupedMoments("fold", products=p).update(rows, fold=i) for i, p in enumerate((F64, F32)))
    assert (a + b).total().products == F32
    assert (a + b).update(rows, fold=2).total(fold=2).products == F32
    (a + b).save(tmp_path / "m")
    assert GroupedMoments.load(tmp_path / "m").update(rows, fold=2).total(fold=2).products == F32


@both
def test_what_the_products_were_made_in_is_saved(products, tmp_path):
    Moments(products=products).update({"x": noise(50, 3)}).save(tmp_path / "m.safetensors")
    assert Moments.load(tmp_path / "m.safetensors").products == products


def test_files_that_do_not_say_it_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("workbench.maps.moment_files.VERSION", 1)
    Moments().update({"x": noise(5, 2)}).save(tmp_path / "m.safetensors")
    monkeypatch.undo()
    with pytest.raises(UserError, match="moments of version 1; this release reads version 2: make it again"):
        Moments.load(tmp_path / "m.safetensors")
