"""Figures of a converter between two models: predicted against actual, its spectra, and what of an adapter it carries."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
import torch

from .captures import MapCapture
from .convert import Converter
from .maps.agreement import Agreement
from .plots import BLUE, GREY, ORANGE, RED, _style
from .transport_plots import _log_axis

SIDE_LOOK = {
    "to_donor": ("to the donor (read)", BLUE, "solid"),
    "to_recipient": ("to the recipient (write)", RED, "dash"),
}


def predicted_against_actual(found: Agreement) -> go.Figure:
    """How many values lie where, predicted across and actual up, on a logarithmic colour scale; the dashed line is a
    perfect map. Units are standard deviations of each output about its mean, over the same rows."""
    middles = ((found.edges[1:] + found.edges[:-1]) / 2).tolist()
    counts = found.counts
    z = [[None if c == 0 else v for c, v in zip(row, line, strict=True)]
         for row, line in zip(counts.tolist(), counts.double().clamp_min(1).log10().tolist(), strict=True)]  # fmt: skip
    most = int(counts.max())
    ticks = [10**k for k in range(len(str(most)))]
    bar = {"title": {"text": "values in a cell", "side": "right"}, "thickness": 14, "tickvals": list(range(len(ticks))),
           "ticktext": [f"{tick:,}" for tick in ticks]}  # fmt: skip
    figure = go.Figure(go.Heatmap(
        x=middles, y=middles, z=z, customdata=counts.tolist(), colorscale="Cividis", colorbar=bar, zmin=0,
        hovertemplate="predicted %{x:.2f}, actual %{y:.2f}: %{customdata:,} values<extra></extra>", hoverongaps=False,
    ))  # fmt: skip
    ends = [float(found.edges[0]), float(found.edges[-1])]
    figure.add_trace(go.Scatter(x=ends, y=ends, mode="lines", hoverinfo="skip", name="perfect map",
                                line={"dash": "dash", "color": ORANGE, "width": 1.6}))  # fmt: skip
    figure.update_xaxes(title_text="predicted (standard deviations of the output)", range=ends, constrain="domain")
    figure.update_yaxes(title_text="actual (standard deviations of the output)", range=ends, scaleanchor="x",
                        constrain="domain")  # fmt: skip
    return _style(figure, 520)


def map_spectra(converter: Converter) -> go.Figure:
    """The singular values of both maps of a converter, largest first, on logarithmic axes; a dot ends each at its rank."""
    figure = go.Figure()
    for side, (name, colour, dash) in SIDE_LOOK.items():
        fitted = getattr(converter, side)
        rank = fitted.rank
        values = fitted.singular_values[:rank].tolist()
        figure.add_trace(go.Scatter(
            x=list(range(1, rank + 1)), y=values, mode="lines", name=f"{name}, rank {rank}, condition {fitted.condition:,.3g}",
            line={"color": colour, "dash": dash, "width": 2},
            hovertemplate=f"{name}, direction %{{x}}: gain %{{y:.4g}}<extra></extra>",
        ))  # fmt: skip
        if rank:
            figure.add_trace(go.Scatter(x=[rank], y=values[-1:], mode="markers", marker={"color": colour, "size": 8},
                                        hoverinfo="skip", showlegend=False))  # fmt: skip
    figure.update_xaxes(title_text="direction", **_log_axis())
    figure.update_yaxes(title_text="singular value (gain of the direction)", **_log_axis(-9))
    return _style(figure, 380, legend={"orientation": "h", "y": 1.14, "x": 0})


def capture_curves(found: MapCapture) -> go.Figure:
    """What share of an adapter part's length lies in the leading directions of the converter's maps, with what a random
    part would have (95 % band)."""
    figure = go.Figure()
    k = torch.arange(1, max(len(found.read), len(found.write)) + 1)
    chance, low, high = (c.tolist() for c in found.chance(k))
    x: list[Any] = k.tolist()
    figure.add_trace(go.Scatter(x=x + x[::-1], y=high + low[::-1], fill="toself", fillcolor=GREY, opacity=0.25, mode="none",
                                hoverinfo="skip", name="random adapter, 95 %"))  # fmt: skip
    figure.add_trace(go.Scatter(x=x, y=chance, mode="lines", name="random adapter",
                                line={"color": GREY, "dash": "dot", "width": 1.6},
                                hovertemplate="random adapter, %{x} directions: %{y:.3f}<extra></extra>"))  # fmt: skip
    for curve, side, word in ((found.read, "to_donor", "read"), (found.write, "to_recipient", "write")):
        _, colour, dash = SIDE_LOOK[side]
        figure.add_trace(go.Scatter(x=list(range(1, len(curve) + 1)), y=curve.tolist(), mode="lines",
                                    line={"color": colour, "dash": dash, "width": 2},
                                    name=f"{word}, {float(curve[-1]):.2f} in all",
                                    hovertemplate=f"{word}, %{{x}} directions: %{{y:.3f}}<extra></extra>"))  # fmt: skip
    figure.update_xaxes(title_text=f"leading directions of the map (the donor has {found.width})")
    figure.update_yaxes(title_text="share of the adapter's length", range=[0, 1.03])
    return _style(figure, 380, legend={"orientation": "h", "y": 1.14, "x": 0})
