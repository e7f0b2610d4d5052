"""The one error that a user's input can cause."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input. The message is one line: what was given, what is allowed, what to do.

    The command line prints the message alone and exits with code 2; from Python it is an ordinary ValueError.
    """
