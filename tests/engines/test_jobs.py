"""Jobs on an engine leave what they leave on one machine, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from workbench.engines import Engine
from workbench.jobs import run_job
from workbench.runs import Run

from ..test_transfer import TIMED, a_job, numbers, prompt_sets

QUICK = {"draws": 2, "rate_draws": 1, "dose": [0.5], "batch_size": 3, "max_new_tokens": 4}
TOLD = ("log.txt", "report.html", "environment.json", "metrics.json", "lock")
"""files of a run that say when and where it was"""


def artefacts(run: Run) -> dict[str, Any]:
    """Every file of a run by its name: its bytes, and of JSON what is no time."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in run.folder.rglob("*") if p.is_file() and p.name not in TOLD):
        name = str(path.relative_to(run.folder))
        found[name] = timeless(json.loads(path.read_text())) if path.parent.name == "steps" else path.read_bytes()
    return found


def timeless(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: timeless(v) for k, v in tree.items() if k not in TIMED and "seconds" not in k}
    return [timeless(v) for v in tree] if isinstance(tree, list) else tree


@pytest.mark.xdist_group("ray")
def test_a_job_leaves_the_same_on_ray(two_workers: Engine, tmp_path: Path):
    sets = prompt_sets(tmp_path)
    (tmp_path / "models").mkdir()
    runs = []
    for engine in (None, two_workers):
        job = a_job(tmp_path / "models", sets, tmp_path / (engine.name if engine else "local"), evaluate=QUICK,
                    behaviours=sets["tables"][:1], paste={"alphas": [0.1]})  # fmt: skip
        runs.append(run_job(job, engine=engine))
    local, spread = runs
    assert numbers(spread) == numbers(local)
    found, wanted = artefacts(spread), artefacts(local)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name] and name != "job.toml"] == []
    assert json.loads((spread.folder / "environment.json").read_text())["engine"] == "ray"
    assert "engine" not in json.loads((local.folder / "environment.json").read_text())
