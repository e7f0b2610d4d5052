"""A run of probes as a folder: what was asked, every figure with its interval, the probes themselves, and a report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from workbench.errors import UserError
from workbench.runs import environment
from workbench.store import Store

from .directions import DirectionSet, find_directions
from .erasers import Erasure, erase_label
from .linear import MOST_ROWS, train_probes
from .probe_curve import ProbeCurve
from .probe_report import render_probe
from .run_folder import json_values, run_folder

FORMAT = "workbench.probe_run"
MARKER = "probe.toml"


@dataclass(frozen=True)
class ProbeJob:
    """What `run_probe` is asked; see `linear.train_probes` for every field."""

    store: str
    label: str
    kind: str = "logistic"
    positions: tuple[str, ...] = ("all",)
    sites: tuple[str, ...] = ()
    """empty: all of the store"""
    classes: tuple[str, ...] = ()
    quantity: bool = False
    groups: str = ""
    penalty: float | None = None
    holdout: float = 0.25
    max_rows: int = MOST_ROWS
    seed: int = 0
    controls: bool = True
    towards: str = ""
    """a class: directions to it by every method, and an eraser of the label at the best site, are found too"""
    device: str = ""


@dataclass(frozen=True, eq=False)
class ProbeRun:
    """What a run found; `folder` is where it lies, None where nothing was written."""

    curve: ProbeCurve
    directions: DirectionSet | None
    erasure: Erasure | None
    metrics: Mapping[str, Any]
    folder: Path | None


def run_probe(job: ProbeJob, out: str | Path | None = None, *, overwrite: bool = False) -> ProbeRun:
    """Trains the probes of a job; with `out`, writes them there as a run folder.

    The folder holds probe.toml (the job), metrics.json, probes.parquet (`ProbeCurve.frame`), probes/POSITIONS/SITE (each a
    saved `Probe`), with `towards` directions.parquet and eraser/, and report.html. Raises UserError as `train_probes` does, and
    where `out` exists, unless `overwrite` and it is such a run.
    """
    store = Store.open(job.store)
    shared: dict[str, Any] = {"holdout": job.holdout, "max_rows": job.max_rows, "seed": job.seed}
    curve = train_probes(
        store, job.label, sites=job.sites or None, positions=job.positions, kind=job.kind, penalty=job.penalty,
        classes=job.classes or None, quantity=job.quantity or None, groups=job.groups or None,
        controls=("control", "shuffled") if job.controls else (), words=job.controls, device=job.device or None, **shared,
    )  # fmt: skip
    directions, erasure = None, None
    if job.towards:
        if not curve.classes:
            raise UserError(f"label {job.label!r} is a quantity, which has no class to go towards; leave --towards out")
        best = curve.best
        directions = find_directions(
            store, job.label, job.towards, sites=job.sites or None, positions=best.positions, **shared
        )
        erasure = erase_label(store, job.label, best.site, positions=best.positions, classes=job.classes or None,
                              groups=job.groups or None, **shared)  # fmt: skip
    metrics = _metrics(job, curve, directions, erasure)
    if out is not None:
        _write(Path(out), job, curve, directions, erasure, metrics, overwrite)
    return ProbeRun(curve, directions, erasure, metrics, None if out is None else Path(out))


def _metrics(
    job: ProbeJob, curve: ProbeCurve, directions: DirectionSet | None, erasure: Erasure | None
) -> dict[str, Any]:
    best = curve.best
    found: dict[str, Any] = {
        "format": FORMAT, "version": 1, "job": asdict(job), "label": curve.label, "kind": curve.kind,
        "classes": list(curve.classes), "score": curve.score_name, "control_of": curve.control_of,
        "best": {"site": str(best.site), "positions": best.positions}, "lines": [line.as_dict() for line in curve.lines],
        "words": {name: score.line() for name, score in curve.words.items()}, "warnings": list(curve.notes),
        "settings": dict(curve.settings), "environment": environment(),
        "calibration": {"ece": best.score.ece, "reliability": [list(b) for b in best.score.reliability],
                        "confusion": best.score.confusion.tolist()},
    }  # fmt: skip
    if directions is not None:
        found["directions"] = directions.frame().to_dict("records")
    if erasure is not None:
        found["erasure"] = {"site": str(erasure.site), "rank": erasure.eraser.rank, "before": erasure.before.line(),
                            "after": erasure.after.line(), "chance": erasure.after.chance, "changed": erasure.changed,
                            "covariance": erasure.covariance}  # fmt: skip
    return dict(json_values(found))


def _write(
    out: Path, job: ProbeJob, curve: ProbeCurve, directions: DirectionSet | None, erasure: Erasure | None,
    metrics: Mapping[str, Any], overwrite: bool,
) -> None:  # fmt: skip
    lines = curve.frame()
    tables = {"probes": lines} | ({} if directions is None else {"directions": directions.frame()})
    report = render_probe(metrics, lines, out.name or "probes")
    with run_folder(out, MARKER, job, metrics, tables, report, overwrite=overwrite) as folder:
        for line in curve.lines:
            line.probe.save(folder / "probes" / _plain(line.positions) / str(line.site))
        for one in directions or ():
            one.adapter().save(folder / "adapters" / f"{one.method}.{one.site}")
        if erasure is not None:
            erasure.adapter().save(folder / "adapters" / f"eraser.{erasure.site}")


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)
