"""Jobs on an engine leave what they leave on one machine: every figure, and every artefact byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from workbench.engines import Engine
from workbench.jobs import run_job
from workbench.run_equality import equality_of
from workbench.runs import Run

from ..test_transfer import a_job, prompt_sets
from .stand_in import StandIn

QUICK = {"draws": 2, "rate_draws": 1, "dose": [0.5], "batch_size": 3, "max_new_tokens": 4}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("jobs")
    (home / "models").mkdir()
    return home


@pytest.fixture(scope="module")
def alone(home: Path) -> Run:
    """What one process leaves."""
    return run(home, "alone", None)


def run(home: Path, name: str, engine: Any) -> Run:
    sets = prompt_sets(home)
    job = a_job(
        home / "models", sets, home / name, evaluate=QUICK, behaviours=sets["tables"][:1], paste={"alphas": [0.1]}
    )
    return run_job(job, engine=engine)


def check(alone: Run, other: Run) -> None:
    found = equality_of(alone.folder, other.folder)
    assert found.equal, found.summary
    assert found.files > 5
    assert json.loads((other.folder / "environment.json").read_text())["engine"] == "ray"
    assert "engine" not in json.loads((alone.folder / "environment.json").read_text())


def test_a_job_leaves_the_same_with_other_replicas(home: Path, alone: Run):
    engine = StandIn()
    check(alone, run(home, "replicas", engine))
    assert set(engine.tasks) == {"write_piece", "run_piece"}


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_leaves_the_same_on_ray(
    home: Path, alone: Run, two_workers: Engine, monkeypatch: pytest.MonkeyPatch, workers: int
):
    monkeypatch.setattr(two_workers, "workers", workers)
    check(alone, run(home, f"ray-{workers}", two_workers))
