"""The one error that a user's input can cause."""

from __future__ import annotations

from .visible_text import visible

MOST = 1200
"""characters of a message: what is longer is cut in its middle, since what to do stands at its end"""


class UserError(ValueError):
    """Bad input. The message is one line: what was given, what is allowed, what to do.

    The command line prints the message alone and exits with code 2; from Python it is an ordinary ValueError. What files
    say goes into messages, so that line ends and what is hidden in a text become signs, and the length has an end.

    >>> print(UserError("the name 'a\\nb' is not allowed; give another"))
    the name 'a⏎b' is not allowed; give another
    """

    def __init__(self, message: object = "") -> None:
        text = _cut(str(message))
        super().__init__(text if text.isascii() and text.isprintable() else _cut(visible(text)))


def _cut(text: str) -> str:
    return text if len(text) <= MOST else f"{text[: MOST - 300]} … {text[-297:]}"
