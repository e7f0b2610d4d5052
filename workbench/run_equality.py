"""Whether two run folders hold the same: every figure, and every artefact byte for byte, timings apart."""

from __future__ import annotations

import filecmp
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .runs import LOCK, LOG
from .small_files import read_json, read_toml
from .timings import is_timing

if TYPE_CHECKING:
    import pandas as pd

MOST_BYTES = 1 << 28  # of a JSON file that is read figure by figure; a larger one is compared byte for byte
MISSING = "–"
UNCOMPARED = (LOG, LOCK, "report.html")
"""of a run: they tell when things happened, or are made of metrics.json, timings and all"""
CIRCUMSTANCES = (("environment",), ("environment.json",), ("job.toml", "out"), ("job.toml", "name"), ("job", "name"))
"""where a run was made and what it was called; in a metrics.json, or behind the name of another file"""


@dataclass(frozen=True)
class Difference:
    """One figure, or one file, that is not the same in two runs."""

    file: str
    name: str
    """of the figure: its keys with dots; empty for a whole file"""
    a: Any
    b: Any
    relative: float | None = None
    """of two numbers, or of the tensors of two files: the largest difference over the largest size"""


@dataclass(frozen=True)
class RunEquality:
    """What is equal, what differs, and what was set apart. `equal` says whether nothing differs."""

    a: Path
    b: Path
    figures: int
    """that were compared"""
    files: int
    """that were compared byte for byte"""
    differences: tuple[Difference, ...]
    timings: tuple[Difference, ...]
    """every timing of both, by file and name: never a difference"""
    circumstances: tuple[Difference, ...]
    """versions, threads, device and date, and the names of the runs, where they are not the same"""

    @property
    def equal(self) -> bool:
        return not self.differences

    @property
    def timing_names(self) -> tuple[str, ...]:
        """The names of the timings, each once."""
        return tuple(sorted({one.name.rpartition(".")[2] for one in self.timings}))

    def frame(self) -> pd.DataFrame:
        """One row for each difference: file, name, a, b, relative."""
        import pandas as pd

        rows = [[d.file, d.name, d.a, d.b, d.relative] for d in self.differences]
        return pd.DataFrame(rows, columns=["file", "name", "a", "b", "relative"])

    def _repr_html_(self) -> str:
        html: str = self.frame().to_html(index=False, na_rep=MISSING)
        return f"<p>{self.summary}</p>{html if self.differences else ''}"

    @property
    def summary(self) -> str:
        """One line."""
        return (f"{self.figures:,} figures and {self.files:,} files compared, {len(self.differences):,} differ; "
                f"{len(self.timings):,} timings apart")  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """As `workbench compare --json` prints it."""
        apart = {name: [vars(d) for d in getattr(self, name)] for name in ("differences", "timings", "circumstances")}
        return {"a": str(self.a), "b": str(self.b), "equal": self.equal, "figures": self.figures, "files": self.files,
                **apart}  # fmt: skip


def equality_of(a: str | Path, b: str | Path) -> RunEquality:
    """Compares two run folders (or stores, or adapters): all that they hold.

    JSON and TOML files of a run (metrics, records of steps, the job) are compared figure by figure, exactly; every other
    file byte for byte, hidden ones too, so that what a killed run has left is found. Set apart are timings, where a run
    was made and what it was called, and its log and report. No link is followed. Raises UserError where one is no
    folder, or holds no file.

    >>> equality_of("runs/demo", "runs/again").equal                                              # doctest: +SKIP
    True
    """
    here, there = Path(a), Path(b)
    one, other = _files(here), _files(there)
    found = _Found()
    for name in sorted(one | other):
        if name not in one or name not in other:
            found.files += 1
            present = ("there" if name in one else MISSING, "there" if name in other else MISSING)
            found.differences.append(Difference(name, "", *present))
        elif (trees := _trees(here / name, there / name, name)) is not None:
            prefix = () if name == "metrics.json" else (name,)
            for path, x, y in _pairs(*trees):
                found.add(name, path, (*prefix, *path), x, y)
        else:
            found.files += 1
            if not _same(here / name, there / name):
                relative = _of_tensors(here / name, there / name) if name.endswith(".safetensors") else None
                found.differences.append(Difference(name, "", _size(here / name), _size(there / name), relative))
    return RunEquality(here, there, found.figures, found.files, tuple(found.differences), tuple(found.timings),
                       tuple(found.circumstances))  # fmt: skip


class _Found:
    def __init__(self) -> None:
        self.figures = self.files = 0
        self.differences: list[Difference] = []
        self.timings: list[Difference] = []
        self.circumstances: list[Difference] = []

    def add(self, file: str, path: tuple[str, ...], place: tuple[str, ...], x: Any, y: Any) -> None:
        one = Difference(file, ".".join(path), x, y, _relative(x, y))
        if file.startswith("steps/") and path == ("sha256",):  # of the record, its timings included
            return
        if is_timing(path):
            self.timings.append(one)
            return
        same = type(x) is type(y) and (x == y or (x != x and y != y))
        if any(place[: len(about)] == about for about in CIRCUMSTANCES):
            self.circumstances += [] if same else [one]
            return
        self.figures += 1
        self.differences += [] if same else [one]


def _files(folder: Path) -> set[str]:
    """Every file below a folder by its path from it, links as files; but what is not compared."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give two run folders to compare")
    found = set()
    for path, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(path) / name).is_symlink()]
        found |= {(Path(path) / name).relative_to(folder).as_posix() for name in (*files, *links)}
    if not found:
        raise UserError(f"{folder} holds nothing; give the folder of a run")
    return found - set(UNCOMPARED)


def _trees(a: Path, b: Path, name: str) -> tuple[Any, Any] | None:
    """The values of two files that are compared figure by figure; None for files that are compared by their bytes."""
    top = "/" not in name
    if not (top and name.endswith((".json", ".toml"))) and not (name.startswith("steps/") and name.endswith(".json")):
        return None
    try:
        return tuple((read_toml if name.endswith(".toml") else read_json)(file, MOST_BYTES) for file in (a, b))  # type: ignore[return-value]
    except (OSError, ValueError):  # damaged, or a link: its bytes say whether it is the same
        return None


def _pairs(a: Any, b: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """(path, value, value) of every leaf of two trees; where one has none there it is `MISSING`."""
    if isinstance(a, Mapping) and isinstance(b, Mapping) and (a or b):
        for key in sorted({*a, *b}, key=str):
            yield from _pairs(a.get(key, MISSING), b.get(key, MISSING), (*path, str(key)))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b) and a:
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _pairs(x, y, (*path, str(i)))
    elif isinstance(a, Mapping | list) and isinstance(b, str) and b == MISSING:
        yield from ((where, x, MISSING) for where, x, _ in _pairs(a, a, path)) if a else [(path, a, b)]
    elif isinstance(b, Mapping | list) and isinstance(a, str) and a == MISSING:
        yield from ((where, MISSING, x) for where, x, _ in _pairs(b, b, path)) if b else [(path, a, b)]
    else:
        yield path, a, b


def _relative(x: Any, y: Any) -> float | None:
    numbers = [v for v in (x, y) if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if len(numbers) < 2 or not all(map(math.isfinite, numbers)):
        return None
    size = max(map(abs, numbers))
    return abs(x - y) / size if size else 0.0


def _same(a: Path, b: Path) -> bool:
    if a.is_symlink() or b.is_symlink():
        return a.is_symlink() and b.is_symlink() and os.readlink(a) == os.readlink(b)
    return a.is_file() and b.is_file() and filecmp.cmp(a, b, shallow=False)


def _size(file: Path) -> str:
    return f"{os.lstat(file).st_size:,} bytes"


def _of_tensors(a: Path, b: Path) -> float | None:
    """How far the tensors of two files are from each other, where they are of the same names and shapes."""
    from .maps.linear_map import read_safetensors

    try:
        (one, _), (other, _) = read_safetensors(a), read_safetensors(b)
    except UserError:
        return None
    if {k: t.shape for k, t in one.items()} != {k: t.shape for k, t in other.items()}:
        return None
    pairs = [(one[name].double(), other[name].double()) for name in one if one[name].numel()]
    found: Sequence[float] = [float((x - y).abs().max() / max(float(x.abs().max()), 1e-300)) for x, y in pairs]
    return max(found, default=None)
