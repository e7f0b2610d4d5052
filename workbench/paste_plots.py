"""What a paste does to one text or prompt as plotly figures: where it acts, what it changes there, and by which strength."""

from __future__ import annotations

import math

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .evaluate.dose import PromptDose
from .evaluate.token_changes import TokenChanges
from .plots import BLUE, GREY, RED, _empty, _style
from .visible_text import label

STRIP = [[0.0, "#DDE2E8"], [0.25, "#F6C67F"], [0.6, "#E07B23"], [1.0, "#7F2704"]]
"""from grey, nothing changed, to dark brown: lightness falls all the way, for every kind of colour vision"""
CELLS = 480
"""tokens that a strip draws"""
LONGEST_LABEL = 12


def shown_token(token: str, most: int = LONGEST_LABEL) -> str:
    """A token as a label: spaces and line ends as signs, what cannot be seen as its code point, HTML escaped, cut.

    >>> shown_token(" <b>"), shown_token("\\n"), shown_token("x" * 30, 5)
    ('·&lt;b&gt;', '⏎', 'xxxxx…')
    """
    return label(token, most, spaces=True) or "∅"


def drawn_positions(changes: TokenChanges, most: int = CELLS) -> range:
    """The positions that `kl_strip` draws: all, or the last `most`, where the answer is."""
    return range(max(0, len(changes) - most), len(changes))


def kl_strip(changes: TokenChanges, *, columns: int = 12, most: int = CELLS) -> go.Figure:
    """The text token by token, a cell each; its colour is how far the distribution of the token after it moved, in nats.

    The answer begins behind the framed cell, the last token of the prompt. Of a text of more than `most` tokens the last
    are drawn. A cell's customdata is its position.
    """
    positions = drawn_positions(changes, most)
    first = positions.start
    cell = [divmod(p - first, columns) for p in positions]
    largest = float(changes.kl[first:].max()) or 1.0
    figure = go.Figure(
        go.Bar(
            x=[column for _, column in cell], y=[0.86] * len(cell), base=[-row - 0.43 for row, _ in cell], width=0.96,
            customdata=list(positions), text=[shown_token(changes.tokens[p]) for p in positions],
            textposition="inside", insidetextanchor="middle", textangle=0, textfont={"size": 13}, cliponaxis=False,
            hovertext=[_cell_hover(changes, p) for p in positions], hovertemplate="%{hovertext}<extra></extra>",
            unselected={"marker": {"opacity": 0.75}}, showlegend=False,
            marker={"color": changes.kl[first:].tolist(), "colorscale": STRIP, "cmin": 0, "cmax": largest,
                    "line": {"width": 0},
                    "colorbar": {"title": {"text": "KL of the next token (nats)", "side": "top"}, "thickness": 10,
                                 "orientation": "h", "len": 0.4, "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom"}},
        )
    )  # fmt: skip
    rows = cell[-1][0] + 1
    if first < changes.prompt_length < len(changes):
        row, column = cell[changes.prompt_length - 1 - first]
        figure.add_shape(type="rect", x0=column - 0.48, x1=column + 0.48, y0=-row - 0.43, y1=-row + 0.43,
                         line={"color": "#000000", "width": 2})  # fmt: skip
    figure.update_xaxes(visible=False, range=[-0.5, columns - 0.5], fixedrange=True)
    figure.update_yaxes(title_text="position", tickvals=[-row for row in range(rows)], showgrid=False, zeroline=False,
                        ticktext=[str(first + row * columns) for row in range(rows)],
                        range=[-rows + 0.5, 0.5], fixedrange=True)  # fmt: skip
    if float(changes.kl.max()) == 0:
        figure.add_annotation(text="nothing changed anywhere: KL is exactly 0", showarrow=False, x=0, y=1.0,
                              xref="paper", yref="paper", xanchor="left", yanchor="bottom")  # fmt: skip
    return _style(figure, 110 + 36 * rows, margin={"l": 60, "r": 20, "t": 80, "b": 16}, dragmode=False)


def _cell_hover(changes: TokenChanges, position: int) -> str:
    def first(side: str) -> str:
        likely = getattr(changes, f"likely_{side}")
        token, probability = int(likely.ids[position, 0]), float(getattr(likely, side)[position, 0])
        return f"{shown_token(changes.names[token], 40)} ({probability:.3f})"

    part = "prompt" if position < changes.prompt_length else "answer"
    lines = [
        f"position {position} ({part}): {shown_token(changes.tokens[position], 60)}",
        f"KL {float(changes.kl[position]):.4g} nats",
        f"likeliest next token without: {first('before')}",
        f"likeliest next token with: {first('after')}",
    ]
    if position + 1 < len(changes):
        before, after = (float(x[position]) for x in (changes.log_prob_before, changes.log_prob_after))
        following = shown_token(changes.tokens[position + 1], 40)
        lines.append(f"log-probability of {following}: {before:.3f} without, {after:.3f} with (nats)")
    return "<br>".join(lines)


def top_bars(changes: TokenChanges, position: int) -> go.Figure:
    """The likeliest next tokens after one position, without the adapter and with it.

    Raises UserError for a position that the text does not have.
    """
    table = changes.at(position)
    labels = [shown_token(token, 24) for token in table["token"]]
    places = list(range(len(table)))
    figure = go.Figure()
    for side, name, colour, pattern in (("before", "without", GREY, ""), ("after", "with the paste", RED, "/")):
        figure.add_trace(go.Bar(
            y=places, x=table[side].tolist(), orientation="h", name=name,
            marker={"color": colour, "pattern": {"shape": pattern, "fgcolor": "#FFFFFF", "size": 6, "solidity": 0.2}},
            customdata=labels, hovertemplate=f"%{{customdata}}, {name}: %{{x:.4g}}<extra></extra>",
        ))  # fmt: skip
    figure.update_xaxes(title_text="probability of the next token", rangemode="tozero")
    figure.update_yaxes(tickvals=places, ticktext=labels, autorange="reversed", zeroline=False)
    token, kl = shown_token(changes.tokens[position], 40), float(changes.kl[position])
    where = f"after position {position}, “{token}”: KL {kl:.4g} nats"
    return _style(figure, 130 + 26 * len(table), barmode="group", bargap=0.25, title={"text": where, "font": {"size": 14}},
                  legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1, "xanchor": "right"})  # fmt: skip


def prompt_dose_curve(dose: PromptDose) -> go.Figure:
    """KL of an answer's first token over the strength, and above it the log-odds of the behaviour, where measured.

    It is one prompt, so there is no interval.
    """
    if len(dose.factors) < 2:
        return _empty("One strength makes no curve: give several")
    with_odds = dose.log_odds is not None
    figure = make_subplots(2 if with_odds else 1, 1, shared_xaxes=True, vertical_spacing=0.08)
    hover = [f"likeliest first token {shown_token(token, 40)} ({p:.3f})"
             for token, p in zip(dose.likeliest, dose.probability.tolist(), strict=True)]  # fmt: skip
    kl_row = 2 if with_odds else 1
    for row, values, name, look in (
        (1, dose.log_odds, "log-odds", (BLUE, "circle")), (kl_row, dose.kl, "KL", (RED, "diamond")),
    ):  # fmt: skip
        if values is None:
            continue
        colour, symbol = look
        finite = [v if math.isfinite(v) else None for v in values.tolist()]
        figure.add_trace(go.Scatter(
            x=list(dose.factors), y=finite, mode="lines+markers", text=hover, showlegend=False,
            line={"color": colour, "width": 2}, marker={"color": colour, "symbol": symbol, "size": 8},
            hovertemplate=f"strength × %{{x}}: {name} %{{y:.4g}} nats<br>%{{text}}<extra></extra>",
        ), row=row, col=1)  # fmt: skip
        figure.update_yaxes(title_text=f"{name} (nats)", row=row, col=1)
    figure.update_yaxes(rangemode="tozero", row=kl_row, col=1)
    figure.update_xaxes(title_text="strength, in multiples of the paste's own (0 = plain recipient)", row=kl_row, col=1)
    return _style(figure, 420 if with_odds else 300)
