"""Figures of folding: loss against the share of idle channels, and how linear blocks and channels are, by layer.

They read tables (`FoldCurve.frame()`, `Linearity.frame()`, `Linearity.channel_frame()`) and know nothing of probes.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from .plots import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, _empty, _style

if TYPE_CHECKING:
    import pandas as pd

ARMS = {
    ("refit", "least"): ("refit", BLUE, "circle", "solid"),
    ("affine", "least"): ("affine", GREEN, "diamond-open", "solid"),
    ("mean", "least"): ("mean", ORANGE, "triangle-up", "solid"),
    ("identity", "least"): ("identity", RED, "x", "solid"),
    ("refit", "random"): ("refit, random channels", SKY, "circle-open", "dash"),
    ("affine", "random"): ("affine, random channels", PINK, "cross", "dash"),
}
WHAT = {
    "write": ("what the block writes", BLUE, "circle"),
    "ffn": ("network, from its own input", GREEN, "diamond-open"),
    "block": ("block's output", ORANGE, "triangle-up"),
}
FLOOR = 1e-4
"""nats per token: less is drawn here"""
SCALES = {"rise": "rise of the loss (nats per token)", "kl": "KL to the dense model (nats per token)"}


def fold_loss(table: pd.DataFrame, figure_of: str = "rise") -> go.Figure:
    """Every arm's rise of the loss (or `kl`) against theta, with 95 % intervals; controls are dashed. Logarithmic, since
    `identity` is a hundred times worse than the rest; what is less than 0.0001 is drawn there."""
    table = table[table["theta"] > 0]
    if table.empty or figure_of not in SCALES:
        return _empty("Nothing was folded: give a theta above 0, and rise or kl")
    floor = FLOOR
    figure = go.Figure()
    for (method, channels), (name, colour, symbol, dash) in ARMS.items():
        part = table[(table["method"] == method) & (table["channels"] == channels)].sort_values("theta")
        if part.empty:
            continue
        value, low, high = (part[figure_of + end].clip(lower=floor).tolist() for end in ("", "_low", "_high"))
        text = [f"{escape(name)}, theta {t:g}: {v:.4f}<br>95 % interval {lo:.4f} to {h:.4f}" for t, v, lo, h in zip(
            part["theta"], part[figure_of], part[f"{figure_of}_low"], part[f"{figure_of}_high"], strict=True)]  # fmt: skip
        bars = {"type": "data", "symmetric": False, "thickness": 1.4, "width": 3,
                "array": [h - v for h, v in zip(high, value, strict=True)],
                "arrayminus": [v - lo for v, lo in zip(value, low, strict=True)]}  # fmt: skip
        figure.add_trace(go.Scatter(
            x=part["theta"].tolist(), y=value, mode="lines+markers", name=escape(name), error_y=bars, text=text,
            line={"color": colour, "dash": dash, "width": 2}, marker={"color": colour, "symbol": symbol, "size": 9},
            hovertemplate="%{text}<extra></extra>",
        ))  # fmt: skip
    ticks = [10.0**power for power in range(-4, 3)]
    figure.update_xaxes(title_text="theta, share of channels that are folded", tickformat=".0%",
                        tickvals=sorted(set(table["theta"])))  # fmt: skip
    figure.update_yaxes(title_text=SCALES[figure_of], type="log", tickvals=ticks,
                        ticktext=["at most 0.0001", *(f"{tick:g}" for tick in ticks[1:])])  # fmt: skip
    return _style(figure, 420)


def channel_scores(table: pd.DataFrame) -> go.Figure:
    """How linear the channels of each layer are: their R2 of act(u) by a u + c (gated: by a map of x), as boxes."""
    if table.empty:
        return _empty("No channel was scored")
    figure = go.Figure()
    for layer, part in table.groupby("layer"):
        figure.add_trace(go.Box(y=part["r2"].tolist(), name=str(layer), marker={"color": BLUE, "size": 3}, line={"width": 1.4},
                                boxpoints="outliers", showlegend=False, hoverinfo="y"))  # fmt: skip
    figure.update_xaxes(title_text="layer", type="category")
    figure.update_yaxes(title_text="R² of each channel by its line")
    return _style(figure, 380)


def block_linearity(table: pd.DataFrame) -> go.Figure:
    """Held-out R2 by layer of what a block writes, of its network and of its output, with 95 % intervals; controls dotted."""
    if table.empty:
        return _empty("No block was scored")
    figure = go.Figure()
    layers = table["layer"].tolist()
    for key, (name, colour, symbol) in WHAT.items():
        value, low, high = (table[key + end].tolist() for end in ("", "_low", "_high"))
        text = [f"{name}, layer {i}: {v:.3f}<br>95 % interval {lo:.3f} to {h:.3f}"
                for i, v, lo, h in zip(layers, value, low, high, strict=True)]  # fmt: skip
        bars = {"type": "data", "symmetric": False, "thickness": 1.4, "width": 3,
                "array": [h - v for h, v in zip(high, value, strict=True)],
                "arrayminus": [v - lo for v, lo in zip(value, low, strict=True)]}  # fmt: skip
        look = {"color": colour, "symbol": symbol, "size": 9}
        figure.add_trace(go.Scatter(x=layers, y=value, mode="lines+markers", name=name, error_y=bars, text=text, marker=look,
                                    line={"color": colour, "width": 2}, hovertemplate="%{text}<extra></extra>"))  # fmt: skip
    worst = table[[f"{key}_control" for key in WHAT]].max(axis=1).tolist()
    figure.add_trace(go.Scatter(x=layers, y=worst, mode="lines", name="inputs of other tokens, the highest of the three",
                                line={"color": GREY, "dash": "dot", "width": 1.6},
                                hovertemplate="control, layer %{x}: %{y:.3f}<extra></extra>"))  # fmt: skip
    figure.update_xaxes(title_text="layer", dtick=1, zeroline=False)
    figure.update_yaxes(title_text="R² on held-out prompts")
    return _style(figure, 400)
