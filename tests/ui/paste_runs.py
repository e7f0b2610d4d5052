"""A finished transfer run of the bundled pair, with adapters that are quick to make and answers that were never given."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from workbench.adapters import Adapter, vector
from workbench.job_options import open_job
from workbench.jobs import Job
from workbench.models import load
from workbench.sites import Site

from ..metrics_example import cell, metrics

PROMPT = "tell me 2 minus 4 plus 0 plus 6 ?"


def paste_run(folder: Path, name: str = "first") -> Path:
    """One run with two behaviours; returns the folder that it lies in."""
    recipient = load("bundled:recipient", device="cpu")
    push = torch.randn(recipient.width, generator=torch.Generator().manual_seed(0))
    adapters = {
        "paste": replace(vector(Site(2), 0.5 * push) + vector(Site(3), 0.5 * push), base=recipient.fingerprint),
        "native": replace(vector(Site(3), -push), base=recipient.fingerprint),
        "donor": Adapter.load("bundled:reasoning"),
    }
    job = open_job("bundled:demo")
    job = job.model_copy(update={"name": name, "out": str(folder), "behaviours": job.behaviours[:2]})
    write_run(folder / name, job, adapters)
    return folder


def write_run(run: Path, job: Job, adapters: dict[str, Adapter], prompts: tuple[str, ...] = (PROMPT, "w")) -> None:
    (run / "answers").mkdir(parents=True)
    (run / "job.toml").write_text(job.text)
    found = metrics()
    behaviour = found["behaviours"]["reasoning"]
    behaviour["dose"] = [{"strength": s, "log_odds": cell(s)} for s in (0.0, 1.0, 2.0)]
    behaviour["forecast"]["chosen"] = {"strength": 1.5, "method": "ridge", "alpha": 0.1}
    found["behaviours"] = {table.name: behaviour for table in job.behaviours}
    (run / "metrics.json").write_text(json.dumps(found))
    for table in job.behaviours:
        of = "" if table.name == "reasoning" else f"{table.name} "
        lines = [
            {"id": str(i), "prompt": of + prompt, "base": f"kept base {i}", "paste": f"kept paste {i}", "native": "n",
             "donor_adapter": "d"} for i, prompt in enumerate(prompts)
        ]  # fmt: skip
        (run / "answers" / f"{table.name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for arm, adapter in adapters.items():
            adapter.save(run / "adapters" / table.name / arm)
