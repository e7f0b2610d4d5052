"""Probe results to plotly figures: the curve over layers beside its controls, calibration and confusion, a strip of tokens.

They read tables (`ProbeCurve.frame()`, `TokenScores.frame()`) and the arrays of `HeldOut`, and know nothing of probes.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .plots import BLUE, DIVERGING, GREEN, GREY, ORANGE, PINK, RED, SKY, SYMBOLS, _empty, _style
from .sites import Site
from .visible_text import label

if TYPE_CHECKING:
    import pandas as pd

COLOURS = (BLUE, RED, GREEN, SKY, PINK, ORANGE)
SCORE_WORDS = {"accuracy": "accuracy", "auroc": "AUROC", "r2": "R²", "brier": "Brier score"}
CELL_LETTERS, HOVER_LETTERS = 7, 200
MOST_CELLS = 800
NAMED_CLASSES = 12


def probe_layers(table: pd.DataFrame, score: str = "", *, most: int = 6) -> go.Figure:
    """A figure of every probe over the layers, a colour for each choice of positions, with 95 % intervals.

    table: `ProbeCurve.frame()`. score: accuracy, auroc, r2 or brier; unless given, what the table has first. Beside accuracy
    and R2: the control task (dashed), shuffled labels (dotted), the words or tokens alone and the commonest class (lines).
    """
    known = [name for name in SCORE_WORDS if name in table]
    if not known or table.empty:
        return _empty("No probe was trained: give a store and a label")
    name = score or known[0]
    if name not in known:
        return _empty(f"These probes have no {escape(name)}; they have {', '.join(known)}")
    figure = go.Figure()
    places = list(dict.fromkeys(table["site"]))
    groups = list(table.groupby("positions", sort=False))
    headline = name in ("accuracy", "r2")
    for i, (positions, part) in enumerate(groups[:most]):
        colour, mark = COLOURS[i % len(COLOURS)], SYMBOLS[i % len(SYMBOLS)]
        alone = len(groups) == 1
        _line(figure, part, name, "probe" if alone else f"probe, {positions}", colour, mark, "solid")
        if headline:
            _line(figure, part, "control", "control task" if alone else f"control task, {positions}", PINK if alone else colour,
                  "x", "dash", group="control")  # fmt: skip
            if alone:
                _line(figure, part, "shuffled", "shuffled labels", ORANGE, "cross", "dot")
                _line(figure, part, "words", "words alone", GREEN, None, "longdash")
                _line(
                    figure, part, "chance", "commonest class" if name == "accuracy" else "mean", "#000000", None, "dot"
                )
    figure.update_xaxes(**_layer_axis(places))
    title = SCORE_WORDS[name] + " on held-out prompts"
    figure.update_yaxes(title_text=title, **({} if name == "r2" else {"range": [-0.02, 1.02]}))
    made = _style(figure, 400)
    if len(groups) > most:
        made.add_annotation(text=f"{most} of {len(groups)} choices of positions are drawn", xref="paper", yref="paper", x=1,
                            y=1.1, showarrow=False, xanchor="right", font={"size": 12, "color": GREY})  # fmt: skip
    return made


def _line(
    figure: go.Figure,
    part: pd.DataFrame,
    key: str,
    title: str,
    colour: str,
    mark: str | None,
    dash: str,
    group: str = "",
) -> None:
    if key not in part or part[key].isna().all():
        return
    value = part[key].tolist()
    bars = None
    spans = [""] * len(value)
    if f"{key}_low" in part and mark is not None:
        low, high = part[f"{key}_low"].tolist(), part[f"{key}_high"].tolist()
        bars = {"type": "data", "symmetric": False, "array": [h - v for h, v in zip(high, value, strict=True)],
                "arrayminus": [v - lo for lo, v in zip(low, value, strict=True)], "thickness": 1.4, "width": 3}  # fmt: skip
        spans = [f"<br>95 % interval {lo:.3f} to {h:.3f}" for lo, h in zip(low, high, strict=True)]
    text = [f"{escape(title)}, {site}: {v:.3f}{span}" for site, v, span in zip(part["site"], value, spans, strict=True)]
    figure.add_trace(go.Scatter(
        x=part["site"].tolist(), y=value, error_y=bars, mode="lines" if mark is None else "lines+markers", name=escape(title),
        legendgroup=group or None, line={"color": colour, "dash": dash, "width": 1.4 if mark is None else 2}, text=text,
        marker={"color": colour, "symbol": mark or "circle", "size": 8}, hovertemplate="%{text}<extra></extra>",
    ))  # fmt: skip


def _layer_axis(names: list[str]) -> dict[str, Any]:
    """An axis of sites: layer numbers where all are of one point, which the title then names."""
    sites = [Site.parse(name) for name in names]
    axis: dict[str, Any] = {"type": "category", "categoryorder": "array", "categoryarray": names}
    if len({site.point for site in sites}) > 1:
        return axis | {"title": {"text": "site"}}
    return axis | {"title": {"text": f"layer ({sites[0].point})"}, "tickvals": names,
                   "ticktext": [str(site.layer) for site in sites]}  # fmt: skip


def probe_calibration(
    reliability: Sequence[Sequence[float]], ece: float, confusion: Any = (), classes: Sequence[str] = ()
) -> go.Figure:
    """How often the likeliest class is right, by how likely it was said to be; beside it which class was taken for which.

    reliability: (mean confidence, share that was right, rows) of each bin; confusion [true, predicted] rows: both of `HeldOut`.
    """
    if not reliability:
        return _empty("A quantity has no classes, and so neither calibration nor confusion")
    two = len(classes) > 0
    titles = [f"calibration (expected error {ece:.3f})", *(["true class and predicted class (rows)"] if two else [])]
    figure = make_subplots(1, 2 if two else 1, subplot_titles=titles, horizontal_spacing=0.16)
    figure.add_trace(go.Scatter(x=[0, 1], y=[0, 1], mode="lines", hoverinfo="skip", showlegend=False,
                                line={"color": GREY, "dash": "dot", "width": 1.2}), row=1, col=1)  # fmt: skip
    most = max(count for _, _, count in reliability)
    figure.add_trace(go.Scatter(
        x=[c for c, _, _ in reliability], y=[a for _, a, _ in reliability], mode="lines+markers", showlegend=False,
        line={"color": BLUE, "width": 1.6}, customdata=[n for _, _, n in reliability],
        marker={"color": BLUE, "size": [7 + 15 * (n / most) ** 0.5 for _, _, n in reliability]},
        hovertemplate="said %{x:.3f}, right %{y:.3f}, %{customdata:,} rows<extra></extra>",
    ), row=1, col=1)  # fmt: skip
    figure.update_xaxes(title_text="confidence", range=[-0.02, 1.02], row=1, col=1)
    figure.update_yaxes(title_text="share that was right", range=[-0.02, 1.05], row=1, col=1)
    if two:
        _confusion(figure, confusion, [label(c, 24) for c in classes])
    return _style(figure, 400)


def _confusion(figure: go.Figure, confusion: Any, names: list[str]) -> None:
    counts = [[int(v) for v in row] for row in confusion]
    shares = [[v / max(1, sum(row)) for v in row] for row in counts]
    shown = names if len(set(names)) == len(names) else [f"{i}: {name}" for i, name in enumerate(names)]
    heat = go.Heatmap(
        x=shown, y=shown, z=shares, colorscale="Blues", zmin=0, zmax=1, xgap=2, ygap=2,
        text=[[f"{v:,}" for v in row] for row in counts], texttemplate="%{text}" if len(names) <= NAMED_CLASSES else None,
        colorbar={"title": {"text": "share of the true class", "side": "right"}, "thickness": 14},
        hovertemplate="true %{y}, predicted %{x}: %{text} rows, %{z:.1%}<extra></extra>",
    )  # fmt: skip
    figure.add_trace(heat, row=1, col=2)
    figure.update_xaxes(title_text="predicted", type="category", row=1, col=2)
    figure.update_yaxes(title_text="true", type="category", autorange="reversed", row=1, col=2)


def token_strip(table: pd.DataFrame, name: str = "score", unit: str = "log-odds, nats", *, columns: int = 14,
                most: int = MOST_CELLS) -> go.Figure:  # fmt: skip
    """A text as a strip of its tokens, each coloured by its score: blue above 0, brown below; a quantity about its mean.

    table: `TokenScores.frame()`: position, token, score, and probability where the score is of a class. Of more than `most`
    tokens the first are drawn, and the figure says so.
    """
    if table.empty:
        return _empty("No token to show")
    whole, table = len(table), table.head(most)
    scores = [float(v) for v in table["score"]]
    centre = 0.0 if "probability" in table else sum(scores) / len(scores)
    reach = max(abs(v - centre) for v in scores) or 1.0
    chances = table["probability"].tolist() if "probability" in table else [None] * len(table)
    hover = [f"position {p}: {label(t, HOVER_LETTERS)}<br>{v:.3f} ({escape(unit)})"
             + (f"<br>probability {c:.3f}" if c is not None else "")
             for p, t, v, c in zip(table["position"], table["token"], scores, chances, strict=True)]  # fmt: skip
    words = [label(t, CELL_LETTERS) for t in table["token"]]
    lines = -(-len(scores) // columns)

    def cells(values: list[Any]) -> list[list[Any]]:
        padded = values + [None] * (lines * columns - len(values))
        return [padded[i * columns : (i + 1) * columns] for i in range(lines)]

    figure = go.Figure(go.Heatmap(
        z=cells(scores), text=[[t or "" for t in row] for row in cells(words)], texttemplate="%{text}",
        customdata=[[t or "" for t in row] for row in cells(hover)], hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=False, xgap=2, ygap=4, colorscale=DIVERGING, zmid=centre, zmin=centre - reach, zmax=centre + reach,
        textfont={"size": 12}, colorbar={"title": {"text": escape(unit), "side": "right"}, "thickness": 14},
    ))  # fmt: skip
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False, autorange="reversed")
    said = label(name, 80) + ("" if whole <= most else f" (the first {most} of {whole:,} tokens)")
    margin = {"l": 10, "r": 20, "t": 50, "b": 20}
    return _style(figure, 130 + 30 * lines, title={"text": said, "font": {"size": 14}}, margin=margin)


def direction_table(table: pd.DataFrame) -> go.Figure:
    """AUROC of every direction over the layers, one line a method, with 95 % intervals; see `DirectionSet.frame()`."""
    if table.empty:
        return _empty("No direction was found")
    figure = go.Figure()
    for i, (method, part) in enumerate(table.groupby("method", sort=False)):
        _line(figure, part, "auroc", str(method), COLOURS[i % len(COLOURS)], SYMBOLS[i % len(SYMBOLS)], "solid")
    figure.update_xaxes(**_layer_axis(list(dict.fromkeys(table["site"]))))
    figure.update_yaxes(title_text="AUROC on held-out prompts", range=[-0.02, 1.02])
    return _style(figure, 400)
