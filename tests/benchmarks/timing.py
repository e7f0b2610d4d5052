"""Times of several ways in turns, their medians and spreads, and how they grow: slopes of log time over log size."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


def in_turns(ways: Mapping[str, Callable[[], Any]], repeats: int, device: str = "") -> dict[str, list[float]]:
    """Seconds of each way in every turn, one way after another, after one turn to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            start = now(device)
            way()
            end = now(device)
            if turn:
                taken[name].append(end - start)
    return taken


def now(device: str = "") -> float:
    """The clock, once all that was sent to a GPU is done."""
    if torch.cuda.is_available() and not device.startswith("cpu"):
        torch.cuda.synchronize()
    return time.perf_counter()


def spread(values: Sequence[float]) -> list[float]:
    """Lowest and highest."""
    return [min(values), max(values)]


def ratios(taken: Mapping[str, Sequence[float]], base: str) -> dict[str, list[float]]:
    """The base's time over each way's of the same turn: what else the machine does then meets both."""
    return {name: [b / t for b, t in zip(taken[base], times, strict=True)] for name, times in taken.items()}


def shown(low_high: Sequence[float] | None, form: str = ".2f") -> str:
    """A spread as a table has it; a dash where none was kept.

    >>> shown([1.0, 2.5]), shown(None)
    ('1.00 to 2.50', '-')
    """
    return "-" if low_high is None else f"{low_high[0]:{form}} to {low_high[1]:{form}}"


def slope(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """The slope of log value over log size by least squares, and half of its 95 % interval by Student's t.

    >>> tuple(round(v, 6) for v in slope([1, 2, 4, 8], [3, 12, 48, 192]))
    (2.0, 0.0)
    """
    from scipy import stats

    fit = stats.linregress([math.log(s) for s in sizes], [math.log(v) for v in values])
    return float(fit.slope), float(fit.stderr * stats.t.ppf(0.975, len(sizes) - 2))


def growth(
    what: str, by: str, expected: float, sizes: Sequence[int], make: Callable[[int], tuple[Callable[[], Any], float]],
    repeats: int = 3,
) -> dict[str, Any]:  # fmt: skip
    """How one thing grows: `make(size)` gives what is timed and its counted work; a line of the `growth` table.

    expected: the exponent for large sizes. The sizes are run one after the other, in as many turns as `repeats`.
    """
    made = [make(size) for size in sizes]
    taken = in_turns({str(size): run for size, (run, _) in zip(sizes, made, strict=True)}, repeats)
    medians = [statistics.median(taken[str(size)]) for size in sizes]
    found, half = slope(sizes, medians)
    counted = slope(sizes, [work for _, work in made])[0] if all(work > 0 for _, work in made) else None
    return {"what": what, "by": by, "expected": expected, "counted": counted, "slope": found, "half": half,
            "sizes": list(sizes), "seconds": medians, "spread": [spread(taken[str(size)]) for size in sizes]}  # fmt: skip
