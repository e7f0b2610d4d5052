"""Writing so that a reader never meets a half: everything is written beside its place and renamed into it.

What is being written has its writer's lock (`flock`, which the system lets go of however a process ends), so that the next
writer of the same name tells what a killed one left from what another is busy with, and clears it away.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import UserError


def _reason(err: OSError) -> str:
    return err.strerror or type(err).__name__


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_parent(path: Path) -> None:
    """Makes the folder that `path` will lie in; raises UserError where that cannot be done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise UserError(f"cannot write to {path.parent}: {_reason(err)}; choose another output folder") from err


def taken(path: Path) -> UserError:
    """What to say of a folder that is to be made and is there."""
    return UserError(f"{path} exists already; choose another folder or pass overwrite=True (--overwrite)")


def check_free(path: Path, *, marker: str, overwrite: bool) -> None:
    """Raises UserError where a folder that `staged_folder` makes would be in the place of something."""
    if not path.exists():
        return
    if not overwrite:
        raise taken(path)
    if not path.is_dir() or (any(path.iterdir()) and not (path / marker).is_file()):
        raise UserError(
            f"{path} is not overwritten: it holds no {marker}, so it is something else; choose another folder"
        )


@contextmanager
def staged_folder(path: str | Path, *, marker: str, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends without an exception.

    marker: a file that every folder of this kind holds; with `overwrite`, only such a folder (or an empty one) is
    replaced, so that a slip of the pen does not cost somebody's files. Raises UserError when `path` exists, cannot be
    written, or the disk is full; in each case what was at `path` is there still, and nothing else.
    """
    path = Path(path)
    path = Path(os.path.realpath(path)) if path.is_symlink() else path  # the link stays, and leads to the new folder
    check_free(path, marker=marker, overwrite=overwrite)
    make_parent(path)
    try:
        clear_abandoned(path)
        temporary, lock = _new_folder(path, "partial")
    except OSError as err:
        raise UserError(f"cannot write to {path.parent}: {_reason(err)}; choose another output folder") from err
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                sync(file)
        os.chmod(temporary, 0o755)
        _replace(temporary, path)
        sync(path.parent)
    except OSError as err:
        raise UserError(f"cannot write {path}: {_reason(err)}; nothing was changed there; make room or choose another "
                        "folder and run again") from err  # fmt: skip
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def _new_folder(path: Path, what: str) -> tuple[Path, int]:
    """A hidden folder beside `path` with its writer's lock: a handle to be closed."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.{what}-", dir=path.parent))
        lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        if _locked(lock, folder):
            return folder, lock
        os.close(lock)  # cleared away in the instant before it had its lock


def _locked(handle: int, path: Path) -> bool:
    """Takes the lock of a new file or folder, where the file system has locks; False where it is gone already."""
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


def clear_abandoned(path: Path) -> None:
    """Removes what writers of `path` that were killed had left beside it; one that is busy holds the lock of its own.

    Where a writer was killed between taking the old away and putting the new there, the old is put back.
    """
    made = re.compile(re.escape(f".{path.name}.") + r"(partial|old)-[a-z0-9_]{8}")
    for name in [entry.name for entry in os.scandir(path.parent) if made.fullmatch(entry.name)]:
        left = path.parent / name
        try:
            handle = os.open(left, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:  # gone, a link, or another user's: it cannot be told, so it is left alone
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (left / "was").exists() and not path.exists():
                os.rename(left / "was", path)
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
        except OSError:
            continue  # being written
        finally:
            os.close(handle)


def _replace(new: Path, path: Path) -> None:
    """Renames `new` to `path`; what was there is at `new` then, or is put back should that fail."""
    if not path.exists():
        os.rename(new, path)
        return
    if exchange(new, path):
        return
    old, lock = _new_folder(path, "old")
    os.rename(path, old / "was")
    try:
        os.rename(new, path)
    except OSError:
        os.rename(old / "was", path)
        raise
    finally:
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        os.close(lock)


def exchange(a: Path, b: Path) -> bool:
    """Lets two names change places, so that neither is missing for a moment; False where the system has no such call."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(a), here, os.fsencode(b), swap) == 0


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes a file beside its place, syncs it and renames it."""
    path = Path(path)
    make_parent(path)
    temporary = None
    try:
        clear_abandoned(path)
        handle, temporary = _new_file(path)
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
    except BaseException as err:  # a Ctrl-C too leaves nothing behind
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)
        if not isinstance(err, OSError):
            raise
        raise UserError(f"cannot write {path}: {_reason(err)}; make room or choose another folder") from err


def _new_file(path: Path) -> tuple[int, str]:
    """A hidden file beside `path`, open and with its writer's lock."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
        if _locked(handle, Path(name)):
            return handle, name
        os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` for UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """`write_bytes` for JSON: sorted keys, two spaces, no NaN."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")
