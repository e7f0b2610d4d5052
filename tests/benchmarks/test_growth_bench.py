"""The benchmark of growth runs, on little, and its page is told; its figures are for its table alone."""

from __future__ import annotations

import pytest

from .growth_bench import SIZES, TINY, run
from .tables import SECTIONS
from .timing import growth, slope


def test_growth_is_measured_and_told(tmp_path):
    assert set(TINY) == set(SIZES)
    found = run(tmp_path, TINY, repeats=1)
    assert len(found["lines"]) == 18
    assert {line["by"] for line in found["lines"]} == {"rows", "width", "layers", "targets"}
    for line in found["lines"]:
        if line["by"] in ("rows", "layers") and not line["what"].startswith(("fit", "fold", "moments")):
            assert line["counted"] == pytest.approx(1, abs=0.05)
    said = SECTIONS["growth"].tell(found)
    assert "| fit, GCV | width | 3 |" in said


def test_the_slope_of_a_power_is_its_exponent():
    found, half = slope([1, 10, 100, 1000], [2, 200, 20_000, 2_000_000])
    assert found == pytest.approx(2)
    assert half == pytest.approx(0, abs=1e-6)


def test_work_that_does_not_grow_has_slope_0():
    line = growth("x", "rows", 0, (1, 2, 4), lambda size: (lambda: None, 1.0), repeats=1)
    assert line["counted"] == 0
