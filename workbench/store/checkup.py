"""What is wrong with a store's files: which are damaged, missing, or not its own."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from .checks import MANIFEST, check_manifest, read_manifest
from .damage import damaged_files
from .folder import Folder

SHOWN = 5  # names in a message


@dataclass(frozen=True)
class Damage:
    """The files of a store that are not as its manifest says, by their names in its folder; false where all is well."""

    path: Path
    damaged: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    unreadable: str = ""
    """Why not even the manifest can be read, or what it says that is not allowed; empty where it can."""

    def __bool__(self) -> bool:
        return bool(self.unreadable or self.damaged or self.missing or self.foreign)

    def __str__(self) -> str:
        """One line that names the files."""
        if self.unreadable:
            return self.unreadable
        parts = [
            f"{kind} {', '.join(names[:SHOWN])}{f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''}"
            for kind, names in (("damaged", self.damaged), ("missing", self.missing), ("foreign", self.foreign))
            if names
        ]
        return f"store {self.path}: {'; '.join(parts) if parts else 'whole'}"


def find_damage(path: str | Path, *, quick: bool = False) -> Damage:
    """Recomputes every checksum of the store in folder `path`, however damaged it is.

    quick: compare sizes only and read no file.

    >>> find_damage("no/such/folder").unreadable
    'store no/such/folder: no such folder; make one with `workbench profile`'
    """
    path = Path(path).expanduser()
    try:
        manifest = checked_manifest(path)
        check_place(path)
        damaged, missing, foreign = damaged_files(Folder(path), manifest, quick=quick)
    except UserError as err:
        return Damage(path, unreadable=str(err))
    return Damage(path, damaged, missing, foreign)


def check_place(path: Path) -> None:
    """Raises UserError where `shards` of a store is a link or a file: what lies behind it is not the store's to judge."""
    shards = path / "shards"
    if os.path.lexists(shards) and (shards.is_symlink() or not shards.is_dir()):
        raise UserError(f"store {path}: its shards is a link or no folder; put the folder of its shards in that place")


def verify_stores(paths: Iterable[str | Path]) -> list[Damage]:
    """`find_damage` of each store: every checksum is recomputed. An entry is false where its store is whole."""
    return [find_damage(path) for path in paths]


def checked_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a store whose files may be damaged; UserError where it cannot be read, or contradicts itself."""
    manifest = read_manifest(Folder(path))
    try:
        check_manifest(f"store {path}", manifest)
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as err:
        what = f"{type(err).__name__}: {err}"
        raise UserError(f"store {path}: its {MANIFEST} is damaged ({what}); profile again") from err
    return manifest
