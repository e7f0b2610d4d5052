"""What a store holds, as plotly figures: norms by layer and position, dimensions that stand out, rows in a plane.

Every function takes a result and returns a figure; text of others (tokens, labels, prompts) is escaped and cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .plots import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, SYMBOLS, YELLOW, _empty, _style
from .sites import Site
from .store.overview import OUTLIER, StoreOverview
from .visible_text import label

if TYPE_CHECKING:
    import pandas as pd

COLOURS = (BLUE, RED, GREEN, ORANGE, PINK, SKY, YELLOW, "#000000")
REST = "all others"
NONE = "none"
MOST_LETTERS = 40
"""of a token, label or id in a hover text or legend"""
ABOVE = {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0}
NORM = "L2 norm (activation units)"


@runtime_checkable
class Plane(Protocol):
    """What `probes.projection.Projection` is to a figure."""

    @property
    def rows(self) -> Any: ...
    @property
    def points(self) -> Any: ...
    @property
    def axes(self) -> tuple[str, str]: ...
    @property
    def site(self) -> Site: ...


def norms_by_layer(overview: StoreOverview) -> go.Figure:
    """The median norm of a row over layers with the middle half and the middle 90 % of the rows, one colour a point.

    Rows at position 0 have a line of their own, dotted.
    """
    table = overview.norms.dropna(subset=["median"])
    if table.empty:
        return _empty("No row of this store has finite values")
    figure = go.Figure()
    for i, point in enumerate(dict.fromkeys(table["point"])):
        for group in ("others", "first"):
            part = table[(table["point"] == point) & (table["group"] == group)].sort_values("layer")
            if len(part):
                name = f"{point}, position 0" if group == "first" else str(point)
                _band(figure, part["layer"], part, name, COLOURS[i % len(COLOURS)], dotted=group == "first")
    figure.update_xaxes(title_text="layer", dtick=max(1, -(-int(table["layer"].max()) // 20)))
    figure.update_yaxes(title_text=NORM, **_scale(table))
    return _style(figure, 380, showlegend=True, legend=ABOVE)


def norms_by_position(overview: StoreOverview, site: Site | str | int) -> go.Figure:
    """The same over positions within the prompt, at one site; stretches of positions are drawn at their middle."""
    name = _name(overview, site)
    table = overview.positions[overview.positions["site"] == name].dropna(subset=["median"])
    if table.empty:
        return _empty("This store does not say at which position its rows are")
    figure = go.Figure()
    _band(figure, (table["low"] + table["high"]) / 2, table, name, BLUE, dotted=False)
    figure.update_xaxes(title_text="position in the prompt (tokens)")
    figure.update_yaxes(title_text=NORM, **_scale(table))
    return _style(figure, 380, showlegend=False)


def _band(figure: go.Figure, x: Any, part: pd.DataFrame, name: str, colour: str, *, dotted: bool) -> None:
    """A median, with the middle half and the middle 90 % of the rows around it."""
    places = list(map(float, x))
    for low, high, opacity in (("q05", "q95", 0.10), ("q25", "q75", 0.22)):
        if len(places) > 1 and not dotted:
            figure.add_trace(go.Scatter(
                x=places + places[::-1], y=[*part[high], *part[low][::-1]], fill="toself", fillcolor=colour, mode="none",
                opacity=opacity, hoverinfo="skip", showlegend=False, legendgroup=name,
            ))  # fmt: skip
    columns = [part[c] for c in ("n", "median", "q25", "q75", "q05", "q95")]
    text = [f"{name}, {n:,} rows<br>median {m:.4g}<br>middle half {a:.4g} to {b:.4g}<br>middle 90 % {lo:.4g} to {hi:.4g}"
            for n, m, a, b, lo, hi in zip(*columns, strict=True)]  # fmt: skip
    figure.add_trace(go.Scatter(
        x=places, y=list(part["median"]), mode="lines+markers", name=name, legendgroup=name, text=text,
        hovertemplate="%{text}<extra></extra>", line={"color": colour, "width": 2, "dash": "dot" if dotted else "solid"},
        marker={"color": colour, "size": 7, "symbol": "circle-open" if dotted else "circle"},
    ))  # fmt: skip


def _scale(table: pd.DataFrame) -> dict[str, Any]:
    """A logarithmic axis where norms differ by more than a factor of thirty."""
    low, high = float(table["q05"].min()), float(table["q95"].max())
    return {"type": "log", "dtick": 1} if low > 0 and high > 30 * low else {"rangemode": "tozero"}


def outlier_dimensions(overview: StoreOverview, site: Site | str | int) -> go.Figure:
    """The dimensions of a site that stand out most, by their mean magnitude over that of the median dimension.

    Red ones are outliers by the rule of `workbench.store.overview`; rows at position 0 do not count.
    """
    name = _name(overview, site)
    table = overview.dimensions[overview.dimensions["site"] == name].head(24)
    if table.empty:
        return _empty("No row but first ones, so that no dimension can stand out")
    figure = go.Figure()
    for outlier, title, colour in ((True, "outlier", RED), (False, "no outlier", BLUE)):
        part = table[table["outlier"] == outlier]
        if part.empty:
            continue
        text = [f"dimension {d}<br>mean |value| {m:.4g}, standard deviation {s:.4g}, largest {x:.4g}<br>{100 * share:.1f} % "
                f"of rows above {OUTLIER:g} times their root mean square"
                for d, m, s, x, share in zip(*(part[c] for c in ("dim", "mean_abs", "std", "max_abs", "share")),
                                             strict=True)]  # fmt: skip
        figure.add_trace(go.Bar(x=[str(d) for d in part["dim"]], y=list(part["ratio"]), name=title, marker_color=colour,
                                text=text, textposition="none", hovertemplate="%{text}<extra></extra>"))  # fmt: skip
    figure.add_hline(1.0, line={"dash": "dot", "width": 1, "color": "#444"})
    order = [str(d) for d in table["dim"]]
    figure.update_xaxes(title_text="dimension", type="category", categoryorder="array", categoryarray=order)
    figure.update_yaxes(title_text="mean |value| (median dimension = 1)")
    return _style(figure, 380, showlegend=True, legend=ABOVE)


def _name(overview: StoreOverview, site: Site | str | int) -> str:
    return str(Site.parse(site, overview.about["layers"]))


def projection_scatter(plane: Plane, table: pd.DataFrame, colour: str | None = None) -> go.Figure:
    """Rows in a plane, up to some hundred thousand; `customdata` of a point is its row in the store.

    table: what is known of the rows, in the same order: `workbench.store.context.row_frame`, or any other columns beside.
    colour: a column of it. Few values or text: the seven commonest have colours of their own; numbers: a scale.
    """
    figure = go.Figure(_point_traces(plane, table, colour, legend=True))
    figure.update_xaxes(title_text=plane.axes[0], zeroline=False)
    figure.update_yaxes(title_text=plane.axes[1], zeroline=False)
    return _points_style(figure, colour, 620)


def paired_scatter(planes: Sequence[Plane], tables: Sequence[pd.DataFrame], names: Sequence[str],
                   colour: str | None = None) -> go.Figure:  # fmt: skip
    """The same tokens in the planes of two models: point i of one is point i of the other, and has its colour.

    customdata of a point is i. The axes of the second are turned over where that brings it nearer to the first.
    """
    assert len(planes) == len(tables) == len(names) == 2
    assert len(planes[0].rows) == len(planes[1].rows), "one row of each model for each token"
    titles = [label(f"{name}, {plane.site}", 80) for name, plane in zip(names, planes, strict=True)]
    figure = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.08)
    first = np.asarray(planes[0].points, dtype=np.float32)
    number = np.arange(len(first))
    for i, (plane, table) in enumerate(zip(planes, tables, strict=True)):
        points = np.asarray(plane.points, dtype=np.float32)
        points = points * _turned(first, points) if i else points
        known = table.assign(**{colour: tables[0][colour].to_numpy()}) if colour else table
        for trace in _point_traces(plane, known, colour, legend=not i, points=points, number=number):
            figure.add_trace(trace, row=1, col=i + 1)
        figure.update_xaxes(title_text=plane.axes[0], zeroline=False, row=1, col=i + 1)
        figure.update_yaxes(title_text=plane.axes[1], zeroline=False, row=1, col=i + 1)
    return _points_style(figure, colour, 560)


def _turned(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The sign of each axis with which the second plane goes along with the first."""
    return np.where(np.nansum((first - np.nanmean(first, 0)) * second, 0) < 0, -1, 1).astype(np.float32)


def _points_style(figure: go.Figure, colour: str | None, height: int) -> go.Figure:
    title = label(str(colour).removeprefix("meta."), MOST_LETTERS) if colour else ""
    legend = {"title": {"text": title}, "itemsizing": "constant"}
    bar = {"title": {"text": title, "side": "right"}, "thickness": 14}
    return _style(figure, height, legend=legend, dragmode="lasso", uirevision="points", hovermode="closest",
                  coloraxis={"colorscale": "Viridis", "colorbar": bar})  # fmt: skip


def _point_traces(
    plane: Plane, table: pd.DataFrame, colour: str | None, *, legend: bool, points: np.ndarray | None = None,
    number: np.ndarray | None = None,
) -> list[go.Scattergl]:  # fmt: skip
    points = np.asarray(plane.points, dtype=np.float32) if points is None else points
    number = np.asarray(plane.rows) if number is None else number
    assert len(table) == len(points), "a line of the table for each row"
    texts = np.array(_hover_texts(table), dtype=object)
    size = 5 if len(points) <= 5000 else 3
    traces = []
    for name, look, mask in _parts(table, colour):
        marker = {"size": size, "opacity": 0.75, **look}
        traces.append(go.Scattergl(
            x=points[mask, 0], y=points[mask, 1], mode="markers", marker=marker, customdata=number[mask].astype(np.int32),
            text=texts[mask].tolist(), hovertemplate="%{text}<extra></extra>", name=name, legendgroup=name,
            showlegend=legend and bool(name), selected={"marker": {"opacity": 1}}, unselected={"marker": {"opacity": 0.12}},
        ))  # fmt: skip
    return traces


def _parts(table: pd.DataFrame, colour: str | None) -> list[tuple[str, dict[str, Any], np.ndarray]]:
    """(name, marker, which rows) of each trace."""
    if colour is None:
        return [("", {"color": BLUE}, np.ones(len(table), bool))]
    values = table[colour]
    if is_scale(values):
        numbers = values.to_numpy(dtype=np.float64, na_value=np.nan).astype(np.float32)
        return [("", {"color": numbers, "coloraxis": "coloraxis"}, np.ones(len(table), bool))]
    words = values.map(lambda v: NONE if v is None or v != v else str(v)).to_numpy(dtype=object)
    counts = _commonest(words)
    parts = []
    for i, word in enumerate(counts[: len(COLOURS) - 1]):
        look: dict[str, Any] = {"color": COLOURS[i], "symbol": SYMBOLS[i % len(SYMBOLS)].removesuffix("-open")}
        parts.append((label(word, MOST_LETTERS), look, words == word))
    if len(counts) > len(parts):
        rest = ~np.isin(words, counts[: len(parts)])
        look = {"color": GREY, "opacity": 0.35}
        parts.insert(0, (f"{REST} ({len(counts) - len(parts):,} values)", look, rest))
    return parts


def _commonest(words: np.ndarray) -> list[str]:
    """Distinct values, the commonest first; of equally common ones the first by name."""
    from collections import Counter

    return [word for word, _ in sorted(Counter(words.tolist()).items(), key=lambda item: (-item[1], item[0]))]


def is_scale(values: pd.Series) -> bool:
    """Whether a column is drawn on a scale: numbers, of more than eight values."""
    import pandas as pd

    known = values.dropna()
    return (
        bool(len(known)) and pd.api.types.is_numeric_dtype(pd.Series(known.tolist())) and known.nunique() > len(COLOURS)
    )


def _hover_texts(table: pd.DataFrame) -> list[str]:
    """token, row, position, id and label of each row, as plotly shows them."""
    shown = {"token": table.get("token"), "id": table.get("id"), "label": table.get("label")}
    words = {name: _short_texts(column) for name, column in shown.items() if column is not None}
    lines = [f"row {row:,}, position {'?' if p is None or p != p else int(p)}" for row, p in
             zip(table["row"].tolist(), table["position"].tolist(), strict=True)]  # fmt: skip
    empty = [""] * len(lines)
    tokens, ids, labels = (words.get(name, empty) for name in ("token", "id", "label"))
    return [f"{t}<br>{line}<br>{i} {label}" for t, line, i, label in zip(tokens, lines, ids, labels, strict=True)]


def _short_texts(column: pd.Series) -> list[str]:
    """Each value cut and escaped; done once for each distinct one."""
    known: dict[Any, str] = {}
    found = []
    for value in column.tolist():
        if value not in known:
            known[value] = "" if value is None or value != value else label(value, MOST_LETTERS)
        found.append(known[value])
    return found
