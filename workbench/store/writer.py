"""Writing a store block by block, so that a run killed at any moment goes on where it was and ends with the same bytes.

All of it happens in a hidden folder beside the store, `.NAME.partial`:

    journal.jsonl   the hash of the plan, then one line for each finished block
    store/          the shards so far; at the end the tables and the manifest; then it takes the place of NAME
    parts/          blocks that other processes computed, until they are taken over; see `parts`
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from ..atomic import exchange, make_parent, sync, taken
from ..errors import UserError
from ..hashes import file_hash
from ..sites import Site
from .checks import MANIFEST, TABLES, check_manifest, manifest_text
from .leftovers import clear_after
from .locks import check_no_link, claim
from .shards import write_shard, write_synced


class StoreWriter:
    """Writes the store at `out`; `blocks` are already there from an earlier run of the same plan.

    Use as a context manager: `write` each further block in order, then `finish`. Writing happens in a thread of its
    own, at most one block behind. Raises UserError where `out` exists (unless `overwrite`, and it is a store), cannot
    be written, is being written by another run, or has finished blocks of another plan (unless `overwrite`). Where
    `out` is a link, the store is written where it leads.
    """

    def __init__(self, out: Path, plan_hash: str, *, overwrite: bool = False) -> None:
        out = Path(os.path.realpath(out)) if out.is_symlink() else out  # the link stays, and leads to the new store
        self.out, self.partial, self.overwrite = out, partial_of(out), overwrite
        self.store, self.journal = self.partial / "store", self.partial / "journal.jsonl"
        try:
            self._check_target()
        except UserError:
            clear_after(out)
            raise
        make_parent(out)
        self._lock = claim(self.partial, out)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store-writer")
        self._pending: Future[None] | None = None
        try:
            check_no_link(self.store, self.store / "shards")
            if not out.exists() and (self.partial / "old").exists():  # killed between the last two renames
                os.rename(self.partial / "old", out)
            self._check_target()  # again: that one, or what another run has made before it let go of the lock
            self.blocks = self._resume(plan_hash)
        except BaseException:
            os.close(self._lock)  # or the place would be busy for as long as the error is kept
            clear_after(self.out)
            raise

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True)
        os.close(self._lock)

    @property
    def n_bytes(self) -> int:
        """What the finished blocks take on disk."""
        return sum(block["bytes"] for block in self.blocks)

    def _check_target(self) -> None:
        if not self.out.exists():
            return
        if not self.overwrite:
            raise taken(self.out)
        if not self.out.is_dir() or (any(self.out.iterdir()) and not (self.out / MANIFEST).is_file()):
            raise UserError(f"{self.out} exists and is not a store, so it is not overwritten; choose another folder")

    def _resume(self, plan_hash: str) -> list[dict[str, Any]]:
        """The blocks in the journal, up to the first whose shard is not whole; anything else is cleared away.

        Raises UserError where that would be finished blocks of another plan, unless they are to be overwritten.
        """
        first = json.dumps({"plan": plan_hash}) + "\n"
        lines = self.journal.read_text(encoding="utf-8").splitlines(keepends=True) if self.journal.is_file() else []
        blocks = self._journalled(lines[1:])
        if blocks and lines[0] != first:
            if not self.overwrite:
                size = sum(block["bytes"] for block in blocks)
                raise UserError(f"{self.partial} holds {len(blocks)} finished blocks ({size} bytes) of a run with other "
                                "arguments: the same arguments go on with them, overwrite=True (--overwrite) or removing "
                                "that folder begins anew")  # fmt: skip
            blocks = []
        kept = {self.store / block["file"] for block in blocks}
        try:
            (self.store / "shards").mkdir(parents=True, exist_ok=True)
            for file in [f for f in self.store.rglob("*") if not f.is_dir() and f not in kept]:
                file.unlink()
            write_synced(self.partial / "journal.new", (first + "".join(lines[1 : 1 + len(blocks)])).encode())
            os.replace(self.partial / "journal.new", self.journal)
        except OSError as err:
            raise self._full(err, len(blocks)) from err
        return blocks

    def _journalled(self, lines: list[str]) -> list[dict[str, Any]]:
        blocks: list[dict[str, Any]] = []
        for line in lines:
            try:
                block = json.loads(line)
            except ValueError:
                break  # the line that was being written when the run was killed
            if not line.endswith("\n") or not self._whole(block, shard_name(len(blocks))):
                break
            blocks.append(block)
        return blocks

    def _whole(self, block: dict[str, Any], name: str) -> bool:
        # what lies there may be of the store that the new one had just changed places with, or damaged since
        file = self.store / name
        same = block["file"] == name and file.is_file() and file.stat().st_size == block["bytes"]
        return same and file_hash(file) == block["sha256"]

    def _full(self, err: OSError, done: int) -> UserError:
        return UserError(f"cannot write {self.out}: {err.strerror or err}; {done} blocks are kept in "
                         f"{self.partial.name}: make room and run the same again, or choose another place")  # fmt: skip

    def write(self, tensors: dict[Site, Tensor], nonfinite: dict[Site, int]) -> None:
        """Queues the next block: one tensor of rows per site, and how many of its values are not finite.

        Waits for the block before it."""
        self._settle()
        self._pending = self._pool.submit(self._write_block, len(self.blocks), tensors, nonfinite)

    def _settle(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _write_block(self, number: int, tensors: dict[Site, Tensor], nonfinite: dict[Site, int]) -> None:
        name = shard_name(number)
        try:
            entry = write_shard(self.store / name, {str(site): rows for site, rows in tensors.items()})
            self._note({"file": name, **entry, "nonfinite": {str(site): nonfinite[site] for site in tensors}})
        except OSError as err:
            raise self._full(err, number) from err

    def adopt(self, file: Path, entry: dict[str, Any]) -> None:
        """Takes a whole shard that was written beside, on the same disk, as the next block; `file` is gone then.

        entry: its rows, bytes, sha256 and nonfinite.
        """
        self._settle()
        name = shard_name(len(self.blocks))
        try:
            os.replace(file, self.store / name)
            sync(self.store / "shards")
            self._note({"file": name, **{key: entry[key] for key in ("rows", "bytes", "sha256", "nonfinite")}})
        except OSError as err:
            raise self._full(err, len(self.blocks)) from err

    def _note(self, block: dict[str, Any]) -> None:
        with self.journal.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(block) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.blocks.append(block)

    def finish(self, manifest: dict[str, Any], write_tables: Callable[[Path], None]) -> None:
        """Writes the tables (by `write_tables(folder)`) and the manifest, and renames the store into its place.

        manifest: all but the shards, the tables and the checksum, which are filled in here.
        """
        self._settle()
        try:
            write_tables(self.store)
            tables = {name: self._entry(self.store / name) for name in TABLES}
            whole = {**manifest, "shards": self.blocks, "tables": tables}
            check_manifest(f"cannot write {self.out}", whole)
            write_synced(self.store / MANIFEST, manifest_text(whole).encode())
            for folder in (self.store / "shards", self.store):
                sync(folder)
            self._check_target()
            if not (self.out.exists() and exchange(self.store, self.out)):
                if self.out.exists():
                    shutil.rmtree(self.partial / "old", ignore_errors=True)
                    os.rename(self.out, self.partial / "old")
                os.rename(self.store, self.out)
            sync(self.out.parent)
        except OSError as err:
            raise self._full(err, len(self.blocks)) from err
        shutil.rmtree(self.partial, ignore_errors=True)

    @staticmethod
    def _entry(file: Path) -> dict[str, Any]:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
        return {"bytes": file.stat().st_size, "sha256": file_hash(file)}


def partial_of(out: Path) -> Path:
    """The hidden folder in which what becomes `out` is written."""
    return out.parent / f".{out.name}.partial"


def shard_name(number: int) -> str:
    return f"shards/{number:05d}.safetensors"
