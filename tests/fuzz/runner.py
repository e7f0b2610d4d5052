"""One target in one process: inputs one after the other, what they break written down; by atheris where it is installed."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import mmap
import os
import random
import resource
import struct
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .target import Target

HERE = Path(__file__).parent
FOUND = HERE / "found"
CORPUS = HERE.parents[1] / "build" / "fuzz"
"""inputs that reached something new, by target: a later run goes on from them"""
STATE = struct.Struct("<QQQQ")  # inputs, findings, the one that is being tried: its length; whether it is warm
ROOM = STATE.size + (1 << 17)
ADDRESS_SPACE = 6 << 30
"""bytes beyond what the imports took: a guard for the machine; the limit on memory is that of `Target`"""


class State:
    """What the parent looks at, in a file in memory: how many inputs were tried, and the one at hand."""

    def __init__(self, file: Path) -> None:
        with open(file, "a+b") as stream:
            stream.truncate(ROOM)
            self._map = mmap.mmap(stream.fileno(), ROOM)
        self.inputs, self.findings = self.read()[:2]

    def read(self) -> tuple[int, int, int, int]:
        found: tuple[int, int, int, int] = STATE.unpack_from(self._map)
        return found

    def begin(self, data: bytes) -> None:
        self._map[STATE.size : STATE.size + len(data)] = data
        self.inputs += 1
        STATE.pack_into(self._map, 0, self.inputs, self.findings, len(data), 1)

    def end(self) -> None:
        STATE.pack_into(self._map, 0, self.inputs, self.findings, 0, 1)

    @property
    def at_hand(self) -> bytes:
        """The input that was begun and not ended; b"" where none is."""
        return self._map[STATE.size : STATE.size + self.read()[2]]


def signature(err: BaseException) -> str:
    """What two inputs that break the same thing have in common: the exception, and the last line of ours that it came by."""
    ours = [
        f for f in traceback.extract_tb(err.__traceback__) if "/workbench/" in f.filename or "/probes/" in f.filename
    ]
    where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
    return f"{type(err).__name__} {where}"


def tried(target: Target, data: bytes, state: State | None = None) -> str | None:
    """Tries an input; the signature of what it broke, written to `FOUND`, or None."""
    if state:
        state.begin(data)
    try:
        target(data)
        return None
    except KeyboardInterrupt:
        raise
    except BaseException as err:
        said = signature(err)
        if state:
            state.findings += 1
        write_down(target.name, said, data, "".join(traceback.format_exception(err))[-6000:])
        return said
    finally:
        if state:
            state.end()


def write_down(target: str, said: str, data: bytes, more: str) -> None:
    """An input and what it broke, in `FOUND`, once for each signature."""
    FOUND.mkdir(exist_ok=True)
    stem = FOUND / f"{target}-{hashlib.sha256(said.encode()).hexdigest()[:10]}"
    if not stem.with_suffix(".bin").exists():
        stem.with_suffix(".bin").write_bytes(data)
        again = f"python -m tests.fuzz {target} --input {stem.with_suffix('.bin').relative_to(HERE.parents[1])}"
        stem.with_suffix(".txt").write_text(f"{said}\nagain: {again}\n\n{more}\n", encoding="utf-8", errors="replace")


def seeded(target: Target, runs: int, seed: int, state: State | None = None, until: float | None = None) -> list[str]:
    """Tries so many inputs that follow from the seed alone; the signatures of what they broke."""
    from .mutation import mutate

    rng, seeds, broken = random.Random(seed), target.seeds(), list[str]()
    for number in range(runs):
        if until is not None and not number % 16 and time.monotonic() > until:
            break
        data = mutate(rng.choice(seeds), target.names, rng, seeds, target.repair)
        if (said := tried(target, data, state)) is not None:
            broken.append(said)
    return broken


def guided(target: Target, runs: int, seed: int, state: State, seconds: float) -> None:
    """The same by atheris, which keeps the inputs that reach lines of ours that none has reached; ends the process."""
    import atheris

    from .mutation import MOST, mutate

    corpus, seeds = CORPUS / target.name, target.seeds()
    corpus.mkdir(parents=True, exist_ok=True)
    for data in seeds:
        (corpus / f"seed-{hashlib.sha256(data).hexdigest()[:16]}").write_bytes(data)

    def change(data: bytes, most: int, number: int) -> bytes:
        return mutate(data, target.names, random.Random(number), seeds, target.repair)[:most]

    def one(data: bytes) -> None:
        tried(target, data, state)

    limits = [
        f"-runs={min(runs, (1 << 31) - 1)}",
        f"-seed={seed or 1}",
        "-timeout=60",
        "-rss_limit_mb=4096",
        f"-max_len={MOST}",
        "-verbosity=0",
        f"-max_total_time={max(1, int(seconds))}",
        f"-artifact_prefix={FOUND}/{target.name}-",
        str(corpus),
    ]
    FOUND.mkdir(exist_ok=True)
    atheris.Setup([sys.argv[0], *limits], one, custom_mutator=change)
    atheris.Fuzz()


def has_atheris() -> bool:
    return importlib.util.find_spec("atheris") is not None


def main() -> None:
    """`python -m tests.fuzz.runner TARGET --runs N --seconds S --seed K --state FILE [--plain]`: what `__main__` starts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("--plain", action="store_true")
    for name, kind in (("runs", int), ("seed", int), ("seconds", float), ("state", Path)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")  # zipfile's and torch's, of what the mutator makes
    state = State(given.state)
    target = _opened(given.target, plain=given.plain)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE, resource.RLIM_INFINITY))
    try:
        if given.plain:
            seeded(target, given.runs, given.seed, state, time.monotonic() + given.seconds)
        else:
            guided(target, given.runs, given.seed, state, given.seconds)
    finally:
        target.close()


def _opened(name: str, *, plain: bool) -> Target:
    """The target, with everything imported that it needs; our own modules so that atheris sees which lines they run."""
    if plain:
        found = _target(name)
    else:
        import atheris

        with atheris.instrument_imports(include=["workbench", "probes"]):
            found = _target(name)
    return found


def _target(name: str) -> Any:
    import logging

    from .targets import TARGETS

    logging.getLogger("workbench").setLevel(logging.CRITICAL)
    TARGETS[name].warm()
    return TARGETS[name]


if __name__ == "__main__":
    main()
