"""How far a run has come: which of its steps are kept, how many there are to be, and the last lines of its log."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .small_files import plain_file, read_json

SHARED = ("profile-donor", "profile-recipient")
EACH = ("donor", "forecast", "paste", "native", "evaluate")
"""the steps of a transfer job: once, and of each behaviour"""
LOG_BYTES = 16_384


@dataclass(frozen=True)
class Progress:
    """Steps of a run with the seconds each took, and those that are still to come where the job tells them."""

    done: Mapping[str, float]
    to_come: tuple[str, ...] | None
    """None where the job does not tell its steps: a transport's, or a damaged one"""
    log: tuple[str, ...]
    """the last lines of log.txt"""

    @property
    def steps(self) -> int | None:
        """How many there are, done and to come; None where it is not known."""
        return None if self.to_come is None else len(self.done) + len(self.to_come)

    @property
    def share(self) -> float | None:
        """Of the steps, those that are done; None where it is not known how many there will be."""
        return len(self.done) / self.steps if self.steps else None


def run_progress(run: str | Path, job: Mapping[str, Any] | None = None, lines: int = 20) -> Progress:
    """Of a run folder; `job` is its job file, read, for the steps that are to come."""
    folder = Path(run)
    done = {}
    for file in sorted((folder / "steps").glob("*.json"), key=_written):
        try:
            done[file.stem] = float(read_json(file)["seconds"])
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            continue  # being written, or damaged: it is not done
    every = (*SHARED, *(f"{step}-{name}" for name in _behaviours(job) for step in EACH)) if _behaviours(job) else None
    to_come = None if every is None else tuple(step for step in every if step not in done)
    return Progress(done, to_come, tuple(_last_lines(folder / "log.txt", lines)))


def _behaviours(job: Mapping[str, Any] | None) -> list[str]:
    """The names of a job's behaviours, as far as they can be read: the job file may be anybody's."""
    tables = (job or {}).get("behaviours")
    return [str(one.get("name", "")) for one in tables if isinstance(one, Mapping)] if isinstance(tables, list) else []


def _last_lines(file: Path, count: int) -> list[str]:
    try:
        with plain_file(file).open("rb") as handle:
            handle.seek(max(0, os.fstat(handle.fileno()).st_size - LOG_BYTES))
            return handle.read().decode(errors="replace").splitlines()[-count:]
    except (OSError, ValueError):
        return []


def _written(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:  # a step that is done anew is taken away first
        return 0.0
