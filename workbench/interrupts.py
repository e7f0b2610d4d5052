"""Ctrl-C at a good moment: the first one is noted, so that work can end where nothing is lost; the second acts at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(KeyboardInterrupt):
    """A Ctrl-C that was heeded at a good moment; its message says what is kept and how to go on."""


class Asked:
    """Whether a stop was asked for; `check` raises `Stopped` if it was."""

    def __init__(self) -> None:
        self.asked = False

    def check(self) -> None:
        if self.asked:
            raise Stopped("stopped")


@contextmanager
def first_interrupt_noted() -> Iterator[Asked]:
    """Inside the block the first SIGINT only sets `asked`; the next acts as it did before.

    Leaving the block raises `Stopped` where a stop was asked for and nobody has heeded it. Where signals cannot be
    caught (outside the main thread) or are ignored, nothing changes.
    """
    noted = Asked()
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before in (signal.SIG_IGN, None):
        yield noted
        return

    def note(*_: Any) -> None:
        noted.asked = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
    noted.check()
