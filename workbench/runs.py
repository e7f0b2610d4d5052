"""A run folder: what a job leaves behind, every step kept and known by the hash of its inputs."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from .atomic import make_parent, write_json
from .errors import UserError
from .hashes import file_hash, json_hash, short_hash
from .memory import out_of_memory

log = logging.getLogger("workbench")
LOCK, LOG = "lock", "log.txt"
WAIT = 1.0  # seconds that another run's lock is tried for
MANIFEST = "manifest.json"
"""of a store: it holds the hashes of the store's other files, which whoever opens it to verify it compares"""


class Run:
    """A run folder: job.toml, steps/*.json, artefacts, log.txt, environment.json, metrics.json, report.html.

    like: other run folders; what they made of the same inputs is taken over from them.
    """

    def __init__(self, folder: str | Path, like: Iterable[str | Path] = ()) -> None:
        self.folder = Path(folder)
        self.like = tuple(Path(other) for other in like)

    @property
    def fresh(self) -> bool:
        """Whether nothing is there but what a run that was stopped at once had left: its lock, its log."""
        if not self.folder.exists():
            return True
        return self.folder.is_dir() and all(
            path.name in (LOCK, LOG) or (path.name.startswith(".") and ".partial-" in path.name)
            for path in self.folder.iterdir()
        )

    def step(
        self,
        name: str,
        inputs: Any,
        make: Callable[[], Any],
        artefacts: tuple[str, ...] = (),
        whole: Callable[[Path], Any] | None = None,
    ) -> Any:
        """The JSON result of a step: kept from an earlier run with the same inputs, or made now and kept.

        inputs: a JSON value that says everything the result depends on. artefacts: paths in the run folder that the
        step makes; where one is gone, is not byte for byte what the step had made, or `whole` raises UserError when it
        opens it, the step is done again. What failed leaves the steps before it usable: an error of `make`, a full disk
        or too little memory becomes a UserError that names the step.
        """
        from . import __version__

        key = short_hash({"inputs": inputs, "version": __version__})
        record = self.folder / "steps" / f"{name}.json"
        kept = _kept(record, key)
        if kept is not None and self._stand(artefacts, whole, kept["files"]):
            log.info("step %s: kept", name)
            return kept["result"]
        for other in self.like:
            kept = _kept(other / "steps" / f"{name}.json", key)
            if kept is not None and self._taken(other, artefacts) and self._stand(artefacts, whole, kept["files"]):
                log.info("step %s: as in %s", name, other)
                write_json(record, kept)
                return kept["result"]
        log.info("step %s", name)
        start = time.perf_counter()
        with failures_told(f"step {name}: ", self.folder):
            result = make()
            made = {"result": result, "files": self._digests(artefacts)}
            seconds = time.perf_counter() - start
            write_json(record, {"key": key, "seconds": seconds, **made, "sha256": _seal(made)})
        return result

    def _digests(self, artefacts: tuple[str, ...]) -> dict[str, str]:
        """The sha256 of every file of some artefacts, by its path in the run folder; of a store, of its manifest."""
        return {
            file.relative_to(self.folder).as_posix(): file_hash(file)
            for artefact in artefacts
            for file in _files(self.folder / artefact)
        }

    def _stand(
        self, artefacts: tuple[str, ...], whole: Callable[[Path], Any] | None, digests: Mapping[str, str]
    ) -> bool:
        for path in (self.folder / a for a in artefacts):
            if not path.exists():
                return False
            name = path.relative_to(self.folder).as_posix()
            was = {file: digest for file, digest in digests.items() if file == name or file.startswith(f"{name}/")}
            if self._digests((name,)) != was:
                log.warning("%s is not what its step had made; the step is done again", path)
                return False
            try:
                if whole is not None:
                    whole(path)
            except UserError as err:
                log.warning("%s; the step is done again", err)
                return False
        return True

    def _taken(self, other: Path, artefacts: tuple[str, ...]) -> bool:
        """Whether the artefacts of another run lie in this one now: as links to its files, where the disk has them."""
        for artefact in artefacts:
            if not (other / artefact).is_dir():
                return False
            shutil.rmtree(self.folder / artefact, ignore_errors=True)
            try:
                shutil.copytree(other / artefact, self.folder / artefact, copy_function=_linked)
            except (OSError, shutil.Error) as err:
                log.warning("%s was not taken over from %s (%s); the step is done again", artefact, other, err)
                return False
        return True

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Holds the run folder for this process; raises UserError where another one is writing into it.

        Whoever only looks whether it runs has the lock for an instant, so it is tried for a second.
        """
        make_parent(self.folder / LOCK)
        end = time.monotonic() + WAIT
        with failures_told("", self.folder):
            handle = (self.folder / LOCK).open("a")
        with handle:
            while not _locked(handle):
                if time.monotonic() > end:
                    raise UserError(
                        f"another run is writing into {self.folder}; wait for it, or give this job another name"
                    )
                time.sleep(0.02)
            yield

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Writes the log of the block to log.txt."""
        with failures_told("", self.folder):
            handler = _LogFile(self.folder / LOG)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        level = log.level
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        try:
            yield
        except BaseException:
            log.exception("the run stopped")
            raise
        finally:
            log.removeHandler(handler)
            log.setLevel(level)
            with suppress(OSError):  # its last lines have no room either
                handler.close()


class _LogFile(logging.FileHandler):
    """A log that a full disk does not stop: what is wrong is told by whoever writes the results."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


@contextmanager
def failures_told(what: str, folder: Path) -> Iterator[None]:
    """Inside the block an error of the file system, or too little memory, becomes a UserError that says what to do.

    what: what the line begins with; put before a UserError too. folder: where is written, should the error not say it.
    """
    try:
        yield
    except UserError as err:
        if not what:
            raise
        raise UserError(f"{what}{err}") from err
    except OSError as err:
        reason = err.strerror or " ".join(str(err).split()) or type(err).__name__
        raise UserError(f"{what}{err.filename or folder}: {reason}; what was finished is kept: make room or choose another "
                        "folder, and run the same again") from err  # fmt: skip
    except (MemoryError, RuntimeError) as err:
        if not out_of_memory(err):
            raise
        raise UserError(f"{what}out of memory ({' '.join(str(err).split())[:160]}); what was finished is kept: give smaller "
                        "batches, fewer sites or another device, and run again") from err  # fmt: skip


def _seal(made: Mapping[str, Any]) -> str:
    """The hash of what a record holds, as it is read again."""
    return json_hash(json.loads(json.dumps(dict(made))))


def _files(artefact: Path) -> list[Path]:
    if not artefact.is_dir():
        return [artefact]
    if (artefact / MANIFEST).is_file():
        return [artefact / MANIFEST]
    return sorted(file for file in artefact.rglob("*") if file.is_file())


def _kept(record: Path, key: str) -> dict[str, Any] | None:
    """The record of a step, where it is of these inputs and whole."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        if found["key"] != key:
            return None
        if found["sha256"] == _seal({name: found[name] for name in ("result", "files")}):
            return dict(found)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    log.warning("%s is not what its step had written; the step is done again", record)
    return None


def _linked(source: str, target: str) -> None:
    """Files of an artefact are written once and replaced whole, so that two runs can share one."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _locked(handle: TextIOWrapper) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def environment() -> dict[str, Any]:
    """Versions, threads and devices: what a figure depends on beside the code."""
    from importlib.metadata import version

    import torch

    names = ("workbench", "torch", "transformers", "safetensors", "scikit-learn", "numpy")
    return {
        "python": sys.version.split()[0],
        "versions": {n: version(n) for n in names},
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + " CPU",
        "date": time.strftime("%Y-%m-%d"),
    }
