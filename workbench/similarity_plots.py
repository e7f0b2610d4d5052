"""How alike layers are, as plotly figures: a heatmap for each measure, and each layer's best partner beside its null.

They read `LayerSimilarity.frame()` (or similarity.parquet of a run folder) and know nothing of how it was made.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .plot_marks import Cell, clickable
from .plots import BLUE, DIVERGING, GREY, ORANGE, RED, _empty, _style
from .sites import Site

if TYPE_CHECKING:
    import pandas as pd

TITLES = {
    "cka": "linear CKA (0 to 1)",
    "cka_debiased": "linear CKA, debiased (0: none, 1: all)",
    "svcca": "SVCCA: mean correlation (0 to 1)",
    "pwcca": "PWCCA: weighted mean correlation (0 to 1)",
    "procrustes": "Procrustes similarity (0 to 1)",
    "rsa": "RSA: Spearman's correlation",
    "knn": "mutual nearest neighbours (share)",
}
"""of a measure, with its range or unit"""
WRITTEN = 12
"""layers up to which each cell bears its number"""


def similarity_heatmap(
    table: pd.DataFrame, measure: str = "cka_debiased", *, names: tuple[str, str] = ("first model", "second model"),
    picked: tuple[str, str] | None = None,
) -> go.Figure:  # fmt: skip
    """One measure of every pair of layers; a ring marks the best partner of each layer of the first model.

    Pointed at, a cell says its interval and what shuffled prompts give; pairs that are no more alike than those are marked
    with a cross. Colours are centred at 0 where there are values below it.

    Args:
        names: of the two models, for the axes.
        picked: a pair of sites that is framed; the cells can then be clicked, and give their pair as customdata.
    """
    part = table[(table["measure"] == measure) & table["value"].notna()] if "measure" in table else table
    if part.empty:
        return _empty(f"No pair of layers has {_title(measure)}")
    down, across = _ordered(part["a"]), _ordered(part["b"])
    cells = {(line["a"], line["b"]): line for line in part.to_dict("records")}
    z = [[_number(cells.get((a, b))) for b in across] for a in down]
    lows = [v for line in z for v in line if v is not None]
    top = max(lows)
    reach = max(abs(min(lows)), abs(top))
    look = (
        {"colorscale": DIVERGING, "zmin": -reach, "zmax": reach}
        if min(lows) < 0
        else {"colorscale": "Blues", "zmin": 0, "zmax": top or 1.0}
    )
    text = [[_said(cells.get((a, b)), measure) for b in across] for a in down]
    figure = go.Figure(go.Heatmap(
        x=across, y=down, z=z, text=text, xgap=2, ygap=2, hovertemplate="%{text}<extra></extra>", **look,
        texttemplate="%{z:.2f}" if len(across) <= WRITTEN else None,
        colorbar={"title": {"text": _title(measure), "side": "right"}, "thickness": 14},
    ))  # fmt: skip
    best = {
        a: max((b for b in across if (a, b) in cells), key=lambda b: cells[a, b]["value"], default=None) for a in down
    }
    chance = [(a, b) for (a, b), line in cells.items() if not line["beyond"] and line["null"] == line["null"]]
    _marks(figure, [(a, b) for a, b in best.items() if b is not None], "circle-open", 30, ORANGE, "best partner")
    _marks(figure, chance, "x-thin", 9, GREY, "not above shuffled prompts")
    if picked is not None:
        spots = [Cell(b, a, _said(line, measure), (a, b)) for (a, b), line in cells.items()]
        clickable(figure, spots, (picked[1], picked[0]))
    figure.update_xaxes(**_axis(across, names[1]))
    figure.update_yaxes(**_axis(down, names[0]))
    legend = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    return _style(figure, 190 + 34 * min(len(down), 24), legend=legend)


def similarity_best(table: pd.DataFrame, *, names: tuple[str, str] = ("first model", "second model")) -> go.Figure:
    """The best partner of every layer of the first model: its likeness with a 95 % interval, beside that of shuffled prompts;
    one panel a measure.

    The best of many is a little too good; the null is that of the same pair.
    """
    if table.empty or table["value"].isna().all():
        return _empty("No pair of layers was compared")
    kept = table.dropna(subset=["value"])
    measures = [m for m in TITLES if m in set(kept["measure"])]
    columns = min(4, len(measures))
    rows = -(-len(measures) // columns)
    titles = [TITLES[m].partition(" (")[0] for m in measures]
    figure = make_subplots(rows, columns, subplot_titles=titles, shared_yaxes=True, vertical_spacing=0.4 / rows,
                           horizontal_spacing=0.03)  # fmt: skip
    for i, measure in enumerate(measures):
        part = kept[kept["measure"] == measure]
        best = part.loc[part.groupby("a", sort=False)["value"].idxmax()]
        order = _ordered(best["a"])
        lines = [best[best["a"] == a].iloc[0] for a in order]
        row, col = i // columns + 1, i % columns + 1
        said = [f"best partner of {escape(names[0])}'s {line['a']}<br>{_said(line, measure)}" for line in lines]
        bars = {"type": "data", "symmetric": False, "thickness": 1.4, "width": 3,
                "array": [line["high"] - line["value"] for line in lines],
                "arrayminus": [line["value"] - line["low"] for line in lines]}  # fmt: skip
        figure.add_trace(go.Scatter(
            x=order, y=[line["value"] for line in lines], error_y=bars, mode="lines+markers", name="best partner", text=said,
            line={"color": BLUE, "width": 2}, marker={"color": BLUE, "size": 8}, hovertemplate="%{text}<extra></extra>",
            legendgroup="best", showlegend=i == 0,
        ), row=row, col=col)  # fmt: skip
        figure.add_trace(go.Scatter(
            x=order, y=[line["null_high"] for line in lines], mode="lines+markers", name="shuffled prompts, highest draw",
            line={"color": RED, "width": 1.6, "dash": "dash"}, marker={"color": RED, "size": 7, "symbol": "x"},
            legendgroup="null", showlegend=i == 0, hovertemplate="shuffled prompts: %{y:.3f}<extra></extra>",
        ), row=row, col=col)  # fmt: skip
        figure.update_xaxes(**_axis(order, names[0]) | {"title": {"text": "layer"}}, row=row, col=col)
    figure.update_yaxes(range=[min(-0.05, float(kept["value"].min()) - 0.05), 1.05])
    for row in range(1, rows + 1):
        figure.update_yaxes(title_text="likeness (no unit)", row=row, col=1)
    figure.update_annotations(font_size=13)
    sides = f"layers of {escape(names[0])}, partners of {escape(names[1])}"
    legend = {"orientation": "h", "x": 0, "y": 1.12, "yanchor": "bottom", "title": {"text": sides}}
    return _style(figure, 150 + 240 * rows, legend=legend, margin={"l": 60, "r": 20, "t": 110, "b": 56})


def _marks(figure: go.Figure, pairs: list[tuple[str, str]], symbol: str, size: int, colour: str, name: str) -> None:
    if not pairs:
        return
    marker = {"size": size, "symbol": symbol, "color": colour, "line": {"width": 2.5, "color": colour}}
    figure.add_trace(go.Scatter(x=[b for _, b in pairs], y=[a for a, _ in pairs], mode="markers", marker=marker, name=name,
                                hoverinfo="skip", showlegend=True))  # fmt: skip


def _title(measure: str) -> str:
    return TITLES.get(measure) or escape(measure)


def _number(line: Mapping[Any, Any] | None) -> float | None:
    return None if line is None else float(line["value"])


def _said(line: Any, measure: str) -> str:
    if line is None:
        return "not compared"
    get = line.__getitem__
    text = f"{get('a')} with {get('b')}<br>{escape(TITLES.get(measure, measure).partition(' (')[0])} {get('value'):.3f}"
    if get("low") == get("low"):
        text += f"<br>95 % interval {get('low'):.3f} to {get('high'):.3f}"
    if get("null") == get("null"):
        text += f"<br>shuffled prompts {get('null'):.3f}, at most {get('null_high'):.3f}"
    return text + f"<br>{get('rows'):,} rows"


def _ordered(names: pd.Series) -> list[str]:
    return [str(site) for site in sorted({Site.parse(name) for name in names}, key=lambda s: (s.point, s.layer))]


def _axis(names: list[str], model: str) -> dict[str, Any]:
    sites = [Site.parse(name) for name in names]
    axis: dict[str, Any] = {"type": "category", "categoryorder": "array", "categoryarray": names}
    if len({site.point for site in sites}) > 1:
        return axis | {"title": {"text": f"site of {escape(model)}"}}
    return axis | {"title": {"text": f"layer of {escape(model)} ({sites[0].point})"}, "tickvals": names,
                   "ticktext": [str(site.layer) for site in sites]}  # fmt: skip
