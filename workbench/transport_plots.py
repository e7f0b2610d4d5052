"""Transport results to plotly figures: the grid, its curves, efficiency by rank, features, causal arms, skipped blocks.

Every function takes a result's table and returns a figure; where there is nothing to show, the figure says so, and where
there are more pairs than a figure can hold, it draws some that are spread evenly over all and says how many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .plot_marks import Cell, clickable, label_places, reach, shares
from .plots import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, SYMBOLS, _empty, _style
from .sites import Site
from .transport.grid import TransportGrid
from .visible_text import label

if TYPE_CHECKING:
    import pandas as pd

ARM_LOOK = {
    "ridge": (RED, "diamond"), "procrustes": (BLUE, "square"), "identity_bias": (GREEN, "triangle-up"),
    "identity": (SKY, "triangle-down"), "scalar_bias": (PINK, "cross"), "mean": (ORANGE, "circle-open"),
    "shuffled": (GREY, "x"),
}  # fmt: skip
ARM_WORDS = {
    "ridge": "ridge map", "procrustes": "Procrustes", "identity_bias": "identity + bias", "scalar_bias": "scalar + bias",
    "shuffled": "shuffled (control)",
}  # fmt: skip
CAUSAL_LOOK = {
    "transported": (RED, "diamond"), "identity": (SKY, "triangle-down"), "mean": (ORANGE, "circle-open"),
    "bias": (PINK, "cross"), "zero": (GREY, "x"), "feature": (GREEN, "square"),
}  # fmt: skip
VERDICT_LOOK = {
    "transported": (BLUE, "circle"), "rotated": (GREEN, "diamond"), "mixed": (ORANGE, "triangle-up"),
    "synthesised": (RED, "x"), "rare": (GREY, "circle-open"),
}  # fmt: skip
LOWEST = -0.5
"""R2 below this leaves the axes, or is drawn there: how bad a very bad prediction is tells little"""
MOST_TICKS = 14
"""layers that an axis across names"""
NAMED_CELLS = 12
"""sites across up to which each cell of the heatmap bears its number"""
METRIC_WORDS = {
    "uniform": "R² (mean over dimensions)",
    "weighted": "R² (weighted by variance)",
    "whitened": "whitened R²",
}


def pair_title(source: object, target: object) -> str:
    """The short name of a pair of sites.

    >>> pair_title("resid_post.0", "resid_post.3"), pair_title("resid_pre.0", "resid_post.3")
    ('resid_post.0 → 3', 'resid_pre.0 → resid_post.3')
    """
    a, b = Site.parse(str(source)), Site.parse(str(target))
    return f"{a} → {b.layer if a.point == b.point else b}"


def arm_word(arm: str) -> str:
    """The name of an arm of the grid, in words."""
    return ARM_WORDS.get(arm, arm.replace("_", " "))


def grid_heatmap(
    grid: TransportGrid,
    metric: str = "uniform",
    *,
    bos: bool = False,
    picked: tuple[Site | str, Site | str] | None = None,
) -> go.Figure:
    """Held-out R2 of every pair, sources down and targets across, beside the shuffled control where there is one.

    picked: a pair (source, target) that is framed; the cells can then be clicked, and give their pair as customdata.
    """
    arms = [arm for arm in ("ridge", "shuffled") if arm in grid.arms]
    titles = {"ridge": "ridge map, held-out prompts", "shuffled": "shuffled pairs (control: nothing can be carried)"}
    figure = make_subplots(1, len(arms), subplot_titles=[titles[arm] for arm in arms], horizontal_spacing=0.05)
    for column, arm in enumerate(arms, 1):
        part = grid.frame().query("arm == @arm and bos == @bos").set_index(["source", "target"])
        matrix = grid.matrix(metric, arm=arm, bos=bos)
        text = [[_cell_text(part, a, b, metric) for b in matrix.columns] for a in matrix.index]
        heat = go.Heatmap(
            x=list(matrix.columns), y=list(matrix.index), z=_nones(matrix), text=text, coloraxis="coloraxis", xgap=2,
            ygap=2, hovertemplate="%{text}<extra></extra>", hoverongaps=False,
            texttemplate="%{z:.2f}" if len(matrix.columns) <= NAMED_CELLS else None,
        )  # fmt: skip
        figure.add_trace(heat, row=1, col=column)
        figure.update_xaxes(**_site_axis("target", list(matrix.columns)), row=1, col=column)
        down = {**_site_axis("source", list(matrix.index), 100), "autorange": "reversed", "showticklabels": column == 1}
        figure.update_yaxes(**(down if column == 1 else down | {"title": None}), row=1, col=column)
    bar = {"title": {"text": METRIC_WORDS[metric], "side": "right"}, "thickness": 14}
    if picked is not None:
        part = grid.frame().query("arm == @arms[0] and bos == @bos").set_index(["source", "target"])
        cells = [Cell(b, a, _cell_text(part, a, b, metric), (a, b)) for a, b in part.index]
        clickable(figure, cells, (str(picked[1]), str(picked[0])))
    height = max(320, 140 + 22 * len(grid.matrix(metric).index))
    made = _style(figure, height, coloraxis={"colorscale": "Cividis", "cmin": 0, "cmax": 1, "colorbar": bar})
    made.update_xaxes(showgrid=False)
    return made.update_yaxes(showgrid=False)


def _site_axis(role: str, names: list[str], most: int = MOST_TICKS) -> dict[str, Any]:
    """An axis of sites: layer numbers where all are of one point, which the title then names; of many, some."""
    sites = [Site.parse(name) for name in names]
    if len({site.point for site in sites}) > 1:
        return {"type": "category", "title": {"text": role}}
    layers, every = [str(site.layer) for site in sites], max(1, -(-len(names) // most))
    return {"type": "category", "title": {"text": f"{role} layer ({sites[0].point})"}, "tickvals": names[::every],
            "ticktext": layers[::every]}  # fmt: skip


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
    """Every arm of one source over its targets, or of one target over its sources, with 95 % intervals.

    What lies below R2 = -0.5 leaves the axis.
    """
    figure = go.Figure()
    across, lowest = "target" if source is not None else "source", 0.0
    names: list[str] = []
    for arm in grid.arms:
        line = grid.curve(source=source, target=target, arm=arm, bos=bos)
        colour, symbol = ARM_LOOK.get(arm, (GREY, "circle"))
        value, low, high = (line[f"r2_{metric}{end}"].to_numpy() for end in ("", "_low", "_high"))
        names, lowest = list(line[across]), min(lowest, *value)
        text = [f"{escape(arm_word(arm))}, {a} to {b}: {v:.4f}<br>95 % interval {lo:.4f} to {hi:.4f}"
                for a, b, v, lo, hi in zip(line["source"], line["target"], value, low, high, strict=True)]  # fmt: skip
        figure.add_trace(go.Scatter(
            x=names, y=value, error_y=_bars(value, low, high), mode="lines+markers", name=escape(arm_word(arm)),
            line={"color": colour, "width": 1.8, "dash": "dot" if arm == "shuffled" else "solid"},
            marker={"color": colour, "symbol": symbol, "size": 8}, text=text, hovertemplate="%{text}<extra></extra>",
        ))  # fmt: skip
    figure.update_xaxes(**_site_axis(across, names))
    figure.update_yaxes(title_text=METRIC_WORDS[metric], range=[max(lowest, LOWEST) - 0.04, 1.03])
    return _style(figure, 380)


def _bars(value: Any, low: Any, high: Any) -> dict[str, Any]:
    return {"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low, "thickness": 1.4}


def _log_axis(lowest: int = -6) -> dict[str, Any]:
    """A logarithmic axis whose every tick is written out: plotly leaves the decade of those between out."""
    ticks = [step * 10.0**decade for decade in range(lowest, 6) for step in (1, 2, 5)]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def _spread(items: list[Any], most: int) -> list[Any]:
    """At most so many of them, evenly spread from the first to the last.

    >>> _spread(list(range(10)), 4)
    [0, 3, 6, 9]
    """
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def efficiency_by_rank(table: pd.DataFrame, most: int = 6) -> go.Figure:
    """Whitened held-out R2 over ranks (left) and the efficiency (right), one pair a colour.

    table: one line per pair and rank, with source, target, rank, optimal, truncated, bound, efficiency and
    efficiency_truncated. Solid: the best map of each rank; dashed: the ridge map cut to it; dotted: the bound.
    """
    if table.empty:
        return _empty("No efficiency was measured: it needs more held-out rows than both widths together")
    groups = [(pair_title(a, b), part) for (a, b), part in table.groupby(["source", "target"], sort=False)]
    shown = _spread(groups, most)
    titles = ("whitened R², held out", "efficiency: R² as a share of the bound")
    figure = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.07)
    colours = (RED, BLUE, GREEN, ORANGE, PINK, SKY, GREY)
    kinds = ((1, "optimal", "solid"), (1, "truncated", "dash"), (1, "bound", "dot"), (2, "efficiency", "solid"),
             (2, "efficiency_truncated", "dash"))  # fmt: skip
    for i, (title, part) in enumerate(shown):
        name, colour = escape(title), colours[i % len(colours)]
        for column, key, dash in kinds:
            figure.add_trace(go.Scatter(
                x=part["rank"], y=part[key], mode="lines", name=name, legendgroup=name,
                showlegend=key == "optimal", line={"color": colour, "dash": dash, "width": 1.7},
                hovertemplate=f"{name}, {key.replace('_', ' ')}, rank %{{x}}: %{{y:.4f}}<extra></extra>",
            ), row=1, col=column)  # fmt: skip
    for words, dash in (("best map of the rank", "solid"), ("ridge map cut to it", "dash"), ("bound", "dot")):
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="lines", name=words, hoverinfo="skip",
                                    line={"color": "#222", "dash": dash, "width": 1.7}), row=1, col=1)  # fmt: skip
    figure.update_xaxes(title_text="rank of the map", **_log_axis())
    figure.update_yaxes(range=[-0.25, 1.03])
    return _with_note(_style(figure, 460), len(shown), len(groups))


def _with_note(figure: go.Figure, shown: int, every: int) -> go.Figure:
    if shown < every:
        figure.add_annotation(text=f"{shown} of {every} pairs are drawn", xref="paper", yref="paper", x=1, y=1.12,
                              showarrow=False, xanchor="right", font={"size": 12, "color": GREY})  # fmt: skip
    return figure


def verdict_bars(counts: Sequence[Mapping[str, Any]]) -> go.Figure:
    """The share of each verdict among a dictionary's features, one bar a pair.

    counts: one mapping per pair, with source, target and the number of features of each verdict.
    """
    if not counts:
        return _empty("No features were measured: give a dictionary for a target site")
    titles = [escape(pair_title(line["source"], line["target"])) for line in counts]
    figure = go.Figure()
    for verdict, (colour, _) in VERDICT_LOOK.items():
        share = [100 * line[verdict] / max(1, sum(line[v] for v in VERDICT_LOOK)) for line in counts]
        text = [f"{line[verdict]:,}" if part >= 4 else "" for line, part in zip(counts, share, strict=True)]
        figure.add_trace(go.Bar(
            x=share, y=titles, orientation="h", name=verdict, marker_color=colour, text=text, textposition="inside",
            insidetextanchor="middle", textangle=0, hovertemplate=f"{verdict}, %{{y}}: %{{x:.1f}} %<extra></extra>",
        ))  # fmt: skip
    figure.update_xaxes(title_text="features of the target's dictionary (%; numbers are counts)", range=[0, 100])
    legend = {"traceorder": "normal", "orientation": "h", "yanchor": "bottom", "y": 1, "x": 0}
    made = _style(figure, 150 + 28 * len(counts), barmode="stack", legend=legend)
    return made.update_yaxes(autorange="reversed", showgrid=False)


def feature_scatter(tables: Mapping[str, pd.DataFrame], most: int = 6) -> go.Figure:
    """Each feature's R2 under the operator against what the identity carries of it, coloured by verdict; a panel a pair.

    tables: `FeatureVerdicts.frame()` by a title such as "resid_post.0 → 2", with a column `name` where features have
    names. R2 below -0.5 is drawn there.
    """
    shown = _spread(list(tables.items()), most)
    if not shown:
        return _empty("No features were measured: give a dictionary for a target site")
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    full = len(shown) % columns == 0  # where a panel has none below, it keeps the numbers of its axis
    figure = make_subplots(lines, columns, subplot_titles=[escape(t) for t, _ in shown], shared_yaxes=True,
                           shared_xaxes=full, vertical_spacing=0.2 / lines, horizontal_spacing=0.04)  # fmt: skip
    seen: set[str] = set()
    for i, (_, table) in enumerate(shown):
        where = {"row": i // columns + 1, "col": i % columns + 1}
        for verdict, (colour, symbol) in VERDICT_LOOK.items():
            part = table[(table["verdict"] == verdict) & table["r2"].notna()]
            if part.empty:
                continue
            figure.add_trace(go.Scatter(
                x=part["identity_carries"], y=part["r2"].clip(lower=LOWEST), mode="markers", name=verdict,
                text=_feature_texts(part, verdict), legendgroup=verdict, showlegend=verdict not in seen,
                hovertemplate="%{text}<extra></extra>",
                marker={"color": colour, "symbol": symbol, "size": 5, "opacity": 0.7},
            ), **where)  # fmt: skip
            seen.add(verdict)
    figure.update_xaxes(range=[-0.04, 1.04])
    figure.update_xaxes(title_text="share that the identity carries (r²)", row=lines)
    figure.update_yaxes(title_text="R² of the map", col=1)
    figure.update_yaxes(range=[LOWEST - 0.08, 1.08])
    legend = {"orientation": "h", "yanchor": "bottom", "y": 1 + 0.16 / lines, "x": 0, "itemsizing": "constant"}
    return _with_note(_style(figure, 140 + 270 * lines, legend=legend), len(shown), len(tables))


def _feature_texts(part: pd.DataFrame, verdict: str) -> list[str]:
    names = part["name"] if "name" in part else [""] * len(part)
    return [f"feature {n}: {verdict}" + (f"<br>fires on {label(name, 120)}" if name else "")
            + f"<br>R² {r2:.3f}, firing on {int(count):,} tokens"
            for n, name, r2, count in zip(part.index, names, part["r2"], part["count"], strict=True)]  # fmt: skip


def causal_points(table: pd.DataFrame, most: int = 12) -> go.Figure:
    """Rise of log-perplexity of every arm of each pair, with 95 % intervals; on a logarithmic axis where all lie above 0.

    table: one line per pair and arm, with source, target, arm, delta, delta_low, delta_high.
    """
    table = table[table["arm"] != "untouched"] if len(table) else table
    if table.empty:
        return _empty("No causal arms were measured")
    pairs = list(dict.fromkeys(zip(table["source"], table["target"], strict=True)))
    shown = _spread(pairs, most)
    table = table[[pair in shown for pair in zip(table["source"], table["target"], strict=True)]]
    figure, arms = go.Figure(), list(dict.fromkeys(table["arm"]))
    places = {pair: i for i, pair in enumerate(shown)}
    for i, arm in enumerate(arms):
        part, (colour, symbol) = table[table["arm"] == arm], CAUSAL_LOOK.get(str(arm), (BLUE, "circle"))
        value, low, high = (part[f"delta{end}"].to_numpy() for end in ("", "_low", "_high"))
        text = [f"{escape(str(arm))}, {a} to {b}: {v:.4f} nats<br>95 % interval {lo:.4f} to {hi:.4f}"
                for a, b, v, lo, hi in zip(part["source"], part["target"], value, low, high, strict=True)]  # fmt: skip
        # arms of one pair stand side by side, so that intervals do not hide one another
        at = [places[pair] + 0.5 * ((i + 0.5) / len(arms) - 0.5)
              for pair in zip(part["source"], part["target"], strict=True)]  # fmt: skip
        figure.add_trace(go.Scatter(
            x=at, y=value, error_y=_bars(value, low, high), mode="markers", name=escape(str(arm)), text=text,
            marker={"color": colour, "symbol": symbol, "size": 9}, hovertemplate="%{text}<extra></extra>",
        ))  # fmt: skip
    figure.update_xaxes(tickvals=list(places.values()), ticktext=[escape(pair_title(*pair)) for pair in shown],
                        range=[-0.5, len(shown) - 0.5], showgrid=False, zeroline=False)  # fmt: skip
    above = bool((table["delta_low"] > 0).all())
    figure.update_yaxes(title_text="rise of log-perplexity (nats per token)", **(_log_axis() if above else {}))
    return _with_note(_style(figure, 440), len(shown), len(pairs))


def shortcut_points(table: pd.DataFrame, greedy: pd.DataFrame | None = None) -> go.Figure:
    """Rise of log-perplexity against the share of FLOPs saved; `greedy` is the path of the greedy search.

    Points that there is room for bear the blocks that are left out; each says them when pointed at.

    table: `ShortcutCurve.frame()`.
    """
    if table.empty:
        return _empty("No shortcut was measured")
    figure = go.Figure()
    kinds = (("one run of blocks, one map", table, BLUE), ("greedy search (other half)", greedy, RED))
    parts = [(name, part, colour) for name, part, colour in kinds if part is not None and not part.empty]
    every = [part for _, part, _ in parts]
    across = reach((100 * part["saved"] for part in every), 0.03)
    up = reach((part[f"delta{end}"] for part in every for end in ("", "_low", "_high")), 0.06)
    for i, (name, part, colour) in enumerate(parts):
        text = [f"without {label(blocks, 120)}" if blocks else "the whole model" for blocks in part["blocks"]]
        names, places = _named(part, text, across, up) if not i else ([""] * len(text), None)
        figure.add_trace(go.Scatter(
            x=100 * part["saved"], y=part["delta"], mode="lines+markers" if i else "markers+text",
            error_y=_bars(part["delta"], part["delta_low"], part["delta_high"]), name=name, text=names, hovertext=text,
            textposition=places, textfont={"size": 11, "color": GREY},
            marker={"color": colour, "symbol": SYMBOLS[i], "size": 9}, line={"color": colour, "width": 1.6},
            hovertemplate="%{hovertext}: %{y:.4f} nats, %{x:.1f} % saved<extra></extra>",
        ))  # fmt: skip
    figure.update_xaxes(title_text="share of the forward pass's FLOPs saved (%)", range=across)
    figure.update_yaxes(title_text="rise of log-perplexity (nats per token)", range=up)
    return _style(figure, 420)


def _named(part: pd.DataFrame, text: list[str], across: list[float], up: list[float]) -> tuple[list[str], list[str]]:
    """The names that points bear, and where; those that save most choose first, and of those that save the same, the best."""
    order = part.assign(saved=-part["saved"].round(4)).reset_index(drop=True).sort_values(["saved", "delta"]).index
    x, y = shares(100 * part["saved"], across), shares(part["delta"], up)
    found = dict(
        zip(order, label_places([x[i] for i in order], [y[i] for i in order], [text[i] for i in order]), strict=True)
    )
    return ([text[i] if found[i] else "" for i in range(len(text))],
            [found[i] or "middle right" for i in range(len(text))])  # fmt: skip


def _nones(matrix: pd.DataFrame) -> list[list[float | None]]:
    return [[None if v != v else float(v) for v in row] for row in matrix.to_numpy()]
