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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from .atomic import make_parent, write_json
from .errors import UserError
from .hashes import short_hash

log = logging.getLogger("workbench")
LOCK = "lock"


class Run:
    """A run folder: job.toml, steps/*.json, artefacts, log.txt, environment.json, metrics.json, report.html.

    like: other run folders; what they made of the same inputs is taken over from them.
    """

    def __init__(self, folder: str | Path, like: Iterable[str | Path] = ()) -> None:
        self.folder = Path(folder)
        self.like = tuple(Path(other) for other in like)

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
        step makes; where one is gone, or `whole` raises UserError when it opens it, the step is done again. What failed
        leaves the steps before it usable.
        """
        from . import __version__

        key = short_hash({"inputs": inputs, "version": __version__})
        record = self.folder / "steps" / f"{name}.json"
        kept = _kept(record, key)
        if kept is not None and self._stand(artefacts, whole):
            log.info("step %s: kept", name)
            return kept["result"]
        for other in self.like:
            kept = _kept(other / "steps" / f"{name}.json", key)
            if kept is not None and self._taken(other, artefacts) and self._stand(artefacts, whole):
                log.info("step %s: as in %s", name, other)
                write_json(record, kept)
                return kept["result"]
        log.info("step %s", name)
        start = time.perf_counter()
        try:
            result = make()
        except UserError as err:
            raise UserError(f"step {name}: {err}") from err
        write_json(record, {"key": key, "seconds": time.perf_counter() - start, "result": result})
        return result

    def _stand(self, artefacts: tuple[str, ...], whole: Callable[[Path], Any] | None) -> bool:
        for path in (self.folder / a for a in artefacts):
            if not path.exists():
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
        end = time.monotonic() + 1
        with (self.folder / LOCK).open("a") as handle:
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
        handler = logging.FileHandler(self.folder / "log.txt")
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
            handler.close()


def _kept(record: Path, key: str) -> dict[str, Any] | None:
    """The record of a step, where it is of these inputs."""
    try:
        found = json.loads(record.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("key") == key and "result" in found else None


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
