"""What is tried: for each kind of outside file, the names it has, inputs to begin from, and how it is opened and used."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from workbench.errors import UserError

from . import bundles
from .bundles import Entry
from .watch import MEMORY, SECONDS, Broken, Watch, peak

ROOM = "WORKBENCH_FUZZ_ROOM"
"""names a folder for the places of targets, which whoever sets it takes away: atheris ends a process without a goodbye"""
LONGEST = 2000
"""characters of an error's one line, the folder's name apart"""
Repair = Callable[[list[Entry], random.Random], list[Entry]]
_watch: Watch | None = None


class TooSlow(BaseException):
    """An input took longer than it may."""


@dataclass(frozen=True)
class Target:
    """A parser: `open` reads a folder that holds some of `names` and uses what it read; `seeds` are good inputs.

    A target is called with bytes. It returns where the parser took them or refused them by a UserError of one line, and
    raises for everything else: another exception, more than `SECONDS`, `MEMORY` more than before, or what `Watch` sees.
    """

    name: str
    names: tuple[str, ...]
    open: Callable[[Path], Any]
    seeds: Callable[[], list[bytes]]
    repair: Repair | None = None
    named: bool = False
    """whether the user gives its one file and not a folder: a link is the user's own then, and none is tried"""
    rate: float = 1.0
    """inputs a run gives it, of what the others get: the slow ones get fewer"""
    _state: dict[str, Any] = field(default_factory=dict, repr=False)

    def __call__(self, data: bytes) -> None:
        room = self._room()
        folder = room / "in"
        folder.mkdir()
        try:
            entries = bundles.unpack(data, len(self.names))
            entries = [e for e in entries if e[1] not in (bundles.LINK, bundles.DANGLING)] if self.named else entries
            odd = bundles.write(entries, self.names, folder, room / "out")
            self._guarded(folder, room / "out", odd)
        finally:
            _remove(folder)

    def _guarded(self, folder: Path, outside: Path, odd: bool) -> None:
        watch, before = _the_watch(), peak()
        signal.signal(signal.SIGALRM, _too_slow)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        watch.begin(folder, outside, odd)
        try:
            self.open(folder)
        except UserError as err:
            _check_message(str(err).replace(str(folder), ""))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            broken = watch.end()
        if broken:
            raise Broken(broken)
        if peak() - before > MEMORY:
            raise MemoryError(f"took {(peak() - before) >> 20} MiB")

    def _room(self) -> Path:
        """A place of this target and process, with good files beside it for links to lead to; never on a disk."""
        if self._state.get("pid") != os.getpid():
            memory = os.environ.get(ROOM) or ("/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
            room = Path(tempfile.mkdtemp(prefix="workbench-fuzz-", dir=memory))
            self._state.update(pid=os.getpid(), room=room)
            (room / "out").mkdir()
            for seed in self.seeds():
                bundles.write(bundles.unpack(seed, len(self.names)), self.names, room / "out", room)
        found: Path = self._state["room"]
        return found

    def warm(self) -> None:
        """Opens every seed, which must succeed for one at least: so imports are done and the inputs lead somewhere."""
        opened = 0
        room = self._room()
        for seed in self.seeds():
            folder = room / "in"
            folder.mkdir()
            try:
                bundles.write(bundles.unpack(seed, len(self.names)), self.names, folder, room / "out")
                self.open(folder)
                opened += 1
            except UserError:
                pass
            finally:
                _remove(folder)
        assert opened, f"no seed of {self.name} opens"

    @contextmanager
    def ready(self) -> Iterator[Target]:
        """It, warm inside the block."""
        gc.collect()  # a store of an earlier test that is forgotten removes its folder: not while we look on
        try:
            self.warm()
            yield self
        finally:
            self.close()

    def refusal(self, data: bytes) -> str:
        """The message by which the parser refuses an input; "" where it takes it. Raises what a call does."""
        said: list[str] = []

        def listening(folder: Path) -> None:
            try:
                self.open(folder)
            except UserError as err:
                said.append(str(err))
                raise

        heard = replace(self, open=listening)
        heard(data)
        return "".join(said)

    def close(self) -> None:
        """Takes its place in memory away."""
        if self._state.pop("pid", None) == os.getpid():
            shutil.rmtree(self._state["room"], ignore_errors=True)


def _the_watch() -> Watch:
    global _watch
    _watch = _watch or Watch()
    return _watch


def _too_slow(*_: int | FrameType | None) -> None:
    raise TooSlow(f"longer than {SECONDS:.0f} s")


def _check_message(said: str) -> None:
    if len(said) > LONGEST:
        raise AssertionError(f"an error of {len(said)} characters: {said[:200]!r}")
    if any(ord(c) < 32 or c in "\x7f\x85\u2028\u2029" for c in said):
        raise AssertionError(f"an error of several lines: {said[:300]!r}")


def _remove(folder: Path) -> None:
    try:
        for entry in os.scandir(folder):
            os.rmdir(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
        os.rmdir(folder)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)


def entry_json(entries: list[Entry], index: int) -> tuple[int, dict[str, Any]] | None:
    """Where the file of a name stands, and its JSON object, where it is one."""
    for i, (name, _, content) in enumerate(entries):
        if name == index:
            try:
                found = json.loads(content)
            except (ValueError, RecursionError):
                return None
            return (i, found) if isinstance(found, dict) else None
    return None
