"""Text of others (tokens, prompts, labels, file names, errors) on a page: always as text, never as HTML or Markdown.

Streamlit reads Markdown in most of what it shows; `st.text`, `st.code`, `st.dataframe` and the options of `st.selectbox`
do not. Whatever was not written in this package goes through here, or through one of those after `shown`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import streamlit as st

from workbench.errors import UserError
from workbench.visible_text import visible

P = ParamSpec("P")
LONGEST = 400
"""characters of one piece of text that are shown"""


def shown(text: object, most: int = LONGEST) -> str:
    """Text with what cannot be seen made visible, and cut at `most` characters, which it then says.

    Control characters, and those that turn the direction of the text around them, become their code point in brackets.

    >>> shown("a\\u202eb\\tc")
    'a⟨U+202E⟩b⟨U+0009⟩c'
    >>> shown("x" * 10_000, 3)
    'xxx… (10,000 characters)'
    """
    whole = str(text)
    return visible(whole[:most]) + _rest(whole, most)


def _rest(whole: str, most: int) -> str:
    return f"… ({len(whole):,} characters)" if len(whole) > most else ""


def write(text: object, most: int = LONGEST) -> None:
    """One piece of somebody else's text."""
    st.text(shown(text, most))


def lines(text: str, most: int = LONGEST) -> str:
    """As `shown`, with its line ends kept.

    >>> lines("a\\u202e\\nb")
    'a⟨U+202E⟩\\nb'
    """
    whole = str(text)
    return "\n".join(map(visible, whole[:most].split("\n"))) + _rest(whole, most)


def block(text: str, most: int = LONGEST) -> None:
    """Somebody else's text of some lines, in a frame."""
    st.code(lines(text, most), language=None, wrap_lines=True)


def problem(text: object, *, fix: str = "") -> None:
    """What went wrong, in one line of its own words, and a command that mends it."""
    with st.container(border=True):
        st.markdown(":red[:material/error: **This could not be done**]")
        write(text, 2000)
        if fix:
            st.code(fix, language="bash")


def missing(text: str, command: str) -> None:
    """What a page would need, and the command that makes it."""
    with st.container(border=True):
        st.markdown(":blue[:material/info: **Nothing here yet**]")
        write(text, 2000)
        st.code(command, language="bash")


def remark(text: object) -> None:
    """A small note under a panel: how many of how many are drawn, what a number is of."""
    st.caption(escaped(shown(text, 1000)))


def escaped(text: str) -> str:
    """Markdown that shows as this text; for our own sentences with numbers and names of sites in them, never for others'.

    >>> escaped("*a* [b](c)")
    '\\\\*a\\\\* \\\\[b\\\\]\\\\(c\\\\)'
    """
    return "".join(f"\\{c}" if c in "\\`*_{}[]()<>#+-.!|~$:&\"'@/=^%;?," else c for c in text)


def told(page: Callable[P, None]) -> Callable[P, None]:
    """The page, or a part that runs by itself; an error of the user's input is one line on it."""

    @wraps(page)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            page(*args, **kwargs)
        except UserError as err:
            problem(err)

    return run
