"""The same job in another process, folder, time zone, locale and year, with other hashes of strings, leaves the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from workbench.run_equality import equality_of

from .subjects import OUT, SUBJECTS, prepare

LATER = """
import time
real = time.time
time.time = lambda: real() + {shift}
from workbench.cli import main
main()
"""
PROCESSES: dict[str, dict[str, Any]] = {
    "here": {"PYTHONHASHSEED": "1", "TZ": "UTC", "LC_ALL": "C.UTF-8", "shift": 0},
    "elsewhere": {"PYTHONHASHSEED": "2", "TZ": "Pacific/Kiritimati", "LC_ALL": "C", "PYTHONUTF8": "0",
                  "PYTHONCOERCECLOCALE": "0", "shift": 400 * 86400},
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    prepare(home)
    return home


@pytest.mark.slow
@pytest.mark.parametrize("subject", ["run", "transport"])
def test_another_process_ends_with_the_same_bytes(home, tmp_path, subject):
    running = {}
    for name, told in PROCESSES.items():
        place = tmp_path / name / ("ein anderer Ordner é" if name == "here" else "a")
        place.mkdir(parents=True)
        code = LATER.format(shift=told["shift"])
        said = {key: value for key, value in told.items() if key != "shift"}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORKBENCH_PROGRESS": "0", **said,
                       "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}  # fmt: skip
        line = [sys.executable, "-c", code, *map(str, SUBJECTS[subject].line(home, place))]
        running[place] = subprocess.Popen(line, cwd=place, env=environment, stderr=subprocess.PIPE,
                                          stdout=subprocess.DEVNULL, text=True)  # fmt: skip
    for place, process in running.items():
        _, said = process.communicate()
        assert process.returncode == 0, f"{place}: {said}"
    found = equality_of(*(place / OUT for place in running))
    assert found.differences == ()
    assert found.figures > 50
