"""The sums of a run so far, on disk, so that one that is killed goes on where it last saved them."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..atomic import make_parent, staged_folder, taken, write_json
from ..hashes import file_hash
from ..maps.moments import Moments
from ..store.checks import MOMENTS
from ..store.leftovers import clear_after
from ..store.locks import claim

if TYPE_CHECKING:
    from .sums import Sums

log = logging.getLogger("workbench")


class SavedSums:
    """The sums so far, in a hidden folder beside `out`; `now.json` names the last set that was written whole."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key

    @classmethod
    @contextmanager
    def locked(cls, out: Path, key: str, *, overwrite: bool) -> Iterator[SavedSums]:
        """One run at a time for each `out`; UserError where something is there once the lock is held (unless `overwrite`)."""
        make_parent(out)
        folder = out.parent / f".{out.name}.moments-partial"  # not a store's `.partial`, which may hold its only copy
        lock = claim(folder, out)
        try:
            if not overwrite and out.exists():  # whoever had the lock before may just have made it
                raise taken(out)
            yield cls(folder, key)
        finally:
            os.close(lock)
            if not overwrite:
                clear_after(out)

    def save(self, sums: Sums) -> None:
        folder = self.folder / f"after-{sums.done}"
        if not folder.exists():
            with staged_folder(folder, marker=MOMENTS) as new:
                write_folds(sums.folds, new)
        files = {file.name: file_hash(file) for file in sorted(folder.glob("fold-*.safetensors"))}
        write_json(self.folder / "now.json", {"key": self.key, "done": sums.done, "files": files})
        self._clear(but=folder)

    def restore(self, sums: Sums) -> None:
        """Takes up the sums of an earlier run with the same arguments; anything else is cleared away."""
        try:
            now = json.loads((self.folder / "now.json").read_text(encoding="utf-8"))
            if now["key"] != self.key:
                return self._clear()
            done = int(now["done"])
            folder = self.folder / f"after-{done}"
            files = [folder / f"fold-{i}.safetensors" for i in range(len(sums.folds))]
            if {file.name: file_hash(file) for file in files} != now["files"] or done > len(sums.plan.blocks):
                log.warning("%s is damaged; its moments are made anew", folder)
                return self._clear()
        except (OSError, ValueError, KeyError, TypeError):
            return self._clear()
        sums.folds, sums.done = [_going_on(sums, Moments.load(file)) for file in files], done
        self._clear(but=folder)
        log.info("going on after %d of %d blocks", sums.done, len(sums.plan.blocks))

    def remove(self) -> None:
        self._clear()
        shutil.rmtree(self.folder / "parts", ignore_errors=True)
        (self.folder / "lock").unlink(missing_ok=True)
        with suppress(OSError):  # it holds what somebody else has put there
            self.folder.rmdir()

    def _clear(self, but: Path | None = None) -> None:
        """Removes what was made here, whole or while it was being written, and nothing else."""
        for found in [*self.folder.glob("after-*"), *self.folder.glob(".after-*")]:
            if found != but and found.is_dir() and not found.is_symlink():
                shutil.rmtree(found, ignore_errors=True)
        for found in [*self.folder.glob(".now.json.*"), *([self.folder / "now.json"] if but is None else [])]:
            found.unlink(missing_ok=True)


def _going_on(sums: Sums, loaded: Moments) -> Moments:
    if not loaded.n:
        return sums.empty()
    loaded.products = sums.products
    return loaded.to(sums.model.device)


def write_folds(folds: list[Moments], folder: Path) -> dict[str, str]:
    for i, moments in enumerate(folds):
        moments.save(folder / f"fold-{i}.safetensors")
    return {f"fold-{i}.safetensors": file_hash(folder / f"fold-{i}.safetensors") for i in range(len(folds))}
