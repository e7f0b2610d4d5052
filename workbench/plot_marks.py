"""What is laid over a figure: cells that can be clicked and one of them framed, and names of points that do not collide."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go

FRAME = "#D55E00"
"""of the picked cell: it stands out on every colour of the scales"""
LETTER, LINE = 0.011, 0.055
"""width of a letter and height of a line of small print, as shares of a plot about 650 by 300 pixels large"""
GAP = 0.014
"""between a point and its name"""


class Cell(NamedTuple):
    """One cell of a heatmap: its categories across and down, what it says when pointed at, and what a click gives."""

    x: str
    y: str
    text: str
    data: tuple[Any, ...]


def clickable(figure: go.Figure, cells: Sequence[Cell], picked: tuple[str, str] | None = None) -> go.Figure:
    """The figure, its first heatmap's cells to be clicked (plotly selects points, and cells of a heatmap are none), and
    the cell `picked` (x, y) framed.

    Each cell has a mark that cannot be seen, with `data` as its customdata; the nearest one takes a click.
    """
    marker, unseen = {"symbol": "square", "size": 12, "opacity": 0, "color": FRAME}, {"marker": {"opacity": 0}}
    figure.add_trace(go.Scatter(
        x=[c.x for c in cells], y=[c.y for c in cells], text=[c.text for c in cells], customdata=[c.data for c in cells],
        mode="markers", marker=marker, selected=unseen, unselected=unseen, showlegend=False, name="cells",
        hovertemplate="%{text}<extra></extra>",
    ))  # fmt: skip
    heat = figure.data[0]
    if picked is not None and picked[0] in heat.x and picked[1] in heat.y:
        x, y = list(heat.x).index(picked[0]), list(heat.y).index(picked[1])  # of a category axis, places are numbers
        figure.add_shape(type="rect", x0=x - 0.48, x1=x + 0.48, y0=y - 0.48, y1=y + 0.48, xref="x", yref="y",
                         line={"width": 4, "color": FRAME}, name="picked")  # fmt: skip
    # marks would have room around them, the cells of another heatmap beside them none
    across, down = [-0.5, len(heat.x) - 0.5], [-0.5, len(heat.y) - 0.5]
    down = down[::-1] if figure.layout.yaxis.autorange == "reversed" else down
    figure.update_layout(xaxis={"range": across}, yaxis={"range": down, "autorange": None})
    return figure.update_layout(hoverdistance=-1, clickmode="event+select")


def label_places(x: Sequence[float], y: Sequence[float], texts: Sequence[str]) -> list[str]:
    """Where the name of each point of a plot goes, as plotly's textposition; "" where there is no room for it.

    x and y are shares of the plot, 0 to 1. A name lies inside of the plot, and on no other name and no point; the first
    points choose first.

    >>> label_places([0.1, 0.99, 0.5, 0.5], [0.5, 0.5, 0.1, 0.1], ["all", "half", "a", "b"])
    ['middle right', 'middle left', 'middle right', 'middle left']
    """
    taken = [(a - GAP / 2, b - GAP / 2, a + GAP / 2, b + GAP / 2) for a, b in zip(x, y, strict=True)]
    places = []
    for i, (a, b, text) in enumerate(zip(x, y, texts, strict=True)):
        width = LETTER * len(text)
        boxes = {
            "middle right": (a + GAP, b - LINE / 2, a + GAP + width, b + LINE / 2),
            "middle left": (a - GAP - width, b - LINE / 2, a - GAP, b + LINE / 2),
            "top center": (a - width / 2, b + GAP, a + width / 2, b + GAP + LINE),
            "bottom center": (a - width / 2, b - GAP - LINE, a + width / 2, b - GAP),
        }
        others = taken[:i] + taken[i + 1 :]
        free = (where for where, box in boxes.items() if _inside(box) and not any(_overlap(box, o) for o in others))
        place = next(free, "")
        places.append(place)
        if place:
            taken.append(boxes[place])
    return places


def reach(columns: Iterable[Any], room: float) -> list[float]:
    """The range of an axis from the least to the most of some columns, with a share `room` of it at both ends."""
    values = [float(value) for column in columns for value in column]
    low, high = min(values), max(values)
    more = room * (high - low or 1)
    return [low - more, high + more]


def shares(values: Iterable[Any], span: Sequence[float]) -> list[float]:
    """Where values lie on an axis that reaches from `span[0]`, 0, to `span[1]`, 1.

    >>> shares([2.0, 3.0], [2.0, 4.0])
    [0.0, 0.5]
    """
    return [(float(value) - span[0]) / (span[1] - span[0]) for value in values]


Box = tuple[float, float, float, float]


def _inside(box: Box) -> bool:
    return min(box[:2]) >= 0 and max(box[2:]) <= 1


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
