"""Small files of folders that anybody may have made: read without following a link, waiting for a pipe, or without end."""

from __future__ import annotations

import json
import os
import stat
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError

MOST = 16 << 20
"""bytes"""
DEEPEST = 100
"""levels of tables and lists in one another: no file of ours has ten"""


def plain_file(file: str | Path, *, named: bool = False) -> Path:
    """Where to open a file of a folder that anybody may have made: a regular file, in that folder.

    A link that leads out of the folder is refused, but for those of the hub's cache, from its snapshots to its blobs.
    named: the user gave the file itself, so that a link is the user's own, and is followed.
    Raises OSError for a file that is not there; ValueError, in few words, for a link that leads out, and for a pipe, a
    device or a folder.

    >>> plain_file("/dev/null")
    Traceback (most recent call last):
    ValueError: it is not a regular file
    """
    file = Path(file)
    if os.path.islink(file):
        real = Path(os.path.realpath(file, strict=True))
        here = Path(os.path.realpath(file.parent))
        cached = real.parent.name == "blobs" and real.parent.parent / "snapshots" in here.parents
        if not (named or cached or here in real.parents):
            raise ValueError("it is a link that leads out of its folder; put the file itself there")
        file = real
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise ValueError("it is not a regular file")
    return file


def read_text(file: Path, most: int = MOST, *, named: bool = False) -> str:
    """The text of a `plain_file` of at most so many bytes; OSError or ValueError, each in few words, for any other."""
    handle = os.open(plain_file(file, named=named), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as stream:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is not a regular file")
        if found.st_size > most:
            raise ValueError(f"it has {found.st_size:,} bytes, more than any such file ({most:,})")
        return stream.read(most).decode("utf-8")


def read_json(file: Path, most: int = MOST) -> Any:
    """The JSON of `read_text`; ValueError too where it is none, or nested too deep."""
    return parse_json(read_text(file, most))


def parse_json(text: str) -> Any:
    """The JSON of a text; ValueError where it is none, or nested too deep."""
    return _parsed(json.loads, text)


def read_toml(file: Path, most: int = MOST, *, named: bool = False) -> dict[str, Any]:
    """The TOML of `read_text`; ValueError too where it is none, or nested too deep."""
    found: dict[str, Any] = _parsed(tomllib.loads, read_text(file, most, named=named))
    return found


def reason(err: Exception) -> str:
    """Why a file could not be read, in few words."""
    return (err.strerror or type(err).__name__ if isinstance(err, OSError) else " ".join(str(err).split()))[:120]


def _parsed(parse: Callable[[str], Any], text: str) -> Any:
    try:
        found = parse(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    check_depth(found)
    return found


def check_depth(tree: Any) -> None:
    """ValueError for JSON values that are nested deeper than `DEEPEST`: whoever goes through them would run out of stack."""
    left = [(tree, 0)]
    while left:
        one, depth = left.pop()
        if depth > DEEPEST:
            raise ValueError("it is nested too deep")
        if isinstance(one, dict | list):
            left += [(part, depth + 1) for part in (one.values() if isinstance(one, dict) else one)]


@contextmanager
def read_from(file: Path) -> Iterator[None]:
    """Around what reads figures of a file: where it lacks one, or has another kind of value there, is a UserError."""
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError, StopIteration) as err:
        raise UserError(f"{file} does not hold what is shown of it ({type(err).__name__}: {str(err)[:80]}); run it again, or "
                        "restore the file from a copy") from err  # fmt: skip
