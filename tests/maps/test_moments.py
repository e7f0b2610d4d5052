"""Moments: batches == one shot, merged shards == one pass, total - fold == refit."""

from __future__ import annotations

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from workbench.errors import UserError
from workbench.maps.moments import Moments, total
from workbench.maps.symmetric import symmetric_product


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_products_of_narrow_rows_are_those_of_numpy_in_float64(dtype):
    g = torch.Generator().manual_seed(1)
    rows = {
        "x": (torch.randn(900, 5, generator=g) * 3 + 200).to(dtype),
        "y": torch.randn(900, 4, generator=g).to(dtype),
    }
    fast = Moments(products=torch.float32)
    for batch in chunks(rows, [100, 500, 300]):
        fast.update(batch)
    x, y = (rows[name].double().numpy() for name in ("x", "y"))
    torch.testing.assert_close(fast.mean("x").numpy(), x.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(fast.mean("y").numpy(), y.mean(0), rtol=0, atol=1e-13)
    for a, b, name in ((x, x, "xx"), (x, y, "xy")):
        exact = torch.from_numpy((a - a.mean(0)).T @ (b - b.mean(0)))
        found = fast.cov(*name)
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=2e-6 * float(exact.abs().max()))


def test_no_product_is_made_in_tf32(rows, monkeypatch):
    """Whatever the process is set to, which it is again afterwards; a CPU's products with themselves are not torch's."""
    monkeypatch.setattr("workbench.maps.moments.gram", lambda x, room: symmetric_product(x.T, x))

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "mm" in func.__name__ or "matmul" in func.__name__:
                precisions.append(torch.get_float32_matmul_precision())
            return func(*args, **(kwargs or {}))

    precisions: list[str] = []
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with Seen():
            Moments(products=torch.float32).update({name: block.float() for name, block in rows.items()})
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(precisions) >= 3
    assert set(precisions) == {"highest"}


def test_float32_shards_add_up_and_move_between_devices(rows):
    narrow = {name: block.float() for name, block in rows.items()}
    shards = [Moments(products=torch.float32).update(batch) for batch in chunks(narrow, [100] * 7)]
    exact = Moments().update(narrow)
    scale = float(exact.cov("x", "x").abs().max())
    torch.testing.assert_close(total(shards).cov("x", "x"), exact.cov("x", "x"), rtol=1e-5, atol=1e-6 * scale)
    assert_same(shards[0].to("cpu"), shards[0], rtol=0)


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


def test_a_selection_holds_the_same_and_copies_nothing(rows):
    m = Moments().update({**rows, "z": rows["y"] ** 2})
    part = m.select([("y", "x")])
    assert part.names == ["x", "y"]
    assert part.product["x", "y"] is m.product["x", "y"]
    assert torch.equal(part.cov("y", "x"), m.cov("y", "x"))
    with pytest.raises(UserError, match="no block 'w'"):
        m.select([("x", "w")])
    with pytest.raises(UserError, match="name the pair"):
        Moments(pairs=[]).update(rows).select([("x", "y")])


def test_a_given_shift_is_kept_and_changes_nothing_else(rows):
    shift = {name: torch.full((block.shape[1],), 3.0) for name, block in rows.items()}
    m = Moments(shift=shift).update(rows)
    assert torch.equal(m.shift["x"], shift["x"].double())
    assert_same(m, Moments().update(rows), rtol=1e-9)
    assert_same(m.to("cpu"), m, rtol=0)


def test_where_they_are_from_is_saved_with_them(rows, tmp_path):
    m = Moments().update(rows)
    m.save(tmp_path / "m.safetensors", meta={"model": "tiny", "folds": 5})
    assert Moments.load(tmp_path / "m.safetensors").meta == {"model": "tiny", "folds": 5}
    assert (m + m).meta == {}
