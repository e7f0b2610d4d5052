"""Figures of one pair of sites of a transport: R2 by dimension, efficiency by rank under its ceiling, the subspace's size."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from scipy import stats

from .errors import UserError
from .plots import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, _empty, _style
from .sites import Site
from .summary import plain
from .transport.grid import TransportGrid
from .transport_plots import ARM_LOOK, LOWEST, _log_axis, arm_word, feature_scatter, pair_title

if TYPE_CHECKING:
    import pandas as pd

MOST_DIMENSIONS = 5_000
"""points of the curve; of more dimensions, evenly spread ones of the sorted are drawn"""
BINS = 40
MOST_FEATURES = 5_000
CURVES = (
    ("optimal", "best map of the rank", RED, "solid"), ("truncated", "ridge map cut to it", BLUE, "dash"),
    ("bound", "bound, held out", "#222", "dot"), ("ceiling", "ceiling, in sample", GREY, "dashdot"),
    ("ceiling_corrected", "ceiling without noise", GREEN, "longdash"),
)  # fmt: skip
SIZES = (
    ("sum_rho2", "sum of ρ²", "sum_rho2_null", BLUE), ("held_out_sum", "sum of ρ², held out", None, SKY),
    ("wachter_count", "count above Wachter's edge", None, GREEN), ("held_out_count", "count, held out", None, PINK),
    ("dim_lin", "participation ratio", "dim_lin_null", ORANGE),
)  # fmt: skip


def dimension_frame(grid: TransportGrid, source: Site | str | int, target: Site | str | int) -> pd.DataFrame:
    """R2 of each dimension of the target under the map of a pair, best first, without BOS rows.

    Columns: dimension, r2, se (the jackknife's over shards of held-out prompts), low and high (95 %, Student's t); NaN
    where a dimension never varies, which then comes last. Raises UserError for a pair that the grid has not.
    """
    import pandas as pd

    pair = Site.parse(source), Site.parse(target)
    if pair not in grid.per_output:
        raise UserError(f"no pair {pair[0]} to {pair[1]} in this grid; a source comes before its target")
    value, error = grid.per_output[pair].double()
    half = float(stats.t.ppf(0.975, max(int(grid.meta["shards"]) - 1, 1))) * error
    table = pd.DataFrame({"dimension": torch.arange(len(value)).numpy(), "r2": value.numpy(), "se": error.numpy(),
                          "low": (value - half).numpy(), "high": (value + half).numpy()})  # fmt: skip
    return table.sort_values("r2", ascending=False, na_position="last", kind="stable").reset_index(drop=True)


def r2_by_dimension(grid: TransportGrid, source: Site | str | int, target: Site | str | int) -> go.Figure:
    """R2 of each dimension of the target, sorted (left, with its 95 % interval), and how many have it (right).

    The lines across are what each baseline and the shuffled control score on average over the dimensions. What lies
    below R2 = -0.5 is drawn there.
    """
    table = dimension_frame(grid, source, target)
    every = table[table["r2"].notna()].reset_index(drop=True)
    if every.empty:
        return _empty("No dimension of the target varies")
    shown = every.iloc[:: max(1, -(-len(every) // MOST_DIMENSIONS))]
    figure = make_subplots(1, 2, shared_yaxes=True, column_widths=[0.68, 0.32], horizontal_spacing=0.03)
    place = shown.index.to_numpy() + 1
    low, high, value = (shown[name].clip(lower=LOWEST) for name in ("low", "high", "r2"))
    figure.add_trace(go.Scatter(
        x=[*place, *place[::-1]], y=[*high, *low[::-1]], fill="toself", fillcolor=RED, opacity=0.18, mode="none",
        hoverinfo="skip", name="95 % interval",
    ), row=1, col=1)  # fmt: skip
    text = [f"dimension {d}: R² {v:.4f}<br>95 % interval {a:.4f} to {b:.4f}"
            for d, v, a, b in zip(shown["dimension"], shown["r2"], shown["low"], shown["high"], strict=True)]  # fmt: skip
    figure.add_trace(go.Scatter(x=place, y=value, mode="lines", line={"color": RED, "width": 2}, name="ridge map",
                                text=text, hovertemplate="%{text}<extra></extra>"), row=1, col=1)  # fmt: skip
    figure.add_trace(go.Histogram(y=every["r2"].clip(lower=LOWEST), nbinsy=BINS, marker_color=RED, opacity=0.7,
                                  showlegend=False, hovertemplate="R² %{y}: %{x} dimensions<extra></extra>"),
                     row=1, col=2)  # fmt: skip
    lowest = _arm_lines(figure, grid, source, target, len(every))
    figure.update_xaxes(title_text="dimensions of the target, best first", row=1, col=1)
    figure.update_xaxes(title_text="how many dimensions", row=1, col=2)
    bottom = max(LOWEST, min(0.0, lowest, float(every["r2"].min()))) - 0.04
    figure.update_yaxes(range=[bottom, 1.03])
    figure.update_yaxes(title_text="R² on held-out prompts", row=1, col=1)
    still, under = len(table) - len(every), int((every["r2"] < LOWEST).sum())
    notes = [f"{still} that never vary are left out"] * bool(still) + [
        f"{under} below {LOWEST} are drawn there"
    ] * bool(under)
    if notes:
        figure.add_annotation(text="; ".join(notes), xref="paper", yref="paper", x=1, y=1.1, showarrow=False,
                              xanchor="right", font={"size": 12, "color": GREY})  # fmt: skip
    return _style(figure, 400, margin={"l": 60, "r": 20, "t": 30, "b": 56})


def _arm_lines(figure: go.Figure, grid: TransportGrid, source: Any, target: Any, across: int) -> float:
    """A line for the mean of each arm; returns the lowest of them."""
    found = {}
    for arm in grid.arms:
        part = grid.frame().query("arm == @arm and not bos")
        line = part[(part["source"] == str(Site.parse(source))) & (part["target"] == str(Site.parse(target)))]
        if line.empty:  # no identity of two widths
            continue
        found[arm] = float(line.iloc[0]["r2_uniform"])
        colour = ARM_LOOK.get(arm, (GREY, ""))[0]
        name = escape(arm_word(arm) if arm != "ridge" else "ridge map, mean")
        figure.add_trace(go.Scatter(
            x=[1, across], y=[max(LOWEST, found[arm])] * 2, mode="lines", name=name, line={"color": colour, "width": 1.4,
            "dash": "dot" if arm == "shuffled" else "dash"},
            hovertemplate=f"{name}: {found[arm]:.4f} (mean over dimensions)<extra></extra>",
        ), row=1, col=1)  # fmt: skip
    return min(found.values(), default=0.0)


def efficiency_of_pair(table: pd.DataFrame) -> go.Figure:
    """Whitened R2 over ranks of one pair (left) with its bound and its ceiling, and the efficiency (right).

    table: the lines of one pair of `efficiency.parquet`: rank, optimal, truncated, bound, ceiling, ceiling_corrected,
    efficiency, efficiency_truncated. The bound is of the held-out rows, and what the efficiency is a share of; the ceiling
    is of the training rows, in sample, and drawn beside it, not divided by.
    """
    if table.empty:
        return _empty("No efficiency of this pair was measured: it needs more held-out rows than both widths together")
    titles = ("whitened R²", "efficiency: share of the bound")
    figure = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.07, column_widths=[0.58, 0.42])
    for key, name, colour, dash in CURVES:
        if key in table:
            figure.add_trace(go.Scatter(x=table["rank"], y=table[key], mode="lines", name=name, legendgroup=key,
                                        line={"color": colour, "dash": dash, "width": 1.8},
                                        hovertemplate=f"{name}, rank %{{x}}: %{{y:.4f}}<extra></extra>"),
                             row=1, col=1)  # fmt: skip
    for key, group in (("efficiency", CURVES[0]), ("efficiency_truncated", CURVES[1])):
        figure.add_trace(go.Scatter(x=table["rank"], y=table[key], mode="lines", name=group[1], legendgroup=group[0],
                                    showlegend=False, line={"color": group[2], "dash": group[3], "width": 1.8},
                                    hovertemplate=f"{group[1]}, rank %{{x}}: %{{y:.4f}}<extra></extra>"),
                         row=1, col=2)  # fmt: skip
    figure.update_xaxes(title_text="rank of the map", **_log_axis())
    figure.update_yaxes(range=[-0.25, 1.03])
    return _style(figure, 420, legend={"orientation": "h", "y": -0.22, "x": 0})


def subspace_sizes(size: Mapping[str, Any]) -> go.Figure:
    """How many dimensions a linear map can carry between a pair of sites, three ways: the sum of squared canonical
    correlations, their count above chance, and the participation ratio; in sample and held out.

    Grey ticks are what independent rows of this shape would show; bars begin at 0.

    size: a line of metrics.json's `efficiency.sizes`, or the fields of `maps.cca.SubspaceSize`.
    """
    most = min(size["rank_x"], size["rank_y"])
    figure = go.Figure()
    names = [name for _, name, _, _ in SIZES]
    values = [float(size[key]) for key, *_ in SIZES]
    chance = [0.0 if null is None else float(size[null]) for *_, null, _ in SIZES]
    text = [f"{name}: {value:.2f} of {most}<br>of independent rows {null:.2f}"
            for name, value, null in zip(names, values, chance, strict=True)]  # fmt: skip
    figure.add_trace(go.Bar(x=values, y=names, orientation="h", marker_color=[c for *_, c in SIZES], hovertext=text,
                            text=[plain(size[key]) for key, *_ in SIZES], textposition="outside", showlegend=False,
                            hovertemplate="%{hovertext}<extra></extra>"))  # fmt: skip
    ticks = {"symbol": "line-ns", "size": 20, "line": {"width": 3, "color": GREY}, "color": GREY}
    figure.add_trace(go.Scatter(x=chance, y=names, mode="markers", marker=ticks, name="independent rows",
                                hoverinfo="skip"))  # fmt: skip
    figure.add_vline(most, line={"dash": "dot", "width": 1, "color": "#444"})
    figure.update_xaxes(title_text=f"dimensions (dotted: all {most})", range=[min(0.0, *values) * 1.05, most * 1.1])
    made = _style(figure, 300, legend={"orientation": "h", "y": 1.14, "x": 0})
    return made.update_yaxes(autorange="reversed", showgrid=False)


def features_of_pair(
    table: pd.DataFrame, source: Site | str, target: Site | str, most: int = MOST_FEATURES
) -> go.Figure:
    """`feature_scatter` of one pair; of more features than `most`, as many of each verdict as is its share, evenly spread.

    table: lines of features.parquet, or what `probes.verdicts.judge_frame` made of them, with a column `feature`.
    """
    drawn = spread_features(table, most)
    figure = feature_scatter({pair_title(source, target): drawn.set_index("feature")})
    if len(drawn) < len(table):
        figure.add_annotation(text=f"{len(drawn):,} of {len(table):,} features are drawn", xref="paper", yref="paper", x=1,
                              y=1.1, showarrow=False, xanchor="right", font={"size": 12, "color": GREY})  # fmt: skip
    return figure


def spread_features(table: pd.DataFrame, most: int) -> pd.DataFrame:
    """At most so many features, of each verdict evenly spread ones in its share (and one at least)."""
    if len(table) <= most:
        return table
    chosen: list[int] = []
    for _, places in table.reset_index(drop=True).groupby("verdict", sort=False).groups.items():
        some = max(1, len(places) * most // len(table))
        chosen += [int(places[i * len(places) // some]) for i in range(some)]
    return table.iloc[sorted(chosen)]
