"""A command line in a forked child: everything is imported once, and what the child does to itself is its own."""

from __future__ import annotations

import os
import selectors
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LONGEST = 120.0  # seconds, after which a child hangs


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (negative: a signal), and what it said on stderr."""

    code: int
    said: str

    @property
    def lines(self) -> list[str]:
        return [line for line in self.said.splitlines() if line.strip()]

    @property
    def last(self) -> str:
        return self.lines[-1] if self.lines else ""


def fork(line: list[Any], first: Callable[[], None] | None = None) -> Ended:
    """Runs a command line in a child, which does `first` before it."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _child(line, first, write)
    os.close(write)
    said, hung = _drain(read, pid)
    os.close(read)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return Ended(code, said.decode(errors="replace") + ("\nhung: killed by the test" if hung else ""))


def _drain(read: int, pid: int) -> tuple[bytes, bool]:
    said, end, hung = bytearray(), time.monotonic() + LONGEST, False
    with selectors.DefaultSelector() as selector:
        selector.register(read, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, end - time.monotonic())):
                os.kill(pid, signal.SIGKILL)
                hung, end = True, time.monotonic() + LONGEST
                continue
            part = os.read(read, 1 << 16)
            if not part:
                return bytes(said), hung
            said += part


def _child(line: list[Any], first: Callable[[], None] | None, write: int) -> None:
    """Never returns."""
    code: Any = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(write, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from workbench.cli import app

        if first is not None:
            first()
        app(args=[str(word) for word in line], prog_name="workbench")
        code = 0
    except SystemExit as err:
        code = err.code if isinstance(err.code, int) else int(bool(err.code))
    except BaseException as err:  # a child must never go on as its parent would
        os.write(2, f"\nescaped: {type(err).__name__}: {err}\n".encode())
    finally:
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
