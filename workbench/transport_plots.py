"""Transport results to plotly figures: the grid, its curves, efficiency by rank, features, causal arms, skipped blocks.

Every function takes a result's table and returns a figure; where there is nothing to show, the figure says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .plots import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, SYMBOLS, _empty, _style
from .transport.grid import TransportGrid

if TYPE_CHECKING:
    import pandas as pd

ARM_LOOK = {
    "ridge": (RED, "diamond"), "procrustes": (BLUE, "square"), "identity_bias": (GREEN, "triangle-up"),
    "identity": (SKY, "triangle-down"), "scalar_bias": (PINK, "cross"), "mean": (ORANGE, "circle-open"),
    "shuffled": (GREY, "x"),
}  # fmt: skip
VERDICT_COLOURS = {"transported": BLUE, "rotated": GREEN, "synthesised": RED, "mixed": ORANGE, "rare": GREY}
METRIC_WORDS = {
    "uniform": "R² (mean over dimensions)",
    "weighted": "R² (weighted by variance)",
    "whitened": "whitened R²",
}


def grid_heatmap(grid: TransportGrid, metric: str = "uniform", *, bos: bool = False) -> go.Figure:
    """Held-out R2 of every pair, sources down and targets across, beside the shuffled control where there is one."""
    arms = [arm for arm in ("ridge", "shuffled") if arm in grid.arms]
    titles = {"ridge": "ridge, held out", "shuffled": "shuffled pairs (control)"}
    figure = make_subplots(1, len(arms), subplot_titles=[titles[arm] for arm in arms], horizontal_spacing=0.1)
    for column, arm in enumerate(arms, 1):
        part = grid.frame().query("arm == @arm and bos == @bos").set_index(["source", "target"])
        matrix = grid.matrix(metric, arm=arm, bos=bos)
        text = [[_cell_text(part, a, b, metric) for b in matrix.columns] for a in matrix.index]
        heat = go.Heatmap(
            x=list(matrix.columns), y=list(matrix.index), z=_nones(matrix), text=text, coloraxis="coloraxis", xgap=2,
            ygap=2, hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip
        figure.add_trace(heat, row=1, col=column)
        figure.update_xaxes(title_text="target", type="category", row=1, col=column)
        figure.update_yaxes(title_text="source" if column == 1 else "", type="category", autorange="reversed", row=1,
                            col=column)  # fmt: skip
    bar = {"title": {"text": METRIC_WORDS[metric], "side": "right"}, "thickness": 14}
    height = max(320, 140 + 22 * len(grid.matrix(metric).index))
    return _style(figure, height, coloraxis={"colorscale": "Cividis", "cmin": 0, "cmax": 1, "colorbar": bar})


def _cell_text(part: pd.DataFrame, a: str, b: str, metric: str) -> str:
    if (a, b) not in part.index:
        return "no such pair"
    line: Any = part.loc[(a, b)]
    value, low, high = (float(line[f"r2_{metric}{end}"]) for end in ("", "_low", "_high"))
    return f"{a} to {b}<br>{METRIC_WORDS[metric]} {value:.4f}<br>95 % interval {low:.4f} to {high:.4f}"


def grid_curves(
    grid: TransportGrid, metric: str = "uniform", *, source: str | int | None = None, target: str | int | None = None,
    bos: bool = False,
) -> go.Figure:  # fmt: skip
    """Every arm of one source over its targets, or of one target over its sources, with 95 % intervals."""
    figure = go.Figure()
    across = "target" if source is not None else "source"
    for arm in grid.arms:
        line = grid.curve(source=source, target=target, arm=arm, bos=bos)
        colour, symbol = ARM_LOOK.get(arm, (GREY, "circle"))
        value, low, high = (line[f"r2_{metric}{end}"].to_numpy() for end in ("", "_low", "_high"))
        error = {"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low, "thickness": 1.4}
        figure.add_trace(go.Scatter(
            x=line[across], y=value, error_y=error, mode="lines+markers", name=escape(arm),
            line={"color": colour, "width": 1.8, "dash": "dot" if arm == "shuffled" else "solid"},
            marker={"color": colour, "symbol": symbol, "size": 8}, hovertemplate=f"{escape(arm)}, %{{x}}: %{{y:.4f}}",
        ))  # fmt: skip
    figure.update_xaxes(title_text=across, type="category")
    figure.update_yaxes(title_text=METRIC_WORDS[metric])
    return _style(figure, 420)


def efficiency_by_rank(table: pd.DataFrame) -> go.Figure:
    """Whitened held-out R2 over ranks (above) and the efficiency (below), one pair a colour.

    table: one line per pair and rank, with source, target, rank, optimal, truncated, bound, efficiency and
    efficiency_truncated. Solid: the best map of each rank; dashed: the ridge map cut to it; dotted: the bound.
    """
    if table.empty:
        return _empty("No efficiency was measured: it needs more held-out rows than both widths together")
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.07)
    colours = (RED, BLUE, GREEN, ORANGE, PINK, SKY, GREY)
    for i, ((a, b), part) in enumerate(table.groupby(["source", "target"], sort=False)):
        name, colour = escape(f"{a} to {b}"), colours[i % len(colours)]
        kinds = ((1, "optimal", "solid"), (1, "truncated", "dash"), (1, "bound", "dot"), (2, "efficiency", "solid"),
                 (2, "efficiency_truncated", "dash"))  # fmt: skip
        for row, column, dash in kinds:
            figure.add_trace(go.Scatter(
                x=part["rank"], y=part[column], mode="lines", name=name, legendgroup=name,
                showlegend=column == "optimal", line={"color": colour, "dash": dash, "width": 1.7},
                hovertemplate=f"{name}, {column.replace('_', ' ')}, rank %{{x}}: %{{y:.4f}}<extra></extra>",
            ), row=row, col=1)  # fmt: skip
    figure.update_xaxes(title_text="rank", type="log", row=2, col=1)
    figure.update_yaxes(title_text="whitened R², held out", range=[-0.25, 1.02], row=1, col=1)
    figure.update_yaxes(title_text="efficiency (R² / bound)", range=[-0.25, 1.05], row=2, col=1)
    return _style(figure, 620)


def feature_scatter(tables: Mapping[str, pd.DataFrame], most: int = 6) -> go.Figure:
    """Each feature's R2 under the operator against what the identity carries of it, coloured by verdict; a panel a pair.

    tables: `FeatureVerdicts.frame()` by a title such as "resid_post.0 to resid_post.2"; the first `most` are drawn.
    """
    shown = list(tables.items())[:most]
    if not shown:
        return _empty("No features were measured: give a dictionary for a target site")
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    figure = make_subplots(lines, columns, subplot_titles=[escape(t) for t, _ in shown], shared_yaxes=True,
                           vertical_spacing=0.3 / lines, horizontal_spacing=0.05)  # fmt: skip
    seen: set[str] = set()
    for i, (_, table) in enumerate(shown):
        where = {"row": i // columns + 1, "col": i % columns + 1}
        for verdict, colour in VERDICT_COLOURS.items():
            part = table[(table["verdict"] == verdict) & table["r2"].notna()]
            if part.empty:
                continue
            text = [f"feature {n}: {verdict}<br>R² {r2:.3f}, firing on {int(c)} tokens"
                    for n, r2, c in zip(part.index, part["r2"], part["count"], strict=True)]  # fmt: skip
            figure.add_trace(go.Scatter(
                x=part["identity_carries"], y=part["r2"].clip(lower=-0.5), mode="markers", name=verdict, text=text,
                legendgroup=verdict, showlegend=verdict not in seen, hovertemplate="%{text}<extra></extra>",
                marker={"color": colour, "size": 5, "opacity": 0.7},
            ), **where)  # fmt: skip
            seen.add(verdict)
        figure.update_xaxes(title_text="carried by the identity (r²)", **where)
    figure.update_yaxes(title_text="R² of the operator", col=1)
    return _style(figure, 120 + 300 * lines)


def causal_bars(table: pd.DataFrame) -> go.Figure:
    """Rise of log-perplexity of every arm of each pair, with 95 % intervals; a logarithmic axis where arms differ much.

    table: one line per pair and arm, with source, target, arm, delta, delta_low, delta_high.
    """
    table = table[table["arm"] != "untouched"] if len(table) else table
    if table.empty:
        return _empty("No causal arms were measured")
    figure = go.Figure()
    looks = {"transported": RED, "identity": SKY, "mean": ORANGE, "bias": PINK, "zero": GREY, "feature": GREEN}
    for arm, part in table.groupby("arm", sort=False):
        error = {"type": "data", "symmetric": False, "array": part["delta_high"] - part["delta"],
                 "arrayminus": part["delta"] - part["delta_low"], "thickness": 1.3}  # fmt: skip
        figure.add_trace(go.Bar(
            x=[escape(f"{a} to {b}") for a, b in zip(part["source"], part["target"], strict=True)], y=part["delta"],
            error_y=error, name=escape(str(arm)), marker_color=looks.get(str(arm), BLUE),
            hovertemplate=f"{escape(str(arm))}, %{{x}}: %{{y:.4f}} nats<extra></extra>",
        ))  # fmt: skip
    figure.update_yaxes(title_text="rise of log-perplexity (nats per token)")
    return _style(figure, 460, barmode="group")


def shortcut_points(table: pd.DataFrame, greedy: pd.DataFrame | None = None) -> go.Figure:
    """Rise of log-perplexity against the share of FLOPs saved; `greedy` is the path of the greedy search.

    table: `ShortcutCurve.frame()`.
    """
    if table.empty:
        return _empty("No shortcut was measured")
    figure = go.Figure()
    parts: Sequence[tuple[str, pd.DataFrame | None, str, str]] = (
        ("one run of blocks", table, "markers", BLUE),
        ("greedy", greedy, "lines+markers", RED),
    )
    for i, (name, part, mode, colour) in enumerate(parts):
        if part is None or part.empty:
            continue
        error: dict[str, Any] = {"type": "data", "symmetric": False, "array": part["delta_high"] - part["delta"],
                                 "arrayminus": part["delta"] - part["delta_low"], "thickness": 1.3}  # fmt: skip
        text = ["the whole model" if not blocks else f"without blocks {blocks}" for blocks in part["blocks"]]
        figure.add_trace(go.Scatter(
            x=100 * part["saved"], y=part["delta"], error_y=error, mode=mode, name=name, text=text,
            marker={"color": colour, "symbol": SYMBOLS[i], "size": 9}, line={"color": colour, "width": 1.6},
            hovertemplate="%{text}: %{y:.4f} nats, %{x:.1f} % saved<extra></extra>",
        ))  # fmt: skip
    figure.update_xaxes(title_text="FLOPs saved (%)")
    figure.update_yaxes(title_text="rise of log-perplexity (nats per token)")
    return _style(figure, 420)


def _nones(matrix: pd.DataFrame) -> list[list[float | None]]:
    return [[None if v != v else float(v) for v in row] for row in matrix.to_numpy()]
