"""Results to plotly figures, for notebooks, reports and the explorer alike: every function returns one, none shows it.

They read the dictionary of metrics.json (`summary.load_metrics`) and draw what is there: where a figure has nothing to
show, it says so, and what would fill it, in its own frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .plot_marks import Cell, clickable
from .summary import Metrics, arm_title, arms_of, get, number, score_name

# Okabe and Ito's colours, which stay apart for every common kind of colour blindness; and a marker for each, for print
ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK, GREY = (
    "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#6E6E6E",
)  # fmt: skip
ARM_STYLE = {
    "donor_base": (GREY, "circle-open"), "donor_adapter": (GREY, "circle"), "base": ("#000000", "square-open"),
    "native": (BLUE, "square"), "paste": (RED, "diamond"), "pinv": (PINK, "diamond-open"),
    "random_converter": (SKY, "x"), "shuffled_pairs": (GREEN, "cross"), "mean_delta": (ORANGE, "triangle-up"),
}  # fmt: skip
BEHAVIOUR_COLOURS = (BLUE, RED, GREEN, ORANGE, PINK, SKY, GREY)
SYMBOLS = ("circle", "diamond-open", "x", "triangle-up", "cross", "square-open")
DIVERGING = [[0.0, "#B35806"], [0.25, "#F1A340"], [0.5, "#F7F7F7"], [0.75, "#67A9CF"], [1.0, "#2166AC"]]
BLACKS = ("#000000", "#000", "black", "#222")
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def _style(figure: go.Figure, height: int, **layout: Any) -> go.Figure:
    """The house look: white, light grid, no border, one font."""
    base = {
        "template": "plotly_white", "height": height, "font": {"family": FONT, "size": 13, "color": "#222"},
        "margin": {"l": 60, "r": 20, "t": 56, "b": 56}, "hoverlabel": {"align": "left"},
    }  # fmt: skip
    figure.update_layout(**{**base, **layout})
    figure.update_xaxes(gridcolor="#ececec", zerolinecolor="#bdbdbd", automargin=True)
    figure.update_yaxes(gridcolor="#ececec", zerolinecolor="#bdbdbd", automargin=True)
    return figure


def on_dark(figure: go.Figure) -> go.Figure:
    """The same figure for a dark page: light text and lines on nothing, black marks white, all else as it is."""
    drawn = go.Figure(figure)
    drawn.update_layout(template="plotly_dark", font_color="#E8E8E8", paper_bgcolor="rgba(0,0,0,0)",
                        plot_bgcolor="rgba(0,0,0,0)")  # fmt: skip
    drawn.update_xaxes(gridcolor="#3A3F4A", zerolinecolor="#6A6F7A")
    drawn.update_yaxes(gridcolor="#3A3F4A", zerolinecolor="#6A6F7A")
    for trace in drawn.data:
        marker = getattr(trace, "marker", None)
        parts = (getattr(trace, part, None) for part in ("line", "error_y", "error_x"))
        for holder in (trace, marker, getattr(marker, "line", None), *parts):
            colour = getattr(holder, "color", None)
            if isinstance(colour, str) and colour in BLACKS:  # others are a colour for each point
                holder.color = "#FFFFFF"
    for part in (*drawn.layout.annotations, *drawn.layout.shapes):
        for holder in (getattr(part, "font", None), getattr(part, "line", None)):
            if holder is not None and holder.color in (*BLACKS, "#444"):
                holder.color = "#E8E8E8"
    return drawn


def _empty(why: str) -> go.Figure:
    figure = go.Figure()
    figure.add_annotation(text=why, showarrow=False, x=0.5, y=0.5, xref="paper", yref="paper", font_size=14)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return _style(figure, 140)


def _behaviours(metrics: Metrics) -> dict[str, Any]:
    return dict(get(metrics, "behaviours") or {})


def _error(cell: Metrics, scale: float = 1.0) -> dict[str, Any] | None:
    """Plotly's asymmetric error of one point {"value", "low", "high"}."""
    value, low, high = (number(cell.get(key)) for key in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return None
    return {"type": "data", "symmetric": False, "array": [(high - value) * scale], "thickness": 1.6, "width": 4,
            "arrayminus": [(value - low) * scale]}  # fmt: skip


def arms(metrics: Metrics) -> go.Figure:
    """Every arm of every behaviour with its 95 % interval: the score above (Wilson), the log-odds below (Student's t).

    The dotted line is the plain recipient; what lies on it changed nothing.
    """
    behaviours = _behaviours(metrics)
    order = list(dict.fromkeys(arm for b in behaviours.values() for arm in arms_of(b)))
    if not order:
        return _empty("No arms were measured: run a job with at least one behaviour")
    rows = (("rate", 100.0), ("log_odds", 1.0))
    titles = [escape(f"{name} (n = {b['n']})" if b.get("n") else name) for name, b in behaviours.items()]
    figure = make_subplots(2, len(behaviours), shared_yaxes=True, subplot_titles=titles, vertical_spacing=0.16,
                           horizontal_spacing=0.035)  # fmt: skip
    for column, (name, behaviour) in enumerate(behaviours.items(), 1):
        for row, (key, scale) in enumerate(rows, 1):
            for arm in arms_of(behaviour):
                _arm_point(figure, row, column, arm, behaviour["arms"][arm].get(key) or {}, scale, name)
            plain = number(get(behaviour, "arms", "base", key, "value"))
            if plain is not None:
                figure.add_vline(plain * scale, line={"dash": "dot", "width": 1, "color": "#444"}, row=row, col=column)
        figure.update_xaxes(title_text=escape(f"{score_name(behaviour)} (%)"), range=[-2, 102], row=1, col=column)
        figure.update_xaxes(title_text="log-odds (nats)", row=2, col=column)
    figure.update_yaxes(categoryorder="array", categoryarray=[escape(arm_title(a)) for a in reversed(order)])
    return _style(figure, 150 + 2 * 30 * len(order), showlegend=False)


def _arm_point(figure: go.Figure, row: int, column: int, arm: str, cell: Metrics, scale: float, name: str) -> None:
    value = number(cell.get("value"))
    if value is None:
        return
    colour, symbol = ARM_STYLE.get(arm, (GREY, "circle"))
    low, high = number(cell.get("low")), number(cell.get("high"))
    span = "" if low is None or high is None else f"<br>95 % interval {low * scale:.2f} to {high * scale:.2f}"
    title = escape(arm_title(arm))
    figure.add_trace(
        go.Scatter(
            x=[value * scale], y=[title], mode="markers", error_x=_error(cell, scale), name=title,
            marker={"color": colour, "symbol": symbol, "size": 10, "line": {"width": 2, "color": colour}},
            hovertemplate=f"{escape(name)}, {title}: %{{x:.2f}}{span}<extra></extra>",
        ),
        row=row, col=column,
    )  # fmt: skip


def candidates(metrics: Metrics) -> list[dict[str, Any]]:
    """All forecast candidates of a run, each with its behaviour."""
    return [
        {**candidate, "behaviour": name, "off": worst_off(candidate.get("off"))}
        for name, behaviour in _behaviours(metrics).items()
        for candidate in get(behaviour, "forecast", "candidates") or []
    ]


def worst_off(off: Any) -> float | None:
    """The effect off target of the largest size, where several were forecast ({"neutral text": 0.1, ...})."""
    several = [v for v in off.values() if number(v) is not None] if isinstance(off, Mapping) else []
    return max(several, key=abs) if several else number(off)


def measured(metrics: Metrics) -> list[dict[str, Any]]:
    """The candidates that were both forecast and measured."""
    both = ("on", "measured_on")
    return [c for c in candidates(metrics) if all(number(c.get(key)) is not None for key in both)]


def _describe(c: Metrics) -> str:
    def show(key: str, digits: int = 2) -> str:
        value = number(c.get(key))
        return "not measured" if value is None else f"{value:.{digits}f}"

    lines = [
        f"{c.get('behaviour', '')}: {c.get('donor_site')} to {c.get('recipient_site')}",
        f"{c.get('method')}, alpha {c.get('alpha')}, strength {show('strength')}",
        f"on target: forecast {show('on')}, measured {show('measured_on')}",
        f"off target: forecast {show('off')}, measured {show('measured_off')}",
        f"length {show('sigma', 1)} standard deviations, held-out R2 {show('r2')}",
    ]
    return "<br>".join(map(escape, lines))


def forecast(metrics: Metrics) -> go.Figure:
    """Forecast against measured change of the behaviour's log-odds, one point per candidate that was measured.

    The dashed line is a perfect forecast; colours are behaviours, markers are methods, a ring marks what was chosen.
    """
    found = measured(metrics)
    if not found:
        return _empty("No candidate was both forecast and measured: let the job measure a few of its candidates")
    names, methods = list(_behaviours(metrics)), list(dict.fromkeys(str(c.get("method")) for c in found))
    figure = go.Figure()
    ends = [v for c in found for v in (float(c["on"]), float(c["measured_on"]))]
    pad = 0.06 * (max(ends) - min(ends) or 1.0)
    span = [min(ends) - pad, max(ends) + pad]
    figure.add_trace(go.Scatter(x=span, y=span, mode="lines", name="forecast = measured", hoverinfo="skip",
                                line={"dash": "dash", "color": "#888", "width": 1.2}))  # fmt: skip
    for name in names:
        for method in methods:
            group = [c for c in found if c["behaviour"] == name and str(c.get("method")) == method]
            if not group:
                continue
            colour = BEHAVIOUR_COLOURS[names.index(name) % len(BEHAVIOUR_COLOURS)]
            symbol = SYMBOLS[methods.index(method) % len(SYMBOLS)]
            _points(figure, group, escape(f"{name}, {method}"), {"color": colour, "symbol": symbol, "size": 9})
    chosen = [c for c in found if c.get("chosen")]
    if chosen:
        ring = {"color": "rgba(0,0,0,0)", "size": 18, "symbol": "circle", "line": {"color": "#000", "width": 1.8}}
        _points(figure, chosen, "chosen", ring)
    figure.update_xaxes(title_text="forecast change of log-odds (nats)")
    figure.update_yaxes(title_text="measured change of log-odds (nats)")
    return _style(figure, 480)


def _points(figure: go.Figure, group: list[dict[str, Any]], name: str, marker: dict[str, Any]) -> None:
    figure.add_trace(
        go.Scatter(
            x=[c["on"] for c in group], y=[c["measured_on"] for c in group], mode="markers", name=name, marker=marker,
            text=[_describe(c) for c in group], hovertemplate="%{text}<extra></extra>",
        )
    )  # fmt: skip


def _layer(site: Any) -> int:
    return int(str(site).rsplit(".", 1)[-1])


def pair_grid(behaviour: Metrics) -> dict[tuple[int, int], dict[str, Any]]:
    """(donor layer, recipient layer) -> the pair's best candidate by forecast: most on target, up to the target, less
    what it moves off target."""
    target = number(get(behaviour, "forecast", "target"))

    def merit(c: Metrics) -> float:
        on = number(c.get("on")) or 0.0
        return (on if target is None or target <= 0 else min(on, target)) - abs(worst_off(c.get("off")) or 0.0)

    best: dict[tuple[int, int], dict[str, Any]] = {}
    for c in get(behaviour, "forecast", "candidates") or []:
        if number(c.get("on")) is None:
            continue
        pair = (_layer(c["donor_site"]), _layer(c["recipient_site"]))
        if pair not in best or merit(c) > merit(best[pair]):
            best[pair] = {**c, "off": worst_off(c.get("off"))}
    return best


def layer_pairs(metrics: Metrics) -> go.Figure:
    """Forecast effect of each layer pair's best candidate, one heatmap per behaviour; a ring marks the chosen pair.

    Blue moves the behaviour as the adapter should, brown the wrong way; blank pairs were not tried.
    """
    grids = {name: grid for name, b in _behaviours(metrics).items() if (grid := pair_grid(b))}
    if not grids:
        return _empty("No layer pairs were forecast: let the job choose its layers by forecast")
    figure = make_subplots(1, len(grids), subplot_titles=[escape(n) for n in grids], horizontal_spacing=0.08)
    for column, (name, grid) in enumerate(grids.items(), 1):
        _pair_map(figure, column, name, grid)
        chosen = get(metrics, "behaviours", name, "forecast", "chosen")
        if get(chosen, "donor_site") is None or get(chosen, "recipient_site") is None:
            continue
        x, y = ([str(_layer(chosen[f"{side}_site"]))] for side in ("recipient", "donor"))
        ring = {"size": 20, "symbol": "circle-open", "color": "#000", "line": {"width": 2.5}}
        point = go.Scatter(x=x, y=y, mode="markers", marker=ring, hoverinfo="skip", showlegend=False)
        figure.add_trace(point, row=1, col=column)
    bar = {"title": {"text": "forecast (nats)", "side": "right"}, "thickness": 14}
    return _style(figure, 380, coloraxis={"colorscale": DIVERGING, "cmid": 0, "colorbar": bar})


def _pair_map(figure: go.Figure, column: int, name: str, grid: Mapping[tuple[int, int], Metrics]) -> None:
    donors, recipients = (sorted({pair[i] for pair in grid}) for i in (0, 1))
    cells = [[grid.get((d, r)) for r in recipients] for d in donors]
    x, y = [str(r) for r in recipients], [str(d) for d in donors]
    heat = go.Heatmap(
        x=x, y=y, z=[[c["on"] if c else None for c in row] for row in cells], coloraxis="coloraxis", xgap=2, ygap=2,
        text=[[_describe({**c, "behaviour": name}) if c else "not tried" for c in row] for row in cells],
        hovertemplate="%{text}<extra></extra>",
    )  # fmt: skip
    figure.add_trace(heat, row=1, col=column)
    order = {"type": "category", "categoryorder": "array"}
    figure.update_xaxes(title_text="recipient layer", categoryarray=x, row=1, col=column, **order)
    figure.update_yaxes(title_text="donor layer" if column == 1 else "", categoryarray=y, row=1, col=column, **order)


def dose(metrics: Metrics) -> go.Figure:
    """Dose and response: log-odds of the behaviour (95 % band) over strength and, where measured, KL on neutral text.

    Strength 0 is the plain recipient.
    """
    return dose_curves({name: b.get("dose") or [] for name, b in _behaviours(metrics).items()})


def dose_curves(curves: Mapping[str, Any]) -> go.Figure:
    """`dose` of curves by name, each a list of points as `evaluate.comparison.dose_response` makes them."""
    if not any(curves.values()):
        return _empty("No dose-response curve was measured: give the job a list of strengths")
    with_kl = any(number(p.get("kl")) is not None for curve in curves.values() for p in curve)
    heights = [0.62, 0.38] if with_kl else [1.0]
    figure = make_subplots(len(heights), 1, shared_xaxes=True, vertical_spacing=0.08, row_heights=heights)
    for i, (name, curve) in enumerate(curves.items()):
        look = (BEHAVIOUR_COLOURS[i % len(BEHAVIOUR_COLOURS)], SYMBOLS[i % len(SYMBOLS)])
        if curve:
            _dose_curve(figure, name, sorted(curve, key=lambda p: p["strength"]), look, with_kl)
    figure.update_xaxes(title_text="strength of the paste (0 = plain recipient)", row=len(heights), col=1)
    figure.update_yaxes(title_text="log-odds (nats)", row=1, col=1)
    if with_kl:
        figure.update_yaxes(title_text="KL on neutral text<br>(nats per token)", rangemode="tozero", row=2, col=1)
    return _style(figure, 520 if with_kl else 380)


def _dose_curve(figure: go.Figure, name: str, points: list[Any], look: tuple[str, str], with_kl: bool) -> None:
    colour, symbol = look
    x, odds = [p["strength"] for p in points], [p.get("log_odds") or {} for p in points]
    if all(number(o.get(end)) is not None for o in odds for end in ("low", "high")):
        band = [o["high"] for o in odds] + [o["low"] for o in reversed(odds)]
        area = {"fill": "toself", "fillcolor": colour, "opacity": 0.18, "mode": "none"}
        band_trace = go.Scatter(x=x + x[::-1], y=band, hoverinfo="skip", showlegend=False, legendgroup=name, **area)
        figure.add_trace(band_trace, row=1, col=1)
    line = {
        "x": x, "mode": "lines+markers", "line": {"color": colour, "width": 2}, "legendgroup": name,
        "marker": {"color": colour, "symbol": symbol, "size": 8}, "name": escape(name),
    }  # fmt: skip
    hover = "strength %{x}: %{y:.2f} nats"
    figure.add_trace(go.Scatter(y=[o.get("value") for o in odds], hovertemplate=hover, **line), row=1, col=1)
    if with_kl:
        hover = "strength %{x}: KL %{y:.4f} nats per token"
        kl = go.Scatter(y=[p.get("kl") for p in points], hovertemplate=hover, showlegend=False, **line)
        figure.add_trace(kl, row=2, col=1)


def correspondence(
    scores: Mapping[tuple[int, int], float], matched: Mapping[int, int] | None = None, name: str = "score", *,
    picked: tuple[int, int] | None = None,
) -> go.Figure:  # fmt: skip
    """How well each recipient layer answers to each donor layer, {(donor, recipient): score}, as a heatmap; `matched`,
    {donor: recipient}, is drawn over it: rings, joined by a line where several donor layers have one each.

    Colours are centred at 0 where there are scores below it; blank pairs have none. picked: a pair (donor, recipient)
    that is framed; the cells can then be clicked, and give their pair as customdata.
    """
    if not scores:
        return _empty("No pair of layers has a score: give the layers of both profiles")
    donors, recipients = (sorted({pair[i] for pair in scores}) for i in (0, 1))
    x, y = [str(r) for r in recipients], [str(d) for d in donors]
    low, high = min(scores.values()), max(scores.values())
    reach = max(abs(low), abs(high))
    colours = {"colorscale": DIVERGING, "zmin": -reach, "zmax": reach} if low < 0 else {"colorscale": "Blues"}
    figure = go.Figure(
        go.Heatmap(
            x=x, y=y, z=[[scores.get((d, r)) for r in recipients] for d in donors], xgap=2, ygap=2, **colours,
            texttemplate="%{z:.2f}" if len(x) <= 12 else None,
            colorbar={"title": {"text": escape(name), "side": "right"}, "thickness": 14},
            hovertemplate=f"donor layer %{{y}}, recipient layer %{{x}}: {escape(name)} %{{z:.3f}}<extra></extra>",
        )
    )  # fmt: skip
    if matched:
        pairs = [(d, r) for d, r in sorted(matched.items()) if d in donors and r in recipients]
        ring = {"size": 30, "symbol": "circle-open", "color": ORANGE, "line": {"width": 3}}
        figure.add_trace(go.Scatter(x=[str(r) for _, r in pairs], y=[str(d) for d, _ in pairs], mode="lines+markers",
                                    marker=ring, line={"color": ORANGE, "width": 2}, hoverinfo="skip",
                                    showlegend=False))  # fmt: skip
    if picked is not None:
        cells = [Cell(str(r), str(d), f"donor layer {d}, recipient layer {r}: {escape(name)} {score:.3f}", (d, r))
                 for (d, r), score in scores.items()]  # fmt: skip
        clickable(figure, cells, (str(picked[1]), str(picked[0])))
    order = {"type": "category", "categoryorder": "array"}
    figure.update_xaxes(title_text="recipient layer", categoryarray=x, **order)
    figure.update_yaxes(title_text="donor layer", categoryarray=y, **order)
    return _style(figure, 160 + 34 * len(y))
