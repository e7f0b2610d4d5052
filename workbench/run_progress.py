"""How far a run has come: which of its steps are kept, how many there are to be, and the last lines of its log."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARED = ("profile-donor", "profile-recipient")
EACH = ("donor", "forecast", "paste", "native", "evaluate")
"""the steps of a transfer job: once, and of each behaviour"""
LOG_BYTES = 16_384


@dataclass(frozen=True)
class Progress:
    """Steps of a run with the seconds each took, and those that are still to come where the job tells them."""

    done: Mapping[str, float]
    to_come: tuple[str, ...]
    log: tuple[str, ...]
    """the last lines of log.txt"""

    @property
    def share(self) -> float | None:
        """Of the steps, those that are done; None where it is not known how many there will be."""
        whole = len(self.done) + len(self.to_come)
        return len(self.done) / whole if self.to_come or whole else None


def run_progress(run: str | Path, job: Mapping[str, Any] | None = None, lines: int = 20) -> Progress:
    """Of a run folder; `job` is its job file, read, for the steps that are to come."""
    folder = Path(run)
    done = {}
    for file in sorted((folder / "steps").glob("*.json"), key=lambda f: f.stat().st_mtime):
        try:
            done[file.stem] = float(json.loads(file.read_text(encoding="utf-8"))["seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # being written, or damaged: it is not done
    names = [b.get("name", "") for b in (job or {}).get("behaviours", [])]
    every = (*SHARED, *(f"{step}-{name}" for name in names for step in EACH)) if names else ()
    return Progress(done, tuple(s for s in every if s not in done), tuple(_last_lines(folder / "log.txt", lines)))


def _last_lines(file: Path, count: int) -> list[str]:
    try:
        with file.open("rb") as handle:
            handle.seek(max(0, os.fstat(handle.fileno()).st_size - LOG_BYTES))
            return handle.read().decode(errors="replace").splitlines()[-count:]
    except OSError:
        return []
