"""A job file as the command line changes it: other models, another place, another seed, or a quick look."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .bundled import located
from .errors import UserError
from .jobs import Job, ModelTable

QUICK: dict[str, dict[str, Any]] = {
    "profile": {"limit": 512},
    "training": {"steps": 60},
    "evaluate": {"limit": 48, "draws": 2, "rate_draws": 1, "dose": []},
}
"""What a quick run changes: it shows that everything runs, and its numbers mean little."""


def open_job(
    source: str | Path,
    *,
    donor: str | None = None,
    recipient: str | None = None,
    out: str | Path | None = None,
    seed: int | None = None,
    quick: bool = False,
) -> Job:
    """Reads a job file (a path or `bundled:NAME`), with what is given here in place of what it says.

    donor, recipient: another model in place of the job's; dtype and device stay, revision and blocks were the other's.
    With another donor, behaviours that have demonstrations train their adapter on it: theirs belongs to the old one.
    out: the folder in which the run folder is made. quick: see `QUICK`; the run is named NAME-quick.
    Raises UserError as `Job.load` does.
    """
    job = Job.load(located(source, "jobs", ".toml"))
    change: dict[str, Any] = {}
    for side, name in (("donor", donor), ("recipient", recipient)):
        if name is not None:
            was: ModelTable = getattr(job, side)
            change[side] = ModelTable(model=name, dtype=was.dtype, device=was.device)
    if donor is not None and donor != job.donor.model:
        change["behaviours"] = [
            b.model_copy(update={"adapter": None} if b.demonstrations is not None else {}) for b in job.behaviours
        ]
    if out is not None:
        change["out"] = str(out)
    if seed is not None:
        change["seed"] = seed
    if quick:
        change |= {table: getattr(job, table).model_copy(update=values) for table, values in QUICK.items()}
        change["name"] = f"{job.name}-quick"
    return job.model_copy(update=change)


def open_jobs(source: str | Path, recipients: Sequence[str], **options: Any) -> list[Job]:
    """The job for each of several recipients, named after them (NAME-RECIPIENT); of one or none, as `open_job` reads it.

    Run one after the other with the first's folder as `like`, they profile the donor and train its adapters once.
    Raises UserError where two recipients would have one name, and as `open_job` does.

    >>> [job.name for job in open_jobs("bundled:demo", ["bundled:recipient", "bundled:outsider"])]
    ['demo-bundled-recipient', 'demo-bundled-outsider']
    """
    if len(recipients) < 2:
        return [open_job(source, recipient=recipients[0] if recipients else None, **options)]
    jobs = []
    for recipient in recipients:
        job = open_job(source, recipient=recipient, **options)
        word = re.sub(r"[^A-Za-z0-9_.-]+", "-", recipient).strip("-.")[-60:]
        jobs.append(job.model_copy(update={"name": f"{job.name}-{word}"}))
    names = [job.name for job in jobs]
    if len(set(names)) < len(names):
        raise UserError(f"two of the recipients would share a run folder: {', '.join(names)}; give each once")
    return jobs
