"""The geometry of writes as plotly figures: what each part costs, how long it is, and the loss where blocks run together.

They read the frames of `WriteGeometry` (or the parquet files of a run folder) and know nothing of how they were made.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .plots import BLUE, DIVERGING, GREEN, GREY, ORANGE, RED, _empty, _style

if TYPE_CHECKING:
    import pandas as pd

WRITE_WORDS = {"attn": "attention", "mlp": "MLP", "block": "both"}
PART_LOOK = {
    "orthogonal": ("orthogonal part", BLUE, "circle", "solid"),
    "parallel": ("parallel part", RED, "diamond-open", "solid"),
    "control": ("as much, random direction", GREY, "x", "dot"),
}
KIND_LOOK = {
    "parallel": ("all on the same input", RED, "diamond-open", "solid"),
    "stale": ("on the input one block old", BLUE, "circle", "solid"),
    "skipped": ("left out", GREY, "x", "dot"),
}
COST = "rise of the loss (nats per token)"
FLOOR = 1e-4
"""nats per token: what is lower, or negative, is drawn here on a logarithmic axis"""
WRITTEN = 12


def write_costs(table: pd.DataFrame, *, logarithmic: bool = True) -> go.Figure:
    """What taking each part of each layer's write away costs, one panel for attention, MLP and both, with 95 % intervals.

    table: `WriteGeometry.cost_frame()`. On the logarithmic axis, costs below 0.0001 are drawn there; pointed at, they say what
    they are.
    """
    if table.empty:
        return _empty("No write was taken apart")
    writes = [w for w in WRITE_WORDS if w in set(table["write"])]
    figure = make_subplots(1, len(writes), shared_yaxes=True, subplot_titles=[WRITE_WORDS[w] for w in writes],
                           horizontal_spacing=0.03)  # fmt: skip
    for column, write in enumerate(writes, 1):
        for part in PART_LOOK:
            lines = table[(table["write"] == write) & (table["part"] == part)]
            _curve(figure, lines, "layer", PART_LOOK[part], column, logarithmic)
        figure.update_xaxes(title_text="layer", dtick=_step(table["layer"]), row=1, col=column)
    _cost_axis(figure, logarithmic)
    return _style(figure, 420, legend=_legend(), margin={"l": 60, "r": 20, "t": 90, "b": 56})


def write_sizes(table: pd.DataFrame) -> go.Figure:
    """How long each write is beside the state it is added to, its cosine with that, and the share of its parallel part.

    table: `WriteGeometry.size_frame()`.
    """
    if table.empty:
        return _empty("No write was measured")
    panels = {"size": "length of the write / of the state", "cosine": "cosine with the state",
              "share": "share of the parallel part"}  # fmt: skip
    figure = make_subplots(1, len(panels), subplot_titles=list(panels.values()), horizontal_spacing=0.08)
    looks = {"attn": ("attention", ORANGE, "square-open", "solid"), "mlp": ("MLP", GREEN, "triangle-up", "solid")}
    for column, key in enumerate(panels, 1):
        for write, look in looks.items():
            lines = table[table["write"] == write].rename(columns={key: "delta", f"{key}_low": "delta_low",
                                                                   f"{key}_high": "delta_high"})  # fmt: skip
            _curve(figure, lines, "layer", look, column, False, unit="")
        figure.update_xaxes(title_text="layer", dtick=_step(table["layer"]), row=1, col=column)
    for column, words in enumerate(("ratio", "cosine", "share of the squared length"), 1):
        figure.update_yaxes(title_text=words, rangemode="tozero", row=1, col=column)
    return _style(figure, 380, legend=_legend(), margin={"l": 60, "r": 20, "t": 90, "b": 56})


def run_lengths(table: pd.DataFrame, *, logarithmic: bool = True) -> go.Figure:
    """The loss against the length of a run of blocks, mean over all its places, with 95 % intervals.

    table: `WriteGeometry.length_frame()`. Long runs have fewer places, so that curves need not rise: see `run_places`.
    """
    if table.empty:
        return _empty("No run of blocks was measured")
    figure = make_subplots(1, 1)
    for kind, look in KIND_LOOK.items():
        _curve(figure, table[table["kind"] == kind], "length", look, 1, logarithmic)
    figure.update_xaxes(title_text="length of the run (blocks)", dtick=_step(table["length"]))
    _cost_axis(figure, logarithmic)
    return _style(figure, 400, legend=_legend())


def run_places(table: pd.DataFrame) -> go.Figure:
    """The loss of every run, by the block it begins at and its length; one panel for each kind of run.

    table: `WriteGeometry.run_frame()`. Colours have one scale, up to the dearest run that skips no block; a run that skips
    blocks may be dearer.
    """
    if table.empty:
        return _empty("No run of blocks was measured")
    kinds = [k for k in KIND_LOOK if k in set(table["kind"])]
    figure = make_subplots(1, len(kinds), shared_yaxes=True, subplot_titles=[KIND_LOOK[k][0] for k in kinds],
                           horizontal_spacing=0.03)  # fmt: skip
    kept = table[table["kind"] != "skipped"]["delta"]
    kept = kept if len(kept) else table["delta"]
    reach = max(abs(float(v)) for v in kept) or 1.0
    both = float(kept.min()) < -0.02 * reach  # some runs are worth something, by more than rounding and chance
    for column, kind in enumerate(kinds, 1):
        part = table[table["kind"] == kind]
        cells = {(line["start"], line["length"]): line for line in part.to_dict("records")}
        starts, lengths = (sorted(set(part[key])) for key in ("start", "length"))
        lines = [[cells.get((s, n)) for s in starts] for n in lengths]
        figure.add_trace(go.Heatmap(
            x=[str(s) for s in starts], y=[str(n) for n in lengths], xgap=2, ygap=2, coloraxis="coloraxis", hoverongaps=False,
            z=[[None if cell is None else cell["delta"] for cell in line] for line in lines],
            text=[["" if cell is None else _said(cell) for cell in line] for line in lines],
            texttemplate="%{z:.2f}" if len(starts) <= WRITTEN else None, hovertemplate="%{text}<extra></extra>",
        ), row=1, col=column)  # fmt: skip
        figure.update_xaxes(title_text="first block of the run", type="category", row=1, col=column)
        figure.update_yaxes(type="category", row=1, col=column)
    figure.update_yaxes(title_text="length of the run (blocks)", row=1, col=1)
    bar = {"title": {"text": COST, "side": "right"}, "thickness": 14}
    look = (
        {"colorscale": DIVERGING, "cmin": -reach, "reversescale": True}
        if both
        else {"colorscale": "Oranges", "cmin": 0}
    )
    scale = {**look, "cmax": reach, "colorbar": bar}
    return _style(figure, 180 + 34 * min(24, len(set(table["length"]))), coloraxis=scale)


def _said(cell: dict[Any, Any]) -> str:
    return (f"{cell['length']} blocks from block {cell['start']}: {cell['delta']:+.4f} nats per token<br>95 % interval "
            f"{cell['delta_low']:+.4f} to {cell['delta_high']:+.4f}")  # fmt: skip


def _curve(figure: go.Figure, lines: pd.DataFrame, x: str, look: tuple[str, str, str, str], column: int, logarithmic: bool,
           unit: str = " nats per token") -> None:  # fmt: skip
    if lines.empty:
        return
    name, colour, symbol, dash = look
    value, low, high = (lines[f"delta{end}"].tolist() for end in ("", "_low", "_high"))
    at = [max(v, FLOOR) for v in value] if logarithmic else value
    bars = {"type": "data", "symmetric": False, "thickness": 1.4, "width": 3,
            "array": [max(h - a, 0.0) for h, a in zip(high, at, strict=True)],
            "arrayminus": [max(min(a - lo, a - FLOOR if logarithmic else a - lo), 0.0)
                           for lo, a in zip(low, at, strict=True)]}  # fmt: skip
    said = [f"{escape(name)}, {x} {at_x}: {v:+.4f}{unit}<br>95 % interval {lo:+.4f} to {h:+.4f}"
            for at_x, v, lo, h in zip(lines[x], value, low, high, strict=True)]  # fmt: skip
    figure.add_trace(go.Scatter(
        x=lines[x].tolist(), y=at, error_y=bars, mode="lines+markers", name=name, legendgroup=name, showlegend=column == 1,
        line={"color": colour, "width": 2, "dash": dash}, marker={"color": colour, "symbol": symbol, "size": 8}, text=said,
        hovertemplate="%{text}<extra></extra>",
    ), row=1, col=column)  # fmt: skip


def _cost_axis(figure: go.Figure, logarithmic: bool) -> None:
    figure.update_yaxes(title_text=COST, col=1)
    figure.update_xaxes(zeroline=False)
    if logarithmic:
        figure.update_yaxes(type="log", dtick=1, exponentformat="none")


def _step(values: pd.Series) -> int:
    return max(1, round((int(values.max()) - int(values.min())) / 16))


def _legend() -> dict[str, Any]:
    return {"orientation": "h", "x": 0, "y": 1.12, "yanchor": "bottom"}
