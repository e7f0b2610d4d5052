"""Blocks of a store that other processes compute, on this machine or others: each a whole shard with an entry beside it.

In a folder that all of them see they lie in `parts/PLAN` of the unfinished store, until its writer takes them over; at a
URL they lie where they will stay, and the entries in `.partial/PLAN` until the manifest is written.
"""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import UserError
from ..hashes import file_hash
from .shards import write_shard, write_synced
from .writer import partial_of, shard_name

if TYPE_CHECKING:
    from torch import Tensor

MARKER = "marker"
SEEN_WITHIN = 5.0
"""seconds in which what one machine wrote is to be seen by another"""
ENTRY = re.compile(r"(\d{5,})\.json")


class Parts(Protocol):
    """Where blocks are put by whoever computes them."""

    def write(self, number: int, rows: Mapping[str, Tensor], nonfinite: Mapping[str, int]) -> dict[str, Any]:
        """Writes a block and then its entry (rows, bytes, sha256, nonfinite), which is returned. Raises UserError."""
        ...

    def entries(self) -> dict[int, dict[str, Any]]:
        """The entries of the blocks that are there and whole, by their numbers."""
        ...


class FolderParts:
    """Blocks in a folder, beside the unfinished store that will have them."""

    def __init__(self, partial: Path, plan_hash: str) -> None:
        self.partial, self.folder = partial, partial / "parts" / plan_hash[:16]

    def make(self) -> str:
        """Makes the folder, clears away what was half written, and leaves a mark to be `check`ed by other machines."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in self.folder.glob(".*"):
            file.unlink(missing_ok=True)
        mark = uuid.uuid4().hex
        write_synced(self.folder / f".{MARKER}-{mark}", mark.encode())
        return mark

    def check(self, mark: str) -> None:
        """Raises UserError where this process does not see what `make` left."""
        end = time.monotonic() + SEEN_WITHIN
        while not (self.folder / f".{MARKER}-{mark}").is_file():
            if time.monotonic() > end:
                raise UserError(f"a worker on {os.uname().nodename} does not see {self.partial.parent}, which this is "
                                "written to; give a folder that all machines share, or for a store a URL")  # fmt: skip
            time.sleep(SEEN_WITHIN / 20)

    def shard(self, number: int) -> Path:
        """The file of a block."""
        return self.folder / Path(shard_name(number)).name

    def write(self, number: int, rows: Mapping[str, Tensor], nonfinite: Mapping[str, int]) -> dict[str, Any]:
        """See `Parts.write`. Written beside and renamed: of two that do the same block, both may."""
        beside = self.folder / f".{number}-{uuid.uuid4().hex}"
        try:
            entry = {**write_shard(beside, rows), "nonfinite": dict(nonfinite)}
            os.replace(beside, self.shard(number))
            write_synced(beside, json.dumps(entry).encode())
            os.replace(beside, self.folder / f"{number:05d}.json")
        except OSError as err:
            beside.unlink(missing_ok=True)
            raise UserError(f"cannot write {self.partial.parent}: {err.strerror or err}; what is finished is kept: make "
                            "room and run the same again, or choose another place") from err  # fmt: skip
        return entry

    def entries(self) -> dict[int, dict[str, Any]]:
        """See `Parts.entries`."""
        found: dict[int, dict[str, Any]] = {}
        for file in self.folder.glob("*.json"):
            match = ENTRY.fullmatch(file.name)
            if match is None or file.is_symlink():
                continue
            try:
                entry, shard = json.loads(file.read_text(encoding="utf-8")), self.shard(int(match[1]))
            except ValueError:
                continue  # damaged: the block is computed again
            if shard.is_file() and not shard.is_symlink() and file_hash(shard) == entry["sha256"]:
                found[int(match[1])] = entry
        return found

    def forget(self, number: int) -> None:
        """Removes the entry of a block that was taken over."""
        (self.folder / f"{number:05d}.json").unlink(missing_ok=True)


def parts_of(out: Path, plan_hash: str) -> bool:
    """Whether blocks of this plan were computed for what becomes `out`, and wait to be taken over."""
    out = Path(os.path.realpath(out)) if out.is_symlink() else out
    return bool(FolderParts(partial_of(out), plan_hash).entries())
