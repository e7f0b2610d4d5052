"""Which files of a store are not what its manifest says, byte for byte."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..errors import UserError
from ..progress import progress
from .checks import MANIFEST, files_of, manifest_text
from .folder import Folder

THREADS = 8  # hashing lets other threads run; beyond this the disk is what is waited for


def damaged_files(
    folder: Folder, manifest: dict[str, Any], *, quick: bool = False
) -> tuple[list[str], list[str], list[str]]:
    """The files that are damaged (the manifest among them), that are missing, and that are not the store's own.

    Hashes every file, several at a time; `quick` compares their sizes alone. Raises UserError where the store was
    replaced.
    """
    entries = dict(sorted(files_of(manifest)))
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), thread_name_prefix="store-verify") as pool:
        states = pool.map(lambda name: _state(folder, name, entries[name], quick), entries)
        shown = progress(states, total=len(entries), desc=f"verifying {folder.path.name}", unit="file")
        found = dict(zip(entries, shown, strict=True))
    if any(found.values()) and folder.replaced():
        raise folder.gone(MANIFEST)
    damaged = [name for name, state in found.items() if state == "damaged"]
    if _digest(folder, MANIFEST) != hashlib.sha256(manifest_text(manifest).encode()).hexdigest():
        damaged.insert(0, MANIFEST)
    foreign = sorted(set(_walk(folder, ".")) - {*entries, MANIFEST})
    return damaged, [name for name, state in found.items() if state == "missing"], foreign


def _state(folder: Folder, name: str, entry: dict[str, Any], quick: bool) -> str:
    """`damaged`, `missing`, or empty where the file is whole."""
    try:
        found = os.stat(name, dir_fd=folder.fd, follow_symlinks=False)
    except FileNotFoundError:
        return "missing"
    except OSError:
        return "damaged"
    whole = stat.S_ISREG(found.st_mode) and found.st_size == entry["bytes"]
    return "" if whole and (quick or _digest(folder, name) == entry["sha256"]) else "damaged"


def _digest(folder: Folder, name: str) -> str | None:
    """The sha256 of a file; None where it is no file that can be read."""
    try:
        with os.fdopen(folder.open(name), "rb", buffering=0) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except (UserError, OSError):
        return None


def _walk(folder: Folder, name: str) -> Iterator[str]:
    """Everything below a folder of the store that is no folder itself, links among it; none is followed."""
    for entry, found in folder.scan(name).items():
        path = entry if name == "." else f"{name}/{entry}"
        if stat.S_ISDIR(found.st_mode):
            yield from _walk(folder, path)
        else:
            yield path
