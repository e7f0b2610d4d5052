"""The benchmarks of pasting run on a small shape, and what they compare is equal; times are for their tables alone."""

from __future__ import annotations

import pytest

from .cells_bench import auroc
from .cells_bench import run as run_cells
from .paste_bench import folding, generation
from .tables import _tell_cells, _tell_paste


def test_the_fold_through_the_gram_is_that_of_dense_pseudo_inverses(tmp_path):
    found = folding(tmp_path, n=40, widths=(96, 64), layers=2)
    assert found["difference"] <= 1e-5
    assert found["bytes_int8"] < found["bytes_bf16"] < found["bytes"]
    ran = generation(width=32, layers=2, heads=2, tokens=3, batch=2, repeats=1)
    assert "converting at each step" in _tell_paste({"fold": found, "generation": ran})


def test_auroc_is_the_chance_of_the_right_order():
    assert auroc([0.1, 0.4, 0.35, 0.8], [False, False, True, True]) == pytest.approx(0.75)
    assert auroc([1.0, 2.0], [True, True]) is None


@pytest.mark.slow
def test_cells_are_measured_both_ways_and_told():
    found = run_cells(sizes=(32,), converters=("pinv", "ridge:0.1"), steps=1, evaluated=8, generate=False)
    assert {c["cells"] for c in found["forecast"]} >= {"all", "one layer", "several layers", "pinv"}
    assert len(found["cells"]) == 2 * 3 * 2 * 2 * 2  # directions, behaviours, kinds, pairings, converters
    assert [(r["kind"], r["arm"]) for r in found["damage"]][:3] == [
        ("one", arm) for arm in ("default", "best", "native")
    ]
    assert "The default beside the best cell" in _tell_cells(found)
