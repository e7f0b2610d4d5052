"""Somebody else's text (tokens, prompts, labels, names) as people may look at it: nothing in it hides, or turns the line."""

from __future__ import annotations

import unicodedata
from html import escape

HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""categories of what cannot be seen, or turns the direction of the text around it"""
SIGNS = {" ": "·", "\t": "⇥"}


def visible(text: str, *, spaces: bool = False) -> str:
    """The text with line ends as signs and what is hidden as its code point; with `spaces`, of tokens say, these too.

    >>> visible("a\u202eb\\n c"), visible(" a\u00a0\\t", spaces=True)
    ('a⟨U+202E⟩b⏎ c', '·a⟨U+00A0⟩⇥')
    """
    return "".join(_sign(c, spaces) for c in text)


def label(text: object, most: int, *, spaces: bool = False) -> str:
    """`visible`, cut at `most` characters and HTML-escaped, as plotly and pages of HTML need it.

    >>> label(" <b>", 40, spaces=True), label("x" * 50, 3)
    ('·&lt;b&gt;', 'xxx…')
    """
    whole = str(text)
    return escape(visible(whole[:most], spaces=spaces)) + ("…" if len(whole) > most else "")


def _sign(c: str, spaces: bool) -> str:
    if c == "\n":
        return "⏎"
    if spaces and c in SIGNS:
        return SIGNS[c]
    category = unicodedata.category(c)
    return f"⟨U+{ord(c):04X}⟩" if category in HIDDEN or (spaces and category == "Zs") else c
