"""Runs side by side as plotly figures."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .plots import ARM_STYLE, GREY, _empty, _style
from .summary import arm_title

if TYPE_CHECKING:
    import pandas as pd

VALUES = {"rate": ("score (%)", 100.0), "log_odds": ("log-odds (nats)", 1.0),
          "share_rate": ("share of native's gain, score (%)", 100.0),
          "share_log_odds": ("share of native's gain, log-odds (%)", 100.0)}  # fmt: skip


def runs_compared(table: pd.DataFrame, value: str = "rate") -> go.Figure:
    """A value of `compare_runs` by run, one panel for each behaviour, one mark for each arm, with 95 % intervals."""
    title, scale = VALUES[value]
    found = table[table[value].notna()] if len(table) else table
    behaviours = list(dict.fromkeys(found["behaviour"])) if len(found) else []
    if not behaviours:
        return _empty("Nothing of this kind was measured in these runs")
    runs, arms = list(dict.fromkeys(table["run"])), list(dict.fromkeys(found["arm"]))
    figure = make_subplots(1, len(behaviours), shared_yaxes=True, subplot_titles=[escape(b) for b in behaviours],
                           horizontal_spacing=0.03)  # fmt: skip
    for column, behaviour in enumerate(behaviours, 1):
        for number, arm in enumerate(arms):
            part = found[(found["behaviour"] == behaviour) & (found["arm"] == arm)]
            if not len(part):
                continue
            colour, symbol = ARM_STYLE.get(arm, (GREY, "circle"))
            beside = 0.7 * (number - (len(arms) - 1) / 2) / len(arms)
            middle, low, high = (scale * part[key] for key in (value, f"{value}_low", f"{value}_high"))
            figure.add_scatter(
                x=[runs.index(run) + beside for run in part["run"]], y=middle, mode="markers", name=escape(arm_title(arm)),
                legendgroup=arm, showlegend=column == 1, marker={"color": colour, "symbol": symbol, "size": 10},
                error_y={"type": "data", "symmetric": False, "array": high - middle, "arrayminus": middle - low},
                hovertemplate=f"{escape(arm_title(arm))}: %{{y:.2f}}<extra></extra>", row=1, col=column,
            )  # fmt: skip
    names = [escape(run if len(run) <= 24 else f"…{run[-23:]}") for run in runs]
    figure.update_xaxes(tickvals=list(range(len(runs))), ticktext=names, range=[-0.5, len(runs) - 0.5])
    figure.update_yaxes(title=title, col=1)
    return _style(figure, 440, legend={"orientation": "h", "y": -0.25})
