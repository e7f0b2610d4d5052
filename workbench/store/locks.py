"""Who is using a folder: a lock that the system lets go of when its process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from ..errors import UserError

LOCK = "lock"
WAIT = 1.0  # seconds


def hold(folder: Path) -> int | None:
    """Takes the lock of a folder and returns its handle, to be closed; None where another process has it."""
    handle = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def claim(partial: Path, out: Path) -> int:
    """Makes the unfinished folder of what becomes `out`, if it is not there, and takes its lock: a handle to be closed.

    Whoever only looks whether a folder is used has its lock for an instant, so it is tried for a second. Raises
    UserError where another run writes there, the folder is a link, or it cannot be made.
    """
    end = time.monotonic() + WAIT
    for attempt in count(1):
        handle = None
        try:
            partial.mkdir(exist_ok=True)
            check_no_link(partial)
            handle = hold(partial)
            if handle is not None:
                if os.path.samestat(os.fstat(handle), os.lstat(partial / LOCK)):
                    return handle
                os.close(handle)  # removed in that instant: the lock is of a folder that nobody finds
        except FileNotFoundError:  # likewise
            if handle is not None:
                os.close(handle)
        except OSError as err:
            raise UserError(f"cannot write to {out.parent}: {err.strerror}; choose another output folder") from err
        if time.monotonic() > end and attempt > 2:  # it may have been this process that stood still
            break
        time.sleep(WAIT / 50)
    raise UserError(f"{out} is being written by another run; wait for it or choose another folder")


@contextmanager
def claim_shared(partial: Path, out: Path) -> Iterator[None]:
    """Marks the unfinished folder of what becomes `out` as used by one of several processes, which know of one another.

    Raises UserError where one run writes there alone, the folder is a link, or it cannot be made.
    """
    handle = None
    try:
        try:
            partial.mkdir(exist_ok=True)
            check_no_link(partial)
            handle = os.open(partial / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, FileNotFoundError) as err:  # or what was left there is being removed
            raise UserError(f"{out} is being written by another run; wait for it or choose another folder") from err
        except PermissionError as err:
            raise UserError(f"cannot write to {out.parent}: {err.strerror}; choose another output folder") from err
        yield
    finally:
        if handle is not None:
            os.close(handle)


def check_no_link(*folders: Path) -> None:
    """Raises UserError where one of these is a link: what it leads to is not ours to change."""
    for folder in folders:
        if folder.is_symlink():
            raise UserError(f"{folder} is a link, and unfinished work lies in folders of its own; remove the link")


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
    return is_locked(folder / LOCK)


def is_locked(file: Path) -> bool:
    """Whether a process holds this lock; it is asked for shared, and given back at once."""
    try:
        handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
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
