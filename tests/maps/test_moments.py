"""Moments: batches == one shot, merged shards == one pass, total - fold == refit."""

from __future__ import annotations

import random

import pytest
import torch

from workbench.errors import UserError
from workbench.maps.moments import Moments, total


@pytest.fixture
def rows() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(700, 6, generator=g, dtype=torch.float64) + 50
    return {"x": x, "y": x @ torch.randn(6, 4, generator=g, dtype=torch.float64) - 20}


def chunks(rows, sizes):
    start = 0
    for size in sizes:
        yield {name: block[start : start + size] for name, block in rows.items()}
        start += size


def assert_same(a: Moments, b: Moments, rtol: float = 1e-12) -> None:
    assert a.n == b.n
    for p in a.names:
        torch.testing.assert_close(a.mean(p), b.mean(p), rtol=rtol, atol=0)
        for q in a.names:
            scale = float(b.cov(p, q).abs().max())
            torch.testing.assert_close(a.cov(p, q), b.cov(p, q), rtol=rtol, atol=rtol * scale)
            torch.testing.assert_close(a.raw(p, q), b.raw(p, q), rtol=rtol, atol=0)


def test_one_shot_is_the_definition(rows):
    m = Moments().update(rows)
    x, y = rows["x"], rows["y"]
    torch.testing.assert_close(m.raw("x", "y"), x.T @ y, rtol=1e-12, atol=0)
    torch.testing.assert_close(m.cov("y", "x"), (y - y.mean(0)).T @ (x - x.mean(0)), rtol=1e-10, atol=1e-9)
    assert m.names == ["x", "y"]


def test_batches_equal_one_shot(rows):
    m = Moments()
    for batch in chunks(rows, [1, 99, 0, 300, 300]):
        m.update(batch)
    assert_same(m, Moments().update(rows))


def test_shards_in_random_order_equal_one_pass(rows):
    shards = [Moments().update(batch) for batch in chunks(rows, [100] * 7)]
    random.Random(0).shuffle(shards)
    assert_same(total(shards), Moments().update(rows))


def test_total_minus_fold_equals_refit(rows):
    folds = [Moments().update(batch) for batch in chunks(rows, [140] * 5)]
    rest = total(folds[:2] + folds[3:])
    assert_same(total(folds) - folds[2], rest, rtol=1e-11)


def test_adding_does_not_change_the_summands(rows):
    a, b = (Moments().update(batch) for batch in chunks(rows, [300, 400]))
    before = a.cov("x", "y").clone()
    _ = a + b
    assert torch.equal(a.cov("x", "y"), before)
    assert a.n == 300


def test_float32_products_stay_close(rows):
    exact, fast = Moments().update(rows), Moments(products=torch.float32).update(rows)
    scale = float(exact.cov("x", "x").abs().max())
    torch.testing.assert_close(fast.cov("x", "x"), exact.cov("x", "x"), rtol=1e-5, atol=1e-6 * scale)


def test_pairs_that_were_not_kept_are_refused(rows):
    m = Moments(pairs=[]).update(rows)
    m.cov("x", "x")
    with pytest.raises(UserError, match="name the pair"):
        m.cov("x", "y")
    kept = Moments(pairs=[("y", "x")]).update(rows)
    assert kept.cov("x", "y").shape == (6, 4)


def test_save_load(rows, tmp_path):
    m = Moments().update(rows)
    m.save(tmp_path / "m.safetensors")
    assert_same(Moments.load(tmp_path / "m.safetensors"), m, rtol=0)
    assert_same(Moments.load(tmp_path / "m.safetensors") + m, m + m, rtol=0)
    with pytest.raises(UserError, match="exists already"):
        m.save(tmp_path / "m.safetensors")


def test_bad_batches_are_refused(rows):
    m = Moments().update(rows)
    with pytest.raises(UserError, match="same number of rows"):
        m.update({"x": rows["x"], "y": rows["y"][:5]})
    with pytest.raises(UserError, match="NaN or infinite"):
        m.update({"x": rows["x"] / 0, "y": rows["y"]})
    with pytest.raises(UserError, match="hold blocks"):
        m.update({"x": rows["x"]})
    with pytest.raises(UserError, match="no block 'z'"):
        m.mean("z")
    with pytest.raises(UserError, match="take 1400 rows away"):
        m - (m + m)
    assert m.n == 700
