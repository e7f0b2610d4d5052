"""A profile by one process and by Ray with one and two workers: time, the overhead of a piece, and whether the bytes agree."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from workbench.engines import Engine, open_engine
from workbench.models import load
from workbench.profile import plan as plans
from workbench.profile import profile_model
from workbench.prompts import PromptSet

EMPTY = 200
"""pieces of no work that the overhead is taken from"""


def nothing(model: None, piece: int) -> int:
    """A task that does nothing."""
    return piece


def bench(folder: Path, repeats: int = 3, block_rows: int = 4096, limit: int | None = None) -> dict[str, Any]:
    """Seconds of a profile of the bundled recipient (all tokens, float32), medians of `repeats` in turns.

    The workers have loaded their replicas before; what that takes is told apart. block_rows: of a piece.
    """
    prompts, model = PromptSet.load("bundled:profile", limit=limit), load("bundled:recipient")
    before, plans.BLOCK_ROWS = plans.BLOCK_ROWS, block_rows
    times: dict[str, list[float]] = {"local": [], "ray, 1 worker": [], "ray, 2 workers": []}
    found: dict[str, str] = {}
    try:
        with open_engine("ray", workers=min(2, os.cpu_count() or 1)) as engine:
            start = time.perf_counter()
            _profile(folder / "first", model, prompts, engine)
            ready = time.perf_counter() - start
            most = engine.workers
            for turn in range(repeats):
                for name, arm in (("local", None), ("ray, 1 worker", 1), ("ray, 2 workers", most)):
                    out = folder / f"{name}-{turn}"
                    engine.workers = arm or most
                    times[name].append(
                        _timed(lambda out=out, arm=arm: _profile(out, model, prompts, engine if arm else None))
                    )
                    found[f"{name}-{turn}"] = _digest(out)
            start = time.perf_counter()
            assert sum(result for _, result in engine.spread(None, f"{__name__}:nothing", range(EMPTY))) >= 0
            overhead = (time.perf_counter() - start) / EMPTY
        with_rows = len(list((folder / "first" / "shards").iterdir()))
    finally:
        plans.BLOCK_ROWS = before
    seconds = {name: median(values) for name, values in times.items()}
    return {"seconds": seconds, "spread": {name: max(v) - min(v) for name, v in times.items()}, "repeats": repeats,
            "ratio": {name: value / seconds["local"] for name, value in seconds.items()}, "pieces": with_rows,
            "overhead_s": overhead, "ready_s": ready, "workers": most, "cores": os.cpu_count(),
            "equal": len(set(found.values())) == 1, "compared": len(found)}  # fmt: skip


def _profile(out: Path, model: Any, prompts: PromptSet, engine: Engine | None) -> None:
    profile_model(model, prompts, out, tokens="all", engine=engine)


def _timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()
