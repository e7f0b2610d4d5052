"""Who is using a folder: a lock that the system lets go of when its process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError

LOCK = "lock"


def hold(folder: Path) -> int | None:
    """Takes the lock of a folder and returns its handle, to be closed; None where another process has it."""
    handle = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Marks a folder as being written by this process while the block runs; its lock file goes at the end."""
    handle = hold(folder)
    if handle is None:
        raise UserError(f"{folder} is being written by another run; wait for it or choose another folder")
    try:
        yield
        (folder / LOCK).unlink(missing_ok=True)
    finally:
        os.close(handle)


def is_held(folder: Path) -> bool:
    """Whether a process is writing to an unfinished folder: it holds the lock there."""
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except OSError:  # another user's: it cannot be told, so it is left alone
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False
