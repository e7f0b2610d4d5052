"""How well a probe does on rows that it has not seen: accuracy, AUROC, calibration, each with an interval over prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from workbench.errors import UserError
from workbench.evaluate.statistics import Interval, wilson

DRAWS = 200
CELLS = 1 << 22  # draws x rows of one step
BINS = 10


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Figures over held-out rows, 95 % intervals by resampling whole groups (prompts); NaN where a figure does not exist.

    Of classes: accuracy, auroc (of several classes the mean of each against all others), brier and ece. Of a quantity: r2
    (about the mean of the training rows) and mae. `chance` is what the commonest class of the training rows would have
    (of a quantity: 0, the R2 of the training mean).
    """

    n: int
    n_groups: int
    chance: float
    accuracy: Interval
    auroc: Interval
    brier: Interval
    r2: Interval
    ece: float = float("nan")
    mae: float = float("nan")
    confusion: Int64[np.ndarray, "k k"] = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int64), repr=False)
    """[true, predicted] rows"""
    reliability: tuple[tuple[float, float, int], ...] = field(default=(), repr=False)
    """(mean confidence, share that was right, rows) of each of 10 bins of the confidence that holds a row"""
    draws: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False)
    """the headline figure of each resample: two probes of the same rows are compared draw by draw"""

    @property
    def headline(self) -> Interval:
        """R2 of a quantity; else the accuracy."""
        return self.r2 if np.isfinite(self.r2.value) else self.accuracy

    def line(self, prefix: str = "") -> dict[str, Any]:
        """One line of a table."""
        out: dict[str, Any] = {}
        for name in ("r2",) if np.isfinite(self.r2.value) else ("accuracy", "auroc", "brier"):
            found: Interval = getattr(self, name)
            out |= {prefix + name: found.value, f"{prefix}{name}_low": found.low, f"{prefix}{name}_high": found.high}
        return out | ({prefix + "mae": self.mae} if np.isfinite(self.r2.value) else {prefix + "ece": self.ece})


NONE = Interval(float("nan"), float("nan"), float("nan"))


def class_scores(
    probabilities: Float[np.ndarray, "n k"], y: Int64[np.ndarray, " n"], groups: Int64[np.ndarray, " n"],
    chance: float = float("nan"), *, seed: int = 0,
) -> HeldOut:  # fmt: skip
    """The figures of predicted probabilities of k classes.

    >>> sure = np.array([[0.9, 0.1], [0.2, 0.8]])
    >>> found = class_scores(sure, np.array([0, 1]), np.array([0, 1]))
    >>> found.accuracy.value, found.auroc.value, round(found.brier.value, 3)
    (1.0, 1.0, 0.025)
    """
    if not len(y):
        raise UserError("there are no held-out rows to score a probe on")
    k = probabilities.shape[1]
    said = probabilities.argmax(1)
    right = (said == y).astype(np.float64)
    error = ((probabilities - np.eye(k)[y]) ** 2).sum(1) / (2 if k == 2 else 1)  # of two classes, that of the second
    numbers, weights = _resamples(groups, seed)
    accuracy = _means(right, numbers, weights)
    bars = probabilities[:, 1:] if k == 2 else probabilities
    aucs = [(j, auroc(bars[:, j], y == (j + 1 if k == 2 else j), numbers, weights)) for j in range(bars.shape[1])]
    known = [values for _, values in aucs if np.isfinite(values[0])]
    auc = _mean_of_known(np.stack(known)) if known else np.full(DRAWS + 1, np.nan)
    n_groups = len(weights[0])
    confidence = probabilities.max(1)
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    table = tuple((float(confidence[bins == b].mean()), float(right[bins == b].mean()), int((bins == b).sum()))
                  for b in range(BINS) if (bins == b).any())  # fmt: skip
    ece = sum(abs(c - a) * count for c, a, count in table) / len(y)
    confusion = np.zeros((k, k), dtype=np.int64)
    np.add.at(confusion, (y, said), 1)
    return HeldOut(len(y), n_groups, chance, _share(accuracy, n_groups), _share(auc, n_groups),
                   _interval(_means(error, numbers, weights)), NONE, float(ece), confusion=confusion, reliability=table,
                   draws=accuracy[1:])  # fmt: skip


def quantity_scores(
    predicted: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], groups: Int64[np.ndarray, " n"], mean: float,
    *, seed: int = 0,
) -> HeldOut:  # fmt: skip
    """R2 about `mean` (of the training rows) and the mean absolute error."""
    if not len(y):
        raise UserError("there are no held-out rows to score a probe on")
    numbers, weights = _resamples(groups, seed)
    top, bottom = (_means(v, numbers, weights) for v in ((y - predicted) ** 2, (y - mean) ** 2))
    r2 = 1 - top / np.where(bottom > 0, bottom, np.nan)
    mae = float(np.abs(y - predicted).mean())
    return HeldOut(len(y), len(weights[0]), 0.0, NONE, NONE, NONE, _interval(r2), mae=mae, draws=r2[1:])


def difference(a: HeldOut, b: HeldOut) -> Interval:
    """The headline of a less that of b, of the same rows, resampled together."""
    if len(a.draws) != len(b.draws) or a.n != b.n:
        raise UserError(f"figures of {a.n:,} and of {b.n:,} rows are not paired; score both on the same rows")
    values = np.r_[a.headline.value - b.headline.value, a.draws - b.draws]
    return _interval(values)


def auroc(
    scores: Float[np.ndarray, " n"], hit: np.ndarray, numbers: Int64[np.ndarray, " n"], weights: np.ndarray
) -> Float[np.ndarray, " draws"]:
    """The chance that a row that is one scores above a row that is none, ties counting half, for every line of weights.

    numbers: the group of each row; weights [draws, groups]: how often each was drawn.
    """
    order = np.argsort(scores, kind="stable")
    ordered, hit, numbers = scores[order], hit[order].astype(np.float64), numbers[order]
    starts = np.flatnonzero(np.r_[True, np.diff(ordered) > 0])
    found = []
    for part in _steps(weights, len(scores)):
        w = part[:, numbers]
        up = np.add.reduceat(w * hit, starts, axis=1)
        down = np.add.reduceat(w * (1 - hit), starts, axis=1)
        below = np.cumsum(down, axis=1) - down / 2
        pairs = up.sum(1) * down.sum(1)
        found.append((up * below).sum(1) / np.where(pairs > 0, pairs, np.nan))
    return np.concatenate(found)


def _mean_of_known(values: np.ndarray) -> np.ndarray:
    """The mean over the classes [k, draws] that a resample holds; NaN where it holds none."""
    known = np.isfinite(values)
    return np.where(known.any(0), np.where(known, values, 0).sum(0) / np.maximum(known.sum(0), 1), np.nan)


def _resamples(groups: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The number of each row's group, and how often each group is drawn: once in the first line, then at random."""
    known, numbers = np.unique(groups, return_inverse=True)
    count = len(known)
    rng = np.random.default_rng(seed)
    drawn = np.stack([np.bincount(rng.integers(0, count, count), minlength=count) for _ in range(DRAWS)])
    return numbers, np.concatenate([np.ones((1, count)), drawn]).astype(np.float64)


def _steps(weights: np.ndarray, n_rows: int) -> Iterator[np.ndarray]:
    step = max(1, CELLS // max(1, n_rows))
    return (weights[i : i + step] for i in range(0, len(weights), step))


def _means(values: np.ndarray, numbers: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean of a figure of each row, in every resample."""
    sums, rows = (np.bincount(numbers, weights=v, minlength=weights.shape[1]) for v in (values, np.ones(len(values))))
    return (weights @ sums) / (weights @ rows)


def _interval(values: np.ndarray) -> Interval:
    if not np.isfinite(values[0]):
        return NONE
    low, high = np.nanquantile(values[1:], [0.025, 0.975])
    return Interval(float(values[0]), min(float(low), float(values[0])), max(float(high), float(values[0])))


def _share(values: np.ndarray, n_groups: int) -> Interval:
    """As `_interval`; widened to Wilson's bounds over the groups where every resample says the same."""
    found = _interval(values)
    if not np.isfinite(found.value) or found.high - found.low > 1e-9:
        return found
    bound = wilson(round(found.value * n_groups), n_groups)
    return Interval(found.value, min(bound.low, found.value), max(bound.high, found.value))
