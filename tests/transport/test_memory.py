"""What a grid holds at once is no more than what its passes were planned for."""

from __future__ import annotations

import gc

import pytest

import workbench.maps.ridge as ridge
from workbench.errors import UserError
from workbench.maps.moments import Moments
from workbench.transport import transport_grid
from workbench.transport.pairs import moment_sets, site_pairs
from workbench.transport.rows import StoreRows
from workbench.transport.sums import plan_sums

from .streams import stream, write_stream


def held() -> int:
    """Bytes of the products of all moments that are alive, what they share counted once."""
    tables = [p.untyped_storage() for m in gc.get_objects() if type(m) is Moments for p in m.product.values()]
    return sum({table.data_ptr(): table.nbytes() for table in tables}.values())


@pytest.mark.parametrize("start", [0, 1])  # with position 0 and without
def test_a_plan_holds_for_what_is_really_held(tmp_path, monkeypatch, start):
    store = write_stream(tmp_path / "s", stream(n=3000, d=32, layers=4), 20, start=start)
    peak, plain, before = 0, ridge.fold_scores, held()

    def watched(*args, **options):
        nonlocal peak
        peak = max(peak, held() - before)
        return plain(*args, **options)

    monkeypatch.setattr(ridge, "fold_scores", watched)
    assert transport_grid(store).meta["passes"] == 1
    rows = StoreRows(store)
    pairs = site_pairs(rows.every_site)

    def one_pass(memory: int) -> bool:
        copies = moment_sets(5, 10, first=not start)
        try:
            return len(plan_sums(rows, pairs, positions="same", control=True, copies=copies, memory=memory)) == 1
        except UserError:
            return False

    low, high = 1, 1 << 30
    while high - low > 1000:
        middle = (low + high) // 2
        low, high = (low, middle) if one_pass(middle) else (middle, high)
    assert 0.5 * high < peak <= high
