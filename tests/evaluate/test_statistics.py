from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import UserError
from workbench.evaluate.statistics import (
    Interval,
    gain_share,
    mcnemar,
    mean_interval,
    rate,
    sign_agreement,
    spearman,
    wilson,
)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@settings(max_examples=50, deadline=None)
def test_wilson_is_its_own_formula_and_stays_inside(kn):
    k, n = kn
    found, z, p = wilson(k, n), 1.959963984540054, k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert found.value == p
    assert found.low == pytest.approx(max(0, centre - half), abs=1e-9)
    assert found.high == pytest.approx(min(1, centre + half), abs=1e-9)
    assert 0 <= found.low <= found.high <= 1


def test_wilson_of_the_published_rate():
    found = wilson(134, 250)  # the spec states 47.4 to 59.7 %
    assert (round(100 * found.low, 1), round(100 * found.high, 1)) == (47.4, 59.7)
    assert rate([True] * 134 + [False] * 116) == found


def test_mcnemar_is_the_exact_binomial_and_symmetric():
    a, b = [True] * 6 + [False] * 4, [False] * 5 + [True] * 2 + [False] * 3
    # 5 prompts pass only in a, 1 only in b: two-sided Binomial(6, 1/2) has P(<=1) * 2
    assert mcnemar(a, b) == pytest.approx(2 * (1 + 6) / 64)
    assert mcnemar(b, a) == mcnemar(a, b)
    assert mcnemar(a, a) == 1.0


def test_mean_interval_covers_the_truth_at_its_rate():
    draws = np.random.default_rng(0).normal(3, 2, (600, 12))
    hits = [(i := mean_interval(row)).low <= 3 <= i.high for row in draws]
    assert 0.92 < np.mean(hits) < 0.98
    assert mean_interval([2.0]) == Interval(2.0, 2.0, 2.0)


def test_spearman_knows_order_only():
    assert spearman([1, 2, 3], [10, 100, 1000]) == 1
    assert spearman([1, 2, 3], [3, 2, 1]) == -1
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    assert spearman([1, 2], [1, 2]) is None


def test_sign_agreement_leaves_out_the_small():
    assert sign_agreement([1, -1, -1], [1, -1, 0.01]) == 1
    assert sign_agreement([1, 1], [0.0, 0.1]) is None


def test_gain_share_of_planted_gains():
    rng = np.random.default_rng(0)
    base = rng.normal(size=300)
    native, arm = base + 2 + 0.3 * rng.normal(size=300), base + 1 + 0.3 * rng.normal(size=300)
    share = gain_share(base, arm, native)
    assert share is not None
    assert share.low < 0.5 < share.high
    assert share.high - share.low < 0.1
    assert gain_share(base, native, native) == Interval(1.0, 1.0, 1.0)
    control = gain_share(base, base, native)
    assert control is not None
    assert control.value == 0
    assert gain_share(base, arm, native) == share  # seeded


def test_gain_share_is_none_without_a_gain_of_native():
    rng = np.random.default_rng(1)
    base, arm = rng.normal(size=50), rng.normal(size=50)
    assert gain_share(base, arm, base) is None
    assert gain_share(base, arm, base - 1) is None
    assert gain_share(base, arm, base + 0.01 + rng.normal(size=50)) is None


def test_intervals_narrow_with_n():
    widths = [(i := wilson(n // 2, n)).high - i.low for n in (20, 200, 2000)]
    assert all(a > b for a, b in pairwise(widths))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: wilson(3, 2), "k=3, n=2"),
        (lambda: wilson(0, 0), "n > 0"),
        (lambda: mcnemar([True], [True, False]), "1 and 2"),
        (lambda: mean_interval([]), "non-empty"),
        (lambda: mean_interval([1.0, float("nan")]), "not finite"),
        (lambda: spearman([1, 2, 3], [1, 2]), "3 and 2"),
    ],
)
def test_bad_input_names_the_value(call, says):
    with pytest.raises(UserError, match=says):
        call()
