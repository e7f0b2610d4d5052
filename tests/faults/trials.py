"""One fault at one event of one verb: what is then there, what was said, and how a rerun ends."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from . import injection
from .children import Ended, fork
from .injection import Event, Watch
from .subjects import OUT, SUBJECTS, Subject

FAULTS = ("kill", "interrupt", "full", "read-only", "memory", "no memory", "damage", "clock", "writers", "worker")
ENGINE = ("--engine", "ray", "--workers", 2, "--cpus-per-worker", 1)
"""of a verb whose worker is lost"""
ADVICE = ("make room", "choose another", "run again", "run the same", "smaller", "another device", "shorter", "wait for it",
          "give another", "exists already")  # fmt: skip


@dataclass(frozen=True)
class Whole:
    """An undisturbed run of a subject: where it lies, its events in order, and what it left."""

    subject: Subject
    place: Path
    events: tuple[Event, ...]

    @property
    def names(self) -> set[str]:
        return names(self.place)

    @property
    def steps(self) -> list[str]:
        return list(dict.fromkeys(event.step for event in self.events))


@dataclass(frozen=True)
class Case:
    """A fault of a subject at an event; of `damage`, in a file."""

    subject: str
    fault: str
    event: Event
    file: str = ""

    def __str__(self) -> str:
        return f"{self.subject}: {self.fault} at {self.file or self.event}"


@dataclass(frozen=True)
class Found:
    """How a case went: `wrong` is empty where all is as it should be; `said` is the line that the user saw."""

    case: Case
    wrong: tuple[str, ...]
    said: str
    code: int
    kept: int = 0
    """finished steps that the rerun did not do again"""


def names(place: Path) -> set[str]:
    return {path.relative_to(place).as_posix() for path in place.rglob("*")}


def undisturbed(home: Path, subject: Subject, *, engine: bool) -> Whole:
    """Runs a subject with nothing done to it, and notes its events; on the engine too, for when it spreads its work."""
    whole = Whole(subject, home / "whole" / subject.name, tuple(_events(home, subject.name, subject, ())))
    if not (engine and subject.engine):
        return whole
    spread = [event for event in _events(home, f"{subject.name} by ray", subject, ENGINE) if event.kind == "spread"]
    return replace(whole, events=(*whole.events, *spread))


def _events(home: Path, name: str, subject: Subject, more: tuple[Any, ...]) -> list[Event]:
    place = home / "whole" / name
    place.mkdir(parents=True)
    noted = home / "whole" / f"{name}.jsonl"

    def watch() -> None:
        stream = noted.open("a")
        Watch(place, lambda event: (stream.write(json.dumps(event) + "\n"), stream.flush())[0]).install()  # type: ignore[arg-type, func-returns-value]

    ended = fork([*subject.line(home, place), *more], watch)
    if ended.code:
        raise RuntimeError(f"{name}: {ended.said}")
    return [Event(*json.loads(line)) for line in noted.read_text().splitlines()]


def cases(whole: Whole, most: int, dice: random.Random) -> Iterator[Case]:
    """The cases of a subject: every fault at `most` events of each step; the first and the last first."""
    for step in whole.steps:
        mine = [event for event in whole.events if event.step == step and event.kind != "spread"]
        passes = [event for event in mine if event.kind == "forward"]
        spread = [event for event in whole.events if event.step == step and event.kind == "spread"]
        for fault in FAULTS:
            if fault == "damage" or (fault == "writers" and not whole.subject.locks):
                continue
            among = passes if "memory" in fault else [e for e in mine if e.kind != "forward"] or mine
            among = spread if fault == "worker" else among
            one = fault in ("no memory", "clock", "writers")
            for event in _some(among, 1 if one else most, dice):
                yield Case(whole.subject.name, fault, event)
    if is_run(whole.place / OUT):
        files = sorted(p for p in (whole.place / OUT).rglob("*") if p.is_file() and p.stat().st_size)
        for file in _some(files, most * len(whole.steps), dice):
            name = file.relative_to(whole.place).as_posix()
            yield Case(whole.subject.name, "damage", Event(_maker(whole, name), "file", 0), name)


def _maker(whole: Whole, name: str) -> str:
    """The step that made a file, as far as its record says."""
    inside = name.removeprefix(f"{OUT}/")
    for record in (whole.place / OUT / "steps").glob("*.json"):
        files = json.loads(record.read_text())["files"]
        folders = {file.rpartition("/")[0] for file in files if file.endswith("/manifest.json")}
        if inside == f"steps/{record.name}" or inside in files or any(inside.startswith(f"{f}/") for f in folders):
            return record.stem
    return "start"


def _some(listed: list[Any], most: int, dice: random.Random) -> list[Any]:
    if len(listed) <= most:
        return listed
    ends = [listed[0], listed[-1]][: most if most < 3 else 2]
    if most < 3:  # of a sample, any
        return dice.sample(listed, most)
    rest = dice.sample(listed[1:-1], most - len(ends))
    return [one for one in listed if one in ends or one in rest]


def is_run(folder: Path) -> bool:
    """Whether it is a folder of steps, which a rerun goes on with."""
    return (folder / "steps").is_dir()


def tried(home: Path, whole: Whole, case: Case) -> Found:
    """Injects the fault, looks at what is there and what was said, runs again, and compares."""
    place = home / "tried"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    line, wrong = whole.subject.line(home, place), list[str]()
    if case.fault == "damage":
        shutil.copytree(whole.place, place, dirs_exist_ok=True, symlinks=True)
        _flip(place / case.file)
        ended = Ended(0, "")
    else:
        ended = fork([*line, *(ENGINE if case.fault == "worker" else ())], partial(_inject, case, place, line))
        wrong += list(_said(case, ended, whole))
    before = _stamps(place / OUT)
    wrong += list(_opens(place))
    if case.fault == "clock":
        with injection.future(place):
            pass
        before = _stamps(place / OUT)
    again = fork(line)
    if again.code and not ("exists already" in again.last and not is_run(place / OUT)):
        wrong.append(f"the rerun ended with {again.code}: {again.last}")
    kept = sum(after == before.get(name) for name, after in _stamps(place / OUT).items())
    redone = {name for name in before if _stamps(place / OUT).get(name) != before[name]}
    if redone and not (case.fault == "damage" and redone <= _follow(whole, case)):
        wrong.append(f"finished steps were done again: {', '.join(sorted(redone))}")
    if case.fault == "damage" and case.event.step != "start" and case.event.step not in redone:
        wrong.append("the damage was not noticed")
    wrong += _unlike(whole, place, loose=case.fault == "memory")
    return Found(case, tuple(wrong), ended.last, ended.code, kept)


def _inject(case: Case, place: Path, line: list[Any]) -> None:
    event = case.event
    acts: dict[str, Callable[[], Callable[[Event], None]]] = {
        "kill": lambda: injection.at(event, injection.kill),
        "interrupt": lambda: injection.at(event, injection.interrupt),
        "full": lambda: injection.full(event),
        "read-only": lambda: injection.read_only(event),
        "memory": lambda: injection.out_of_memory(event, always=False),
        "no memory": lambda: injection.out_of_memory(event, always=True),
        "clock": lambda: injection.at(event, injection.clock_backwards),
        "writers": lambda: injection.at(event, partial(_second, line, event.step == "start")),
        "worker": lambda: injection.at(event, injection.lose_a_worker),
    }
    if case.fault in ("clock", "writers"):
        _shorten_waits()
    Watch(place, acts[case.fault]()).install()


def _shorten_waits() -> None:
    from workbench import runs
    from workbench.store import locks

    runs.WAIT = locks.WAIT = 0.05


def _second(line: list[Any], early: bool) -> None:
    """A second writer in the midst of the first: it must be turned away in one line. early: the first may not have begun,
    and then finds all done."""
    ended = fork(line)
    if early and ended.code == 0:
        return
    refused = any(words in ended.last for words in ("wait for it", "exists already"))
    if ended.code != 2 or not ended.last.startswith("error: ") or not refused:
        raise AssertionError(f"the second writer ended with {ended.code}: {ended.last}")


def _said(case: Case, ended: Ended, whole: Whole) -> Iterator[str]:
    """What is wrong with how the command ended."""
    said = [line for line in ended.lines if not line.startswith(("info", "warning"))]
    if "Traceback" in ended.said or "internal error" in ended.said or "escaped:" in ended.said or "hung:" in ended.said:
        yield f"not told in one line: {' | '.join(said)[-400:]}"
    if case.fault == "kill" and ended.code != -9:
        yield f"it was not killed: {ended.code}"
    early = case.fault == "writers" and case.event.step == "start" and "exists already" in ended.last
    if case.fault in ("clock", "writers", "worker") and ended.code and not early:  # early: the second made it all
        yield f"it ended with {ended.code}: {ended.last}"
    if case.fault == "worker" and "a worker was lost with piece" not in ended.said:
        yield "that a worker was lost is not told"
    if case.fault == "interrupt" and ended.code not in (0, 130):
        yield f"it ended with {ended.code}: {ended.last}"
    if ended.code == 130 and not (ended.last.startswith("stopped") and "again" in ended.last):
        yield f"what to do after a stop is not told: {ended.last}"
    if ended.code in (1, 2):
        if not ended.last.startswith("error: "):
            yield f"no error line: {ended.last}"
        elif not any(words in ended.last for words in ADVICE):
            yield f"what to do is not told: {ended.last}"
        if sum(line.startswith("error: ") for line in ended.lines) != 1:
            yield "more than one error line"


def _opens(place: Path) -> Iterator[str]:
    """What is wrong with a folder in which something was stopped: it must open."""
    from workbench.catalogue import catalogue
    from workbench.run_progress import run_progress

    try:
        entries = catalogue(place).entries
        damaged = [f"{e.name} ({e.note})" for e in entries if e.state == "damaged" and e.kind != "store"]
        if damaged and not (place / OUT / "steps").exists():
            yield f"damaged: {', '.join(damaged)}"
        if (place / OUT).is_dir():
            run_progress(place / OUT)
    except Exception as err:  # whatever it is, it is what is looked for
        yield f"the folder does not open: {type(err).__name__}: {err}"


def _stamps(folder: Path) -> dict[str, int]:
    """When each finished step was recorded."""
    found = {}
    for file in (folder / "steps").glob("*.json"):
        found[file.stem] = file.stat().st_mtime_ns
    return found


def _follow(whole: Whole, case: Case) -> set[str]:
    """The steps that may be done again after damage: the one whose file it is, and those after it."""
    steps = [step for step in whole.steps if not step.startswith("after ")]
    first = steps.index(case.event.step) if case.event.step in steps else len(steps)
    return set(steps[first:])


def _unlike(whole: Whole, place: Path, *, loose: bool) -> list[str]:
    """What of the rerun is not as in the undisturbed run. loose: of batches cut in halves, but for rounding."""
    from workbench.run_equality import equality_of

    wrong = []
    left, lost = names(place) - whole.names, whole.names - names(place)
    if left:
        wrong.append(f"left behind: {', '.join(sorted(left))}")
    if lost:
        wrong.append(f"not there: {', '.join(sorted(lost))}")
    for file in (path for path in whole.place.iterdir() if path.is_file() and path.name not in lost):
        if (place / file.name).read_bytes() != file.read_bytes():
            wrong.append(f"{file.name} differs")
    if not (place / OUT).is_dir():
        return wrong
    found = equality_of(whole.place / OUT, place / OUT)
    differ = [d for d in found.differences if not (loose and _close(d, whole.place / OUT, place / OUT))]
    if differ:
        shown = [f"{d.file} {d.name}".strip() for d in differ[:6]]
        wrong.append(f"{len(differ)} of {found.figures + found.files} differ: {', '.join(shown)}")
    return wrong


def _close(one: Any, whole: Path, again: Path) -> bool:
    """Whether a difference is one of rounding, or follows from it; answers must be the same."""
    if one.relative is None:
        return not one.file.startswith("answers/")
    if one.file.endswith(".safetensors"):
        return _close_tensors(load_file(whole / one.file), load_file(again / one.file))
    return one.relative < 1e-3 or (not isinstance(one.a, str) and abs(one.a - one.b) < 1e-4)


def _close_tensors(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Tensor by tensor; sums about a mean, which are rounding and nothing else, beside the largest tensor of the file."""
    if {name: x.shape for name, x in a.items()} != {name: x.shape for name, x in b.items()}:
        return False
    sizes = {name: float(x.abs().max()) for name, x in a.items() if x.numel()}
    apart = {name: float((a[name].double() - b[name].double()).abs().max()) for name in sizes}
    return all(
        gap <= 1e-3 * sizes[name] or (name.startswith("sum.") and gap < 1e-5 * max(sizes.values()))
        for name, gap in apart.items()
    )


def _flip(file: Path) -> None:
    """Another bit in the middle of a file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.unlink()  # it may be a link to a file of another run
    file.write_bytes(bytes(data))


def every(home: Path, chosen: list[str], most: int, seed: int, *, engine: bool) -> Iterator[tuple[Whole, list[Case]]]:
    """Each subject undisturbed, with the cases to try on it. engine: with the worker that is lost among them."""
    for name in chosen:
        subject = SUBJECTS[name]
        whole = undisturbed(home, subject, engine=engine)
        yield whole, list(cases(whole, most, random.Random(f"{seed} {name}")))


__all__ = ["FAULTS", "Case", "Found", "every", "replace", "tried"]
