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


def read_text(file: Path, most: int = MOST) -> str:
    """The text of a regular file of at most so many bytes; OSError or ValueError, each in few words, for any other."""
    handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as stream:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is not a regular file")
        if found.st_size > most:
            raise ValueError(f"it has {found.st_size:,} bytes, more than any such file ({most:,})")
        return stream.read(most).decode("utf-8")


def read_json(file: Path, most: int = MOST) -> Any:
    """The JSON of `read_text`; ValueError too where it is none, or nested too deep."""
    return _parsed(json.loads, read_text(file, most))


def read_toml(file: Path, most: int = MOST) -> dict[str, Any]:
    """The TOML of `read_text`; ValueError too where it is none, or nested too deep."""
    found: dict[str, Any] = _parsed(tomllib.loads, read_text(file, most))
    return found


def _parsed(parse: Callable[[str], Any], text: str) -> Any:
    try:
        return parse(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


@contextmanager
def read_from(file: Path) -> Iterator[None]:
    """Around what reads figures of a file: where it lacks one, or has another kind of value there, is a UserError."""
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as err:
        raise UserError(f"{file} does not hold what is shown of it ({type(err).__name__}: {str(err)[:80]}); run it again, or "
                        "restore the file from a copy") from err  # fmt: skip
