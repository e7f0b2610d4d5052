"""`python -m tests.fuzz [TARGET ...] --runs N | --minutes M`: tries every parser in processes of their own, and counts."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from .runner import FOUND, HERE, State, has_atheris, write_down
from .target import ROOM
from .targets import TARGETS

PATIENCE = 20.0
"""seconds that an input may keep a process, in which the alarm of `Target` did not reach it"""
START = 240.0
"""seconds for its imports"""
RUNS = 1_100_000
"""of `make fuzz`, in all"""


@dataclass
class Job:
    """One target's process, started again where an input ends it."""

    name: str
    runs: int
    seconds: float
    seed: int
    plain: bool
    file: Path
    state: State = field(init=False)
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0
    spent: float = 0.0
    _last: tuple[int, float] = (0, 0.0)
    _first: int = 0

    def __post_init__(self) -> None:
        self.state = State(self.file)

    @property
    def inputs(self) -> int:
        return self.state.read()[0]

    def start(self) -> None:
        left, seconds = self.runs - self.inputs, self.seconds - self.spent
        line = [
            sys.executable,
            "-m",
            "tests.fuzz.runner",
            self.name,
            "--runs",
            str(max(1, left)),
            "--seconds",
            str(seconds),
            "--seed",
            str(self.seed + self.inputs),
            "--state",
            str(self.file),
            *(["--plain"] if self.plain else []),
        ]
        with open(self.file.with_suffix(".log"), "ab") as log:
            self.process = subprocess.Popen(
                line,
                cwd=HERE.parents[1],
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, ROOM: str(self.file.parent)},
            )
        self.began, self._last, self._first = time.monotonic(), (self.inputs, time.monotonic()), self.inputs

    def done(self) -> bool:
        """Looks after the process; whether all its inputs were tried."""
        assert self.process is not None
        code, (inputs, _, _, warm), now = self.process.poll(), self.state.read(), time.monotonic()
        if inputs != self._last[0]:
            self._last = (inputs, now)
        if code is None and now - self._last[1] < (PATIENCE if warm and inputs != self._first else START):
            return False
        self.spent += now - self.began
        if code is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            if (
                self.state.at_hand
            ):  # otherwise it hung between two inputs, which is no parser's doing: it is started again
                self._note(f"hang of more than {PATIENCE:.0f} s")
        elif code != 0 and self.state.at_hand:
            self._note(f"the process ended with {code}")
        elif code != 0:
            tail = self.file.with_suffix(".log").read_text(errors="replace")[-2000:]
            write_down(self.name, f"exit {code}", b"", tail)
            return True
        if inputs >= self.runs or self.spent >= self.seconds - 1 or code == 0:
            return True
        self.start()
        return False

    def _note(self, what: str) -> None:
        tail = self.file.with_suffix(".log").read_text(errors="replace")[-3000:]
        write_down(self.name, f"{what}: {self.state.at_hand[:64]!r}", self.state.at_hand, tail)


def fuzz(names: list[str], runs: int, minutes: float | None, seed: int, plain: bool, jobs: int) -> int:
    """Tries `runs` inputs in all, or as many as `minutes` allow, shared out by each target's rate; how many findings."""
    share = {name: TARGETS[name].rate / sum(TARGETS[n].rate for n in names) for name in names}
    before = {file.name for file in FOUND.glob("*.txt")}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as room:
        seconds = 1e9 if minutes is None else 60 * minutes * jobs / len(names)
        each = {name: (1 << 60) if minutes is not None else max(1, round(runs * share[name])) for name in names}
        waiting = [Job(name, each[name], seconds, seed, plain, Path(room) / name) for name in names]
        every, running = list(waiting), list[Job]()
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(waiting.pop(0))
                    running[-1].start()
                time.sleep(0.2)
                for job in [job for job in running if job.done()]:
                    running.remove(job)
                    print(_line(job, before), flush=True)
        finally:
            for job in running:
                if job.process is not None and job.process.poll() is None:
                    os.killpg(job.process.pid, signal.SIGKILL)
        total, spent = sum(job.inputs for job in every), sum(job.spent for job in every)
    found = sorted(file.name for file in FOUND.glob("*.txt") if file.name not in before)
    print(f"{'all':20} {total:>10,} inputs {total / max(spent, 1e-9):>8,.0f}/s {len(found):>4} findings")
    for name in found:
        print(f"  {FOUND.relative_to(HERE.parents[1]) / name}: {(FOUND / name).read_text().splitlines()[0]}")
    return len(found)


def _line(job: Job, before: set[str]) -> str:
    found = [f for f in FOUND.glob(f"{job.name}-??????????.txt") if f.name not in before]
    return (
        f"{job.name:20} {job.inputs:>10,} inputs {job.inputs / max(job.spent, 1e-9):>8,.0f}/s {len(found):>4} findings"
    )


def again(name: str, file: Path) -> int:
    """Tries one input, and says what it breaks."""
    TARGETS[name].warm()
    try:
        TARGETS[name](file.read_bytes())
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        TARGETS[name].close()
    print("nothing broke")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; all unless given")
    parser.add_argument("--runs", type=int, default=RUNS, help="inputs in all (%(default)s)")
    parser.add_argument("--minutes", type=float, help="in all, in place of --runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes at once (%(default)s)")
    parser.add_argument(
        "--plain", action="store_true", help="the seeded mutator alone, also where atheris is installed"
    )
    parser.add_argument("--input", type=Path, help="try this file alone, with one TARGET")
    given = parser.parse_args()
    unknown = [name for name in given.targets if name not in TARGETS]
    if unknown or (given.input and len(given.targets) != 1):
        parser.error(
            f"unknown target {unknown[0]!r}; allowed: {', '.join(TARGETS)}" if unknown else "--input is for one TARGET"
        )
    if given.input:
        return again(given.targets[0], given.input)
    plain = given.plain or not has_atheris()
    return 1 if fuzz(given.targets or list(TARGETS), given.runs, given.minutes, given.seed, plain, given.jobs) else 0


if __name__ == "__main__":
    sys.exit(main())
