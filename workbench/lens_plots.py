"""What a lens reads as plotly figures: a table of layers and tokens, its trajectories, its scores, one cell's tokens.

Every function takes tables (`LensTable.frame()`, `LensScores.frame()`) and returns a figure; text from outside is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .errors import UserError
from .plots import BLUE, DIVERGING, GREEN, GREY, ORANGE, PINK, RED, SKY, SYMBOLS, _empty, _style
from .visible_text import label

if TYPE_CHECKING:
    import pandas as pd

VALUES = {
    "entropy": "entropy (nats)",
    "kl": "KL to the final distribution (nats)",
    "answer_probability": "probability of the answer",
    "answer_rank": "rank of the answer",
    "top_probability": "probability of the likeliest token",
}
"""what cells are coloured by: a column of the frame, and its words with units"""
LOGARITHMIC = ("answer_rank",)
COLOURS = (BLUE, RED, GREEN, ORANGE, PINK, SKY, GREY)
MOST_TOKENS = 400
"""tokens across one figure; of more, the last are drawn and the figure says so"""
NAMED_TOKENS = 40
"""tokens across up to which each cell bears its token"""
SIGNS, LINE = 9, 110
"""characters of a token in a cell at most, and of all cells of a line together"""
EMBEDDINGS, SHORT = "embeddings", "emb."
TICKS = 9


def lens_heatmap(table: pd.DataFrame, value: str = "entropy", *, title: str = "", low: float | None = None,
                 high: float | None = None) -> go.Figure:  # fmt: skip
    """Layers up, tokens across, coloured by one of `VALUES`, with the likeliest next token in each cell.

    Over each cell lies a point without colour, which can be clicked; its `customdata` is [site, position].

    Args:
        table: `LensTable.frame()`.
        low, high: ends of the colours, where several figures share them.
    """
    _check(value)
    if table.empty:
        return _empty("No tokens: give a prompt")
    part, left_out = _window(table)
    x, y, grid = _grid(part, value)
    look = _colours(part[value], value)
    look |= {"zmin": low, "zmax": high} if low is not None and high is not None else {}
    figure = go.Figure(go.Heatmap(x=x, y=y, z=grid, xgap=1, ygap=1, hoverinfo="skip", **look))
    return _layers(figure, part, _texts(part, value), title, left_out)


def shared_range(tables: Sequence[pd.DataFrame], value: str) -> tuple[float, float]:
    """The ends of the colours for heatmaps that are looked at together: `lens_heatmap(..., low=, high=)`."""
    _check(value)
    if value.endswith("probability"):
        return 0.0, 1.0
    shades = [shade for table in tables for v in table[value] if (shade := _shade(v, value)) is not None]
    return 0.0, max([1.0 if value in LOGARITHMIC else 0.1, *shades])


def lens_difference(before: pd.DataFrame, after: pd.DataFrame, value: str = "entropy", *, title: str = "") -> go.Figure:
    """After less before, cell by cell, of one of `VALUES` (of the rank: in factors of ten), with the token after in it.

    Raises UserError for tables of other tokens or sites.
    """
    _check(value)
    if before.empty or after.empty:
        return _empty("No tokens: give a prompt")
    if before[["site", "position"]].values.tolist() != after[["site", "position"]].values.tolist():
        raise UserError("two lens tables are compared cell by cell: give tables of one prompt and one model")
    (first, left_out), (second, _) = _window(before), _window(after)
    x, y, a = _grid(first, value)
    b = _grid(second, value)[2]
    change = [[_less(q, p) for p, q in zip(*pair, strict=True)] for pair in zip(a, b, strict=True)]
    reach = max((abs(v) for line in change for v in line if v is not None), default=0.0) or 1.0
    words = f"change of the {VALUES[value]}" + (", powers of ten" if value in LOGARITHMIC else "")
    figure = go.Figure(go.Heatmap(
        x=x, y=y, z=change, xgap=1, ygap=1, hoverinfo="skip", colorscale=DIVERGING, zmin=-reach, zmax=reach,
        colorbar=_bar(words),
    ))  # fmt: skip
    texts = [f"before: {p}<br>after: {q}" for p, q in zip(_texts(first, value), _texts(second, value), strict=True)]
    return _layers(figure, second, texts, title, left_out)


def _check(value: str) -> None:
    if value not in VALUES:
        raise UserError(f"unknown value {value!r} of a lens table; allowed: {', '.join(VALUES)}")


def _window(table: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """The lines of the last tokens that fit, and how many tokens are left out."""
    positions = sorted(set(table["position"]))
    left_out = max(0, len(positions) - MOST_TOKENS)
    return (table[table["position"] >= positions[left_out]] if left_out else table), left_out


def _grid(part: pd.DataFrame, value: str) -> tuple[list[int], list[str], list[list[float | None]]]:
    """Positions, layers from the embeddings up, and the values as they are coloured; None where there is none."""
    sites = list(dict.fromkeys(part["site"]))
    lines = [part[part["site"] == site] for site in sites]
    grid = [[_shade(v, value) for v in line[value]] for line in lines]
    return list(lines[0]["position"]), [str(line["layer"].iloc[0]) for line in lines], grid


def _shade(v: float, value: str) -> float | None:
    if not math.isfinite(v):
        return None
    return math.log10(v) if value in LOGARITHMIC else float(v)


def _less(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _colours(values: Any, value: str) -> dict[str, Any]:
    """The scale and its bar; probabilities run from 0 to 1, ranks in powers of ten."""
    bar = _bar(VALUES[value])
    if value in LOGARITHMIC:
        top = max(1, math.ceil(math.log10(max([v for v in values if math.isfinite(v)], default=10))))
        ticks = list(range(top + 1))
        return {
            "colorscale": "Cividis_r",
            "colorbar": {**bar, "tickvals": ticks, "ticktext": [f"{10**t:,}" for t in ticks]},
        }
    if value.endswith("probability"):
        return {"colorscale": "Cividis", "colorbar": bar, "zmin": 0, "zmax": 1}
    return {"colorscale": "Cividis_r", "colorbar": bar}


def _bar(words: str) -> dict[str, Any]:
    """Lying above the figure, where it takes no room from the tokens."""
    return {"title": {"text": words, "side": "top", "font": {"size": 12}}, "thickness": 8, "orientation": "h", "len": 0.4,
            "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom", "xpad": 0, "tickfont": {"size": 11}}  # fmt: skip


def _texts(part: pd.DataFrame, value: str) -> list[str]:
    """The hover text of each cell, in the order of the frame's lines."""
    found = []
    columns = ("layer", "position", "token", "top", "top_probability", "entropy", "kl", "answer", "answer_probability",
               "answer_rank")  # fmt: skip
    for layer, position, token, top, p, entropy, kl, answer, q, rank in part[list(columns)].itertuples(index=False):
        lines = [
            f"{'embeddings' if layer == EMBEDDINGS else f'layer {layer}'}, token {position} {piece(token)}",
            f"next: {piece(top)} {p:.3f}", f"entropy {entropy:.3f}, KL {kl:.3f} nats",
        ]  # fmt: skip
        if math.isfinite(rank):
            lines.append(f"answer {piece(answer)}: {q:.3f}, rank {rank:,.0f}")
        found.append("<br>".join(lines))
    return found


def piece(text: str, most: int = 40) -> str:
    """A token as it is shown in figures: spaces and breaks seen, cut, escaped.

    >>> piece(" <b>"), piece("\\n"), piece("x" * 50, 3)
    ('·&lt;b&gt;', '⏎', 'xxx…')
    """
    return label(text, most, spaces=True)


def _layers(figure: go.Figure, part: pd.DataFrame, texts: list[str], title: str, left_out: int) -> go.Figure:
    """Axes, the tokens in the cells, and the points that are clicked, over a heatmap."""
    positions = sorted(set(part["position"]))
    layers = list(dict.fromkeys(part["layer"]))
    if len(positions) <= NAMED_TOKENS:
        tops = list(part["top"])
        across = len(positions)
        signs = max(2, min(SIGNS, LINE // across))
        figure.data[0].update(
            texttemplate="%{text}",
            textfont={"size": 11},
            text=[[piece(t, signs) for t in tops[i * across : (i + 1) * across]] for i in range(len(layers))],
        )
    # what is hovered over and clicked: a heatmap's own cells cannot be selected
    figure.add_trace(go.Scatter(
        x=list(part["position"]), y=list(part["layer"]), mode="markers", text=texts,
        customdata=part[["site", "position"]].values.tolist(), marker={"symbol": "square", "size": 18, "opacity": 0},
        hovertemplate="%{text}<extra></extra>", showlegend=False, selected={"marker": {"opacity": 0}},
        unselected={"marker": {"opacity": 0}},
    ))  # fmt: skip
    tokens = dict(zip(part["position"], part["token"], strict=True))
    named = positions if len(positions) <= NAMED_TOKENS else positions[:: math.ceil(len(positions) / NAMED_TOKENS)]
    figure.update_xaxes(title_text="token of the prompt (its place from 0)", tickvals=named, tickangle=-60, showgrid=False,
                        ticktext=[f"{p} {piece(tokens[p], SIGNS)}" for p in named], zeroline=False)  # fmt: skip
    figure.update_yaxes(
        title_text="after layer", type="category", categoryorder="array", categoryarray=layers, showgrid=False
    )
    said = f"the last {len(positions)} of {len(positions) + left_out} tokens" if left_out else ""
    heading = " · ".join(filter(None, (label(title, 80), said)))
    layout: dict[str, Any] = {"title": {"text": heading, "font": {"size": 14}}} if heading else {}
    return _style(
        figure,
        225 + 28 * len(layers),
        margin={"l": 60, "r": 16, "t": 70, "b": 40},
        clickmode="event+select",
        dragmode="pan",
        **layout,
    )


def lens_curves(
    tables: Mapping[str, pd.DataFrame], values: Sequence[str] = ("entropy", "kl", "answer_rank"), *,
    position: int | None = None,
) -> go.Figure:  # fmt: skip
    """Values by layer, one line a table: at one position, or the mean over the tokens (of the rank: the median).

    tables: `LensTable.frame()` by name, such as plain and pasted. Without a position, bands are the middle half of the
    tokens.
    """
    for value in values:
        _check(value)
    shown = {name: t if position is None else t[t["position"] == position] for name, t in tables.items()}
    if not any(len(t) for t in shown.values()):
        return _empty("No tokens: give a prompt, and a place in it")
    figure = make_subplots(1, len(values), subplot_titles=[VALUES[v] for v in values], horizontal_spacing=0.06)
    for i, (name, table) in enumerate(shown.items()):
        for column, value in enumerate(values, 1):
            _curve(figure, column, label(name, 80), table, value, i, band=position is None)
    layers = [str(layer) for layer in dict.fromkeys(next(iter(shown.values()))["layer"])]
    figure.update_xaxes(title_text="after layer", type="category", tickangle=0, tickvals=_some(layers),
                        ticktext=[SHORT if layer == EMBEDDINGS else layer for layer in _some(layers)])  # fmt: skip
    for column, value in enumerate(values, 1):
        axis = {"type": "log", "dtick": 1} if value in LOGARITHMIC else {"rangemode": "tozero"}
        figure.update_yaxes(row=1, col=column, **axis)
    return _style(
        figure,
        340,
        legend={"orientation": "h", "y": 1.14, "yanchor": "bottom", "x": 0},
        margin={"l": 50, "r": 10, "t": 90, "b": 50},
    )


def _some(layers: list[str]) -> list[str]:
    """Layers evenly spread, so that their numbers stand side by side."""
    return layers[:: math.ceil(len(layers) / TICKS)]


def _curve(
    figure: go.Figure, column: int, name: str, table: pd.DataFrame, value: str, number: int, *, band: bool
) -> None:
    groups = table.groupby("layer", sort=False)[value]
    middle = groups.median() if value in LOGARITHMIC else groups.mean()
    x, colour = [str(layer) for layer in middle.index], COLOURS[number % len(COLOURS)]
    if band:
        low, high = groups.quantile(0.25).reindex(middle.index), groups.quantile(0.75).reindex(middle.index)
        figure.add_trace(go.Scatter(
            x=x + x[::-1], y=[*high, *reversed(list(low))], fill="toself", fillcolor=colour, opacity=0.15, mode="none",
            hoverinfo="skip", showlegend=False, legendgroup=name,
        ), row=1, col=column)  # fmt: skip
    figure.add_trace(go.Scatter(
        x=x, y=list(middle), mode="lines+markers", name=name, legendgroup=name, showlegend=column == 1,
        line={"color": colour, "width": 2}, marker={"color": colour, "symbol": SYMBOLS[number % len(SYMBOLS)], "size": 8},
        hovertemplate=f"{name}, after layer %{{x}}: %{{y:.4g}}<extra></extra>",
    ), row=1, col=column)  # fmt: skip


def lens_scores_curves(table: pd.DataFrame) -> go.Figure:
    """KL to the model's own predictions by layer, one line a lens, with 95 % intervals, on a logarithmic axis.

    table: `LensScores.frame()`: lens, layer, kl, kl_low, kl_high.
    """
    if table.empty:
        return _empty("No lens was scored")
    figure = go.Figure()
    for i, (name, part) in enumerate(table.groupby("lens", sort=False)):
        colour = COLOURS[i % len(COLOURS)]
        kl, low, high = (part[column].to_numpy() for column in ("kl", "kl_low", "kl_high"))
        figure.add_trace(go.Scatter(
            x=[str(layer) for layer in part["layer"]], y=kl, mode="lines+markers", name=label(name, 80),
            error_y={"type": "data", "symmetric": False, "array": high - kl, "arrayminus": kl - low, "thickness": 1.4},
            line={"color": colour, "width": 2}, marker={"color": colour, "symbol": SYMBOLS[i % len(SYMBOLS)], "size": 8},
            hovertemplate=f"{label(name, 80)} lens, after layer %{{x}}: %{{y:.4g}} nats per token<extra></extra>",
        ))  # fmt: skip
    figure.update_xaxes(title_text="after layer", type="category")
    figure.update_yaxes(title_text="KL to the model's own prediction<br>(nats per token, held-out prompts)", type="log")
    return _style(figure, 340)


def token_bars(tables: Mapping[str, pd.DataFrame], title: str = "") -> go.Figure:
    """The likeliest next tokens of one cell, a colour a table: `LensTable.top` by name, such as plain and pasted."""
    if not any(len(t) for t in tables.values()):
        return _empty("No cell is chosen")
    ids = list(dict.fromkeys(i for table in tables.values() for i in table["id"]))
    words = {i: piece(t, 24) for table in tables.values() for i, t in zip(table["id"], table["token"], strict=True)}
    figure = go.Figure()
    for number, (name, table) in enumerate(tables.items()):
        known = dict(zip(table["id"], table["probability"], strict=True))
        figure.add_trace(go.Bar(
            y=[str(i) for i in ids], x=[known.get(i) for i in ids], orientation="h", name=label(name, 80),
            marker_color=COLOURS[number % len(COLOURS)],
            hovertemplate=f"{label(name, 80)}: %{{x:.4f}}<extra></extra>",
        ))  # fmt: skip
    figure.update_xaxes(title_text="probability of the next token", range=[0, 1])
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=[str(i) for i in reversed(ids)],
                        tickvals=[str(i) for i in ids], ticktext=[words[i] for i in ids])  # fmt: skip
    layout: dict[str, Any] = {"title": {"text": label(title, 80), "font": {"size": 14}}} if title else {}
    return _style(
        figure,
        150 + 26 * len(ids),
        barmode="group",
        **layout,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
