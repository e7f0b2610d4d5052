"""The folder of an open store: its files are reached through the folder itself, whatever becomes of its name."""

from __future__ import annotations

import os
import stat
import weakref
from pathlib import Path

from ..errors import UserError


class Folder:
    """A folder that stays the one that was opened, also when another takes its name.

    Every file is opened relative to it, and no link is followed: a reader meets the files of this store or none, never
    those of the store that replaced it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise UserError(f"store {path}: no such folder; make one with `workbench profile`") from None
        except NotADirectoryError:
            raise UserError(f"store {path}: is a file, and a store is a folder; nothing of it was read") from None
        except OSError as err:
            raise UserError(f"store {path}: cannot be opened: {err.strerror}") from err
        self._close = weakref.finalize(self, os.close, self.fd)

    def replaced(self) -> bool:
        """Whether the name no longer leads to this folder."""
        try:
            return not os.path.samestat(os.stat(self.path), os.fstat(self.fd))
        except OSError:
            return True

    def gone(self, name: str) -> UserError:
        """Why a file that was there is not: the store was replaced, or the file was removed."""
        if self.replaced():
            return UserError(f"store {self.path} was replaced or removed since it was opened; open it again")
        return UserError(f"store {self.path}: {name} is missing; profile again or restore it from a copy")

    def scan(self, name: str = ".") -> dict[str, os.stat_result]:
        """The entries of a folder in it (or of itself) by name, links as links; UserError where it is not a folder."""
        try:
            handle = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
        except FileNotFoundError:
            raise self.gone(name) from None
        except OSError:
            raise UserError(f"store {self.path}: {name} is a link or no folder; refused") from None
        try:
            with os.scandir(handle) as entries:
                return {entry.name: entry.stat(follow_symlinks=False) for entry in entries}
        except FileNotFoundError:  # removed between its listing and its stat
            raise self.gone(name) from None
        finally:
            os.close(handle)

    def open(self, name: str, size: int | None = None) -> int:
        """A descriptor of a file, which has `size` bytes where given; UserError where it is not there or not so."""
        try:
            handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self.fd)
        except FileNotFoundError:
            raise self.gone(name) from None
        except OSError as err:
            raise UserError(f"store {self.path}: {name} cannot be read: {err.strerror}") from err
        found = os.fstat(handle)
        if stat.S_ISREG(found.st_mode) and size in (None, found.st_size):
            return handle
        os.close(handle)
        raise UserError(f"store {self.path}: {name} changed since the store was opened; run verify")
