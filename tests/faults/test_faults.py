"""Every fault at every step of a job, a few of each: earlier steps stay usable, the message says what to do, and a rerun
ends with equal results. All of them: `make faults`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from workbench.run_progress import EACH, SHARED

from . import trials
from .__main__ import covering, table
from .children import Ended
from .injection import Event
from .subjects import OUT, SUBJECTS
from .trials import FAULTS, Case, Whole

WITHOUT_A_MODEL = {"convert", "similarity", "probe", "paste", "adapters export", "grade", "stores merge", "stores export",
                   "stores fetch"}  # fmt: skip


def injected(*given: str) -> dict[str, Any]:
    """What the matrix, or a sample of it, finds in a process of its own, which forks."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORKBENCH_PROGRESS": "0",
                   "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}  # fmt: skip
    line = [sys.executable, "-m", "tests.faults", *given, "--json"]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def check(found: dict[str, Any], subject: str, faults: set[str]) -> None:
    assert {one["case"]: one["wrong"] for one in found["found"] if one["wrong"]} == {}
    assert {one["fault"] for one in found["found"]} == faults
    assert {one["step"] for one in found["found"]} == set(found["steps"][subject])


def test_a_sample_of_faults_at_every_step_of_a_job():
    here = set(FAULTS) - {"worker"}  # a lost worker is tried in tests/engines, where Ray is started once
    found = injected("run", "--sample", "8", "--only", ",".join(sorted(here)))
    check(found, "run", here)
    assert set(found["steps"]["run"]) == {"start", *SHARED, *(f"{step}-counting" for step in EACH)}
    assert sum(one["kept"] for one in found["found"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("subject", sorted(set(SUBJECTS) - {"run"}))
def test_a_sample_of_faults_of_every_other_verb_that_writes(subject):
    found = injected(subject, "--sample", "6")
    of_steps = len(found["steps"][subject]) > 1
    without = set() if of_steps else {"damage"}
    without |= set() if SUBJECTS[subject].locks else {"writers"}
    without |= set() if SUBJECTS[subject].engine else {"worker"}
    without |= {"memory", "no memory"} if subject in WITHOUT_A_MODEL else set()
    check(found, subject, set(FAULTS) - without)


def test_every_verb_that_writes_a_run_is_tried():
    from workbench.catalogue import RUN_KINDS

    assert set(RUN_KINDS.values()) <= set(SUBJECTS)


def case(fault: str, kind: str = "open") -> Case:
    return Case("run", fault, Event("start", kind, 0))


@pytest.mark.parametrize(
    ("fault", "ended", "words"),
    [
        ("full", Ended(1, "Traceback (most recent call last):\nOSError: no"), "not told in one line"),
        ("full", Ended(1, "internal error: OSError: no; run again with --debug"), "not told in one line"),
        ("full", Ended(2, "error: no space"), "what to do is not told"),
        ("full", Ended(2, "error: make room\nerror: make room"), "more than one error line"),
        ("full", Ended(2, ""), "no error line"),
        ("kill", Ended(0, ""), "it was not killed"),
        ("interrupt", Ended(130, "stopped"), "what to do after a stop is not told"),
        ("interrupt", Ended(1, "error: make room"), "it ended with 1"),
        ("clock", Ended(2, "error: make room"), "it ended with 2"),
    ],
)
def test_the_trial_finds_what_is_told_badly(fault, ended, words):
    whole = Whole(SUBJECTS["run"], Path("x"), ())
    assert any(words in said for said in trials._said(case(fault), ended, whole))
    good = {
        "kill": Ended(-9, ""),
        "interrupt": Ended(130, "stopped; run the same command again"),
        "clock": Ended(0, ""),
    }
    assert not list(trials._said(case(fault), good.get(fault, Ended(2, "error: full; make room")), whole))


def test_the_trial_finds_what_is_left_lost_and_unlike(tmp_path):
    for name in ("whole", "tried"):
        (tmp_path / name / OUT).mkdir(parents=True)
        (tmp_path / name / OUT / "a").write_text("a")
    whole = Whole(SUBJECTS["run"], tmp_path / "whole", ())
    assert trials._unlike(whole, tmp_path / "tried", loose=False) == []
    (tmp_path / "tried" / f".{OUT}.partial-abcdefgh").write_text("")
    (tmp_path / "tried" / OUT / "a").write_text("b")
    (tmp_path / "whole" / OUT / "b").write_text("b")
    left, lost, unlike = trials._unlike(whole, tmp_path / "tried", loose=False)
    assert left == f"left behind: .{OUT}.partial-abcdefgh"
    assert lost == f"not there: {OUT}/b"
    assert "2 of 2 differ: a, b" in unlike


def test_a_sample_covers_every_fault_and_every_step():
    steps = ["start", "after start", "fit", "after fit", "paste"]
    cases = [Case("run", fault, Event(step, "open", n)) for fault in FAULTS for step in steps for n in range(3)]
    chosen = covering(cases, 1)
    assert {c.fault for c in chosen} == set(FAULTS)
    assert {c.event.place for c in chosen} == {"start", "fit", "paste"}
    assert len(chosen) < 2 * len(FAULTS)
    assert len(set(covering(cases, 40))) == 40


def test_the_table_counts_cases_and_what_is_wrong():
    found = [{"subject": "run", "fault": "kill", "wrong": w} for w in ([], ["left behind"])]
    assert table(found).splitlines()[1].split()[:2] == ["run", "2/1"]
