"""Intervals and paired tests: no estimate is reported without one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from ..errors import UserError


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval.

    >>> str(Interval(0.5, 0.25, 0.75))
    '0.500 [0.250, 0.750]'
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def as_dict(self) -> dict[str, float]:
        """The form in which metrics.json keeps it: {"value", "low", "high"}."""
        return asdict(self)


def _values(values: Any, name: str) -> np.ndarray:
    """A 1-d float64 array of finite numbers, from a list, an array or a tensor."""
    array = np.asarray(values.tolist() if hasattr(values, "tolist") else list(values), dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise UserError(f"{name} must be a non-empty list of numbers; got shape {array.shape}")
    if not np.isfinite(array).all():
        raise UserError(f"{name} has {int((~np.isfinite(array)).sum())} values that are not finite; leave them out")
    return array


def _pair(x: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    a, b = _values(x, "the first list"), _values(y, "the second list")
    if len(a) != len(b):
        raise UserError(f"paired lists must be of equal length; got {len(a)} and {len(b)}")
    return a, b


def wilson(k: int, n: int, confidence: float = 0.95) -> Interval:
    """The share k / n with Wilson's score interval, which stays inside 0 to 1.

    Arguments: `k` successes of `n` trials. Raises UserError unless 0 <= k <= n and n > 0.

    >>> str(wilson(134, 250))
    '0.536 [0.474, 0.597]'
    """
    if n <= 0 or not 0 <= k <= n:
        raise UserError(f"a rate needs 0 <= k <= n and n > 0; got k={k}, n={n}")
    found = stats.binomtest(int(k), int(n)).proportion_ci(confidence, method="wilson")
    return Interval(k / n, float(found.low), float(found.high))


def rate(passed: Sequence[bool], confidence: float = 0.95) -> Interval:
    """`wilson` of a list of verdicts."""
    return wilson(sum(map(bool, passed)), len(passed), confidence)


@dataclass(frozen=True)
class Paired:
    """Verdicts of two arms on the same prompts: how many prompts passed in which, and McNemar's exact p-value."""

    both: int
    only_a: int
    only_b: int
    neither: int
    p: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def paired(a: Sequence[bool], b: Sequence[bool]) -> Paired:
    """The exact two-sided McNemar test that a and b, verdicts on the same prompts, pass equally often, with its counts.

    Under the null, the discordant pairs split as Binomial(only_a + only_b, 1/2); no discordant pair gives p = 1.

    >>> paired([True] * 8 + [False] * 2, [False] * 10)
    Paired(both=0, only_a=8, only_b=0, neither=2, p=0.0078125)
    """
    if len(a) != len(b):
        raise UserError(f"McNemar compares the same prompts; got {len(a)} and {len(b)} verdicts")
    pairs = [(bool(x), bool(y)) for x, y in zip(a, b, strict=True)]
    both, only_a, only_b = (pairs.count(kind) for kind in ((True, True), (True, False), (False, True)))
    differ = only_a + only_b
    p = float(stats.binomtest(only_a, differ, 0.5).pvalue) if differ else 1.0
    return Paired(both, only_a, only_b, len(pairs) - both - differ, p)


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """The p-value of `paired`.

    >>> mcnemar([True] * 8 + [False] * 2, [False] * 10)
    0.0078125
    """
    return paired(a, b).p


def mean_interval(values: Any, confidence: float = 0.95) -> Interval:
    """The mean of `values` [n] with Student's t interval; a single value has an interval of no width.

    >>> mean_interval([1.0, 2.0, 3.0]).value
    2.0
    """
    x = _values(values, "values")
    mean = float(x.mean())
    if len(x) == 1:
        return Interval(mean, mean, mean)
    half = float(stats.t.ppf((1 + confidence) / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return Interval(mean, mean - half, mean + half)


def spearman(x: Any, y: Any) -> float | None:
    """Spearman's rank correlation; None where it does not exist (fewer than 3 pairs, or one side constant).

    >>> spearman([1, 2, 3, 4], [1, 4, 9, 16])
    1.0
    """
    a, b = _pair(x, y)
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return round(float(stats.spearmanr(a, b).statistic), 12)


def sign_agreement(forecast: Any, measured: Any, threshold: float = 0.2) -> float | None:
    """Among pairs with |measured| > threshold, the share whose forecast has the same sign; None where there are none.

    >>> sign_agreement([1.0, -1.0, 1.0], [0.5, 0.5, 0.1])
    0.5
    """
    a, b = _pair(forecast, measured)
    large = np.abs(b) > threshold
    return float((np.sign(a[large]) == np.sign(b[large])).mean()) if large.any() else None


def gain_share(
    base: Any, arm: Any, native: Any, *, confidence: float = 0.95, draws: int = 2000, seed: int = 0
) -> Interval | None:
    """How much of native's gain an arm reached: (mean(arm) - mean(base)) / (mean(native) - mean(base)).

    All three lists [n] are scores of the same prompts in the same order (verdicts or log-odds). The interval is the
    percentile bootstrap over prompts, resampled together; for verdicts it is widened to the share at Wilson's bounds of
    the arm's rate, since a bootstrap of verdicts that all agree has no spread. None where native gained nothing over
    base, or where its gain is so uncertain that a resample in forty loses it: such a ratio says nothing.

    >>> gain_share([0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]).value
    0.75
    """
    a, b = _pair(base, arm)
    _, c = _pair(base, native)
    gains = np.stack([b - a, c - a])  # [2, n]
    if gains[1].mean() <= 0:
        return None
    pick = np.random.default_rng(seed).integers(0, len(a), (draws, len(a)))
    top, bottom = gains[:, pick].mean(-1)  # [draws] each
    if (bottom <= 0).mean() > 0.025:
        return None
    kept = bottom > 0
    low, high = np.quantile(top[kept] / bottom[kept], [(1 - confidence) / 2, (1 + confidence) / 2])
    if np.isin(b, (0, 1)).all():
        found = wilson(int(b.sum()), len(b), confidence)
        at_low, at_high = ((bound - a.mean()) / gains[1].mean() for bound in (found.low, found.high))
        low, high = min(low, at_low), max(high, at_high)
    return Interval(float(gains[0].mean() / gains[1].mean()), float(low), float(high))
