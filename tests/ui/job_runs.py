"""Run folders of transfer jobs as a job leaves them, without a model: their small files alone."""

from __future__ import annotations

import json
from pathlib import Path

from ..metrics_example import metrics

JOB = 'name = "{name}"\n[donor]\nmodel = "bundled:donor"\n[recipient]\nmodel = "{recipient}"\n[[behaviours]]\nname = "b"\n'


def job_run(folder: Path, name: str = "first", done: bool = True, recipient: str = "bundled:recipient") -> Path:
    run = folder / name
    (run / "steps").mkdir(parents=True)
    (run / "job.toml").write_text(JOB.format(name=name, recipient=recipient))
    (run / "steps" / "profile-donor.json").write_text(json.dumps({"seconds": 1.5, "result": 0, "key": ""}))
    (run / "log.txt").write_text("2026-01-01 INFO step profile-donor\n")
    if done:
        (run / "metrics.json").write_text(json.dumps(metrics()))
    return run
