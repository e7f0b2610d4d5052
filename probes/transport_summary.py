"""What a transport run found, in sentences: the first thing that its report says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from workbench.summary import plain
from workbench.transport.grid import TransportGrid
from workbench.transport_plots import VERDICT_LOOK, pair_title

if TYPE_CHECKING:
    import pandas as pd

Head = list[str]
"""a sentence, and what follows it"""


def headlines(metrics: Mapping[str, Any], grid: TransportGrid, efficiency: pd.DataFrame | None = None) -> list[Head]:
    """The sentences of a run: its grid, then each other part that was measured.

    metrics: of metrics.json; efficiency: the table of efficiency.parquet.
    """
    parts = (
        _grid(grid),
        _efficiency(metrics, efficiency),
        _features(metrics.get("features", {}).get("pairs") or []),
        _causal(metrics.get("causal", {})),
        _shortcut(metrics.get("shortcut", {}).get("lines") or []),
    )
    return [part for part in parts if part]


def _grid(grid: TransportGrid) -> Head:
    table = grid.frame().query("not bos")
    found = table[table["arm"] == "ridge"]
    best, worst = (found.loc[found["r2_uniform"].agg(which)] for which in ("idxmax", "idxmin"))
    said = [f"{_scored(c)} {words} ({pair_title(c['source'], c['target'])})"
            for c, words in ((best, "at best"), (worst, "at worst"))]  # fmt: skip
    first = f"A linear map predicts the later layer with R² {' and '.join(said if len(found) > 1 else said[:1])}."
    rest = ["R² is the mean over dimensions, of held-out prompts, without BOS."]
    for arm, words in (("identity_bias", "The source itself plus a constant scores"), ("shuffled", "The control, with the "
                       "sources of other prompts, scores")):  # fmt: skip
        if arm in grid.arms:
            low, high = (score(x) for x in _ends(table[table["arm"] == arm], "r2_uniform"))
            rest.append(f"{words} {low if low == high else f'{low} to {high}'}.")
    return [first, " ".join(rest)]


def score(value: float) -> str:
    """R2 with three decimals, without a minus where that leaves nothing.

    >>> score(0.91355), score(-0.0002), score(-0.25)
    ('0.914', '0.000', '−0.250')
    """
    return f"{round(value, 3) + 0.0:.3f}".replace("-", "−")


def _scored(line: Any) -> str:
    value, low, high = (score(float(line[f"r2_uniform{end}"])) for end in ("", "_low", "_high"))
    return f"{value} ({low} to {high})"


def _efficiency(metrics: Mapping[str, Any], table: pd.DataFrame | None) -> Head:
    sizes = metrics.get("efficiency", {}).get("sizes") or []
    if not sizes or table is None:
        return []
    if table.groupby(["source", "target"])["optimal"].last().min() <= 0:
        return ["Some pairs carry nothing: the best map of some pair explains none of the held-out whitened variance."]
    low, high = _ends(sizes, "efficiency")
    halves = [half_rank(part) for _, part in table.groupby(["source", "target"], sort=False)]
    width = max(s["rank_y"] for s in sizes)
    return [
        f"Half of the whitened R² of the full map takes a rank of {_range(min(halves), max(halves))}, of {width} dimensions.",
        f"At full rank the fitted maps reach {_range(low, high)} of what no affine map exceeds on the held-out rows.",
    ]


def half_rank(part: pd.DataFrame) -> int:
    """The lowest rank at which the best map has half of the R2 that it has at full rank; `part`: one pair, by rank."""
    return int(part["rank"][part["optimal"] >= part["optimal"].iloc[-1] / 2].iloc[0])


def _features(lines: Sequence[Mapping[str, Any]]) -> Head:
    if not lines:
        return []
    order = sorted(lines, key=lambda p: p["transported"] / _judged(p))
    most, least = order[-1], order[0]
    said = [f"{pair_title(p['source'], p['target'])}: {', '.join(f'{p[name]} {name}' for name in VERDICT_LOOK)}"
            for p in ([most, least] if len(lines) > 1 else [most])]  # fmt: skip
    return [
        f"Of the features of {most['target']} that fire often enough to tell, {most['transported']} of {_judged(most)} are "
        f"carried in place from {most['source']}"
        + (f"; of those of {least['target']} from {least['source']}, {least['transported']} of {_judged(least)}."
           if len(lines) > 1 else "."),
        f"Verdicts: {'; '.join(said)}.",
    ]  # fmt: skip


def _judged(line: Mapping[str, Any]) -> int:
    return max(1, sum(line[name] for name in VERDICT_LOOK if name != "rare"))


def _causal(found: Mapping[str, Any]) -> Head:
    lines = found.get("lines") or []
    arms = {name: [x for x in lines if x["arm"] == name] for name in dict.fromkeys(x["arm"] for x in lines)}
    moved = arms.get("transported")
    if not moved:
        return []
    order = sorted(moved, key=lambda x: x["delta"])
    said = [
        f"{_interval(x, 'delta')} nats per token from {pair_title(x['source'], x['target'])}"
        for x in (order[0], order[-1])
    ]
    others = [f"{words} {_range(*_ends(arms[name], 'delta'))}" for name, words in
              (("identity", "the source's own state"), ("mean", "the target's mean")) if name in arms]  # fmt: skip
    return [
        f"Written into the model, the map's prediction costs {said[0]}"
        + (f", and {said[1]}." if len(order) > 1 else "."),
        f"Rise of log-perplexity, which is {plain(lines[0]['log_perplexity'])} in the untouched model, on {found['sequences']} "
        f"prompts of {found['prompts']}. On the same tokens: {', '.join(others)}.",
    ]


def _shortcut(lines: Sequence[Mapping[str, Any]]) -> Head:
    single = [x for x in lines if x["search"] == "single" and x["skipped"]]
    if not single:
        return []
    best = min(single, key=lambda x: (x["skipped"], x["delta"]))
    last = max(single, key=lambda x: x["skipped"])
    return [
        f"Leaving out block {best['blocks']} saves {100 * best['saved']:.0f} % of the FLOPs and costs "
        f"{_interval(best, 'delta')} nats per token.",
        *([f"The longest run with one map, blocks {last['blocks']}: {100 * last['saved']:.0f} %, "
           f"{_interval(last, 'delta')} nats."] if last["skipped"] > 1 else []),
    ]  # fmt: skip


def _interval(line: Any, key: str) -> str:
    value, low, high = (float(line[f"{key}{end}"]) for end in ("", "_low", "_high"))
    return f"{plain(value)} ({plain(low)} to {plain(high)})"


def _ends(lines: pd.DataFrame | Iterable[Mapping[str, Any]], key: str) -> tuple[float, float]:
    values = [float(x) for x in (lines[key] if hasattr(lines, "columns") else [line[key] for line in lines])]  # type: ignore[index]
    return min(values), max(values)


def _range(low: float, high: float) -> str:
    a, b = plain(low), plain(high)
    return a if a == b else f"{a} to {b}"
