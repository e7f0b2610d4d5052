"""How the command line fails: one line on stderr and an exit code; a traceback only where it is asked for."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from .errors import UserError
from .memory import out_of_memory

FLAGS = ("--debug", "--quiet")
BAD_INPUT, INTERNAL, STOPPED = 2, 1, 130
_UsageError = typer.BadParameter.__mro__[1]  # click's, wherever this release of typer keeps it


class StopTold(Exception):
    """A stop that has a line of its own to tell; typer would lose that of a KeyboardInterrupt."""


@contextmanager
def stops_told() -> Iterator[None]:
    """Inside the block a `Stopped` keeps what it says."""
    from .interrupts import Stopped

    try:
        yield
    except Stopped as err:
        raise StopTold(str(err)) from err


def guarded(call: Callable[[], Any], flags: Sequence[str]) -> int:
    """Runs the command line and returns its exit code; whatever it raises is told in one line on stderr."""
    debug = "--debug" in flags
    with _reporting(debug, "--quiet" in flags):
        try:
            code = call()
            if code == STOPPED:  # typer has made an exit of the KeyboardInterrupt
                raise KeyboardInterrupt
            return code if isinstance(code, int) else 0
        except (Exception, KeyboardInterrupt, typer.Abort) as err:
            if debug:
                traceback.print_exc()
            code, text = told(err)
            typer.echo(text, err=True)
            return code


def told(err: BaseException) -> tuple[int, str]:
    """The exit code and the line for an error.

    >>> told(UserError("layer 9 is out of range"))
    (2, 'error: layer 9 is out of range')
    """
    if isinstance(err, StopTold):
        return STOPPED, _one_line(err)
    if isinstance(err, (KeyboardInterrupt, typer.Abort)):
        return STOPPED, "stopped; run the same command again to go on"
    if isinstance(err, _UsageError):
        return BAD_INPUT, _usage(err)
    if isinstance(err, UserError):
        return BAD_INPUT, f"error: {_one_line(err)}"
    if out_of_memory(err):
        return (
            INTERNAL,
            f"error: out of memory ({_one_line(err)[:160]}); use smaller batches, fewer prompts or another device",
        )
    if isinstance(err, OSError):
        where = f"{err.filename}: " if err.filename else ""
        return (
            BAD_INPUT,
            f"error: {where}{err.strerror or _one_line(err)}; choose another place or make room, and run again",
        )
    if isinstance(err, UnicodeEncodeError) and "surrogates" in err.reason:
        return (
            BAD_INPUT,
            "error: the name of a file or folder here is no text in this locale; set LC_ALL=C.UTF-8, or rename it",
        )
    said = f"{type(err).__name__}: {_one_line(err)[:300]}"
    return INTERNAL, f"internal error: {said}; run again with --debug and report it"


def _usage(err: Any) -> str:
    if type(err).__name__ == "NoArgsIsHelpError":
        return str(err.ctx.get_help())
    path = err.ctx.command_path if err.ctx is not None else "workbench"
    return f"error: {_one_line(err.format_message()).rstrip('.')}; see `{path} --help`"


def _one_line(err: object) -> str:
    return " ".join(str(err).split())


class _ToStderr(logging.Handler):
    """The log on stderr, above the progress bar; tracebacks are for the log file, and for --debug."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            return
        text = (
            f"{record.levelname.lower()}: {record.getMessage()}"
            if record.levelno > logging.INFO
            else record.getMessage()
        )
        if "tqdm" in sys.modules:
            from tqdm import tqdm

            tqdm.write(text, file=sys.stderr)
        else:
            typer.echo(text, err=True)


@contextmanager
def _reporting(debug: bool, quiet: bool) -> Iterator[None]:
    """The log of `workbench` to stderr while a command runs; no bars where it should be quiet."""
    log, level, raising = logging.getLogger("workbench"), logging.getLogger("workbench").level, logging.raiseExceptions
    bars = os.environ.get("WORKBENCH_PROGRESS")
    handler = _ToStderr(logging.WARNING if quiet else logging.INFO)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    logging.raiseExceptions = debug  # a full disk is told once, not for every line of the log
    if quiet:
        os.environ["WORKBENCH_PROGRESS"] = "0"
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        logging.raiseExceptions = raising
        if quiet:
            os.environ.pop("WORKBENCH_PROGRESS")
            if bars is not None:
                os.environ["WORKBENCH_PROGRESS"] = bars
