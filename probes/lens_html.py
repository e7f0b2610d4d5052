"""A lens table as HTML for a notebook; every piece of text is escaped."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from workbench.visible_text import label

from .lens import site_word

if TYPE_CHECKING:
    from .lens_table import LensTable

COLUMNS, SIGNS = 24, 12
"""tokens and characters of each that are shown"""
STYLE = "padding:2px 6px;font:12px ui-monospace,monospace;white-space:pre;text-align:left"
HEAD = f"<style scoped>.lens td,.lens th{{{STYLE}}}</style>"


def table_html(table: LensTable) -> str:
    """Layers down, the last on top; tokens across, at most the last 24; the likeliest next token in each cell, the darker
    the likelier."""
    count = len(table)
    shown = range(max(0, count - COLUMNS), count)
    of = f" + {table.adapter}" if table.adapter else ""
    title = f"{table.lens} lens of {table.model}{of}"
    if len(shown) < count:
        title += f"; the last {len(shown)} of {count} tokens"
    tokens = table.tokens
    head = "".join(f"<th>{label(tokens[j], SIGNS, spaces=True)}</th>" for j in shown)
    lines = [f"<tr><th>layer</th>{head}</tr>"]
    for i in reversed(range(len(table.sites))):
        cells = "".join(_cell(table, i, j) for j in shown)
        lines.append(f"<tr><th>{escape(site_word(table.sites[i]))}</th>{cells}</tr>")
    return f"{HEAD}<div style='overflow-x:auto'><div>{escape(title)}</div><table class='lens'>{''.join(lines)}</table></div>"


def _cell(table: LensTable, i: int, j: int) -> str:
    text = table.texts[int(table.top_ids[i, j, 0])]
    p = float(table.top_probabilities[i, j, 0])
    said = f"{text!r} {p:.3f}, entropy {float(table.entropy[i, j]):.2f}, KL {float(table.kl[i, j]):.2f} nats"
    shade = f"background:rgba(0,114,178,{0.55 * p:.2f})"
    return f'<td title="{escape(said)}" style="{shade}">{label(text, SIGNS, spaces=True)}</td>'
