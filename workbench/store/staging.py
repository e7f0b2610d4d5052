"""A new store written in one go: whole at the end, or nothing of it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..progress import progress
from ..sites import Site
from .checks import TABLES
from .store import Store
from .tables import dictionary_of
from .writer import StoreWriter, partial_of

Tables = Iterable[Any]  # of pyarrow Tables
GROUP_ROWS = 16384  # of a table that is read, changed and written at a time
TARGET_BYTES = 64 << 20  # of a block that is read, changed and written: what is held in memory, about twice


def write_store(
    out: str | Path,
    key: str,
    manifest: dict[str, Any],
    blocks: Iterable[dict[Site, Tensor]],
    tables: tuple[Tables, Tables],
    *,
    count: int,
    overwrite: bool = False,
    doing: str = "writing",
) -> Store:
    """Writes a store at `out` from its blocks of rows, one after the other, and opens it.

    key: what the blocks follow from; a run that was killed goes on where it was when its key is the same.
    manifest: all but the shards, tables and checksum. tables: the row groups of rows.parquet and prompts.parquet.
    count: how many blocks there are, for the progress bar.
    Where it fails (a full disk, a bad source), nothing is left behind, and what was at `out` is there still.
    """
    out = Path(out).expanduser()
    out = Path(os.path.realpath(out)) if out.is_symlink() else out
    try:
        with StoreWriter(out, key, overwrite=overwrite) as writer:
            before = _identity(out)
            try:
                done = len(writer.blocks)
                for i, block in enumerate(progress(blocks, total=count, desc=f"{doing} {out.name}", unit="block")):
                    if i >= done:
                        writer.write(block, {site: int((~torch.isfinite(x)).sum()) for site, x in block.items()})
                writer.finish(manifest, lambda folder: _write_tables(folder, tables))
            except Exception:
                _clear(writer, before)
                raise
    except (UserError, OSError) as err:
        reason = err if isinstance(err, OSError) else err.__cause__
        if not isinstance(reason, OSError) or reason.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EPERM):
            raise  # written by another run, or nothing that room would help
        partial = partial_of(out)
        if not partial.is_symlink() and not (partial / "old").exists():  # of a writer that had no room to begin
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot write {out}: {reason.strerror or reason}; nothing of it was kept: make room or choose "
                        "another folder, and run the same again") from err  # fmt: skip
    return Store.open(out)


def row_groups(store: Store, table: str, columns: list[str] | None = None) -> Iterator[Any]:
    """A table of a store in pieces of a fixed number of lines, whatever the row groups of its file."""
    return store.tables.batches(table, columns, GROUP_ROWS)


def _write_tables(folder: Path, tables: tuple[Tables, Tables]) -> None:
    import pyarrow.parquet as pq

    for name, groups in zip(TABLES, tables, strict=True):
        writer = None
        try:
            for group in groups:
                plain = dictionary_of(name, group.schema.names)
                writer = writer or pq.ParquetWriter(folder / name, group.schema, use_dictionary=plain)
                writer.write_table(group)
        finally:
            if writer is not None:
                writer.close()


def _identity(path: Path) -> int | None:
    return path.stat().st_ino if path.exists() else None


def _clear(writer: StoreWriter, before: int | None) -> None:
    """Removes the unfinished folder; a store that was replaced, or was about to be, goes back to its place first."""
    if _identity(writer.out) != before:
        if writer.out.exists():  # the new one: what failed came after it had its name
            os.rename(writer.out, writer.partial / "new")
        for aside in (writer.partial / "old", writer.store):  # renamed, or exchanged with the new one
            if before is not None and _identity(aside) == before:
                os.rename(aside, writer.out)
    shutil.rmtree(writer.partial, ignore_errors=True)
