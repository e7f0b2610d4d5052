"""Which files of a store are not what its manifest says, byte for byte."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..errors import UserError
from ..progress import progress
from .checks import MANIFEST, files_of, manifest_text
from .folder import Folder

THREADS = 8  # hashing lets other threads run; beyond this the disk is what is waited for


def damaged_files(folder: Folder, manifest: dict[str, Any]) -> list[str]:
    """The files, by name, that are damaged, missing or not the store's own; the manifest itself included.

    Hashes every file, several at a time. Raises UserError where the store was replaced.
    """
    entries = dict(files_of(manifest))
    found = set(folder.scan()) | {f"shards/{name}" for name in folder.scan("shards")}
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), thread_name_prefix="store-verify") as pool:
        digests = pool.map(lambda name: _digest(folder, name), entries)
        shown = progress(digests, total=len(entries), desc=f"verifying {folder.path.name}", unit="file")
        whole = [digest == entry["sha256"] for entry, digest in zip(entries.values(), shown, strict=True)]
    if not all(whole) and folder.replaced():
        raise folder.gone(MANIFEST)
    bad = [name for name, good in zip(entries, whole, strict=True) if not good]
    if _digest(folder, MANIFEST) != hashlib.sha256(manifest_text(manifest).encode()).hexdigest():
        bad.insert(0, MANIFEST)
    return bad + sorted(found - {*entries, MANIFEST, "shards"})


def _digest(folder: Folder, name: str) -> str | None:
    """The sha256 of a file; None where it is no file that can be read."""
    try:
        with os.fdopen(folder.open(name), "rb", buffering=0) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except (UserError, OSError):
        return None
