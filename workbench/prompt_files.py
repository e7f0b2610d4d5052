"""Files and datasets of prompts, read as plain rows; what a row means is for `prompts.py` to say."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bundled import PREFIX, bundled_path
from .errors import UserError
from .parquet_files import parquet_batches
from .small_files import plain_file, reason

log = logging.getLogger("workbench")
HUB = "hub:"
ENCODING = "utf-8-sig"  # Excel puts a byte order mark in front, which must not become part of the first column's name
LONGEST_CELL = 2**26  # characters; the csv module's own limit of 2**17 is less than a long transcript
SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Rows(Iterable[Any]):
    """The rows of a source, strings or dicts; each iteration reads it again from the start, and no more than is asked."""

    name: str
    read: Callable[[], Iterator[Any]]

    def __iter__(self) -> Iterator[Any]:
        return self.read()


def read_rows(source: str | Path) -> Rows:
    """The rows of a source and its name; nothing but a .json list is held in memory whole.

    source: a .txt (one prompt a line, blank lines left out), .jsonl, .json (a list), .csv or .parquet file; a folder
    written by `datasets`' `save_to_disk` (`folder@split` for a split of it); `hub:owner/name[:config][@split]`; or
    `bundled:NAME`. Of several splits `train` is read unless one is named, and the log says so.
    Raises UserError naming what cannot be read.
    """
    text = str(source)
    if text.startswith(HUB):
        found = _hub(text)
        return Rows(text, lambda: iter(found))
    if text.startswith(PREFIX):
        bundled = bundled_path(text, "prompts", ".jsonl")
        return Rows(text, lambda: _jsonl(bundled))
    if not text.strip():
        raise UserError("prompts: the name is empty; give a file, a folder of a dataset, "
                        f"{HUB}owner/name or {PREFIX}NAME")  # fmt: skip
    path, split = _folder_and_split(Path(source).expanduser())
    if path.is_dir():
        saved = _saved(path, split)
        return Rows(path.name if split is None else f"{path.name}@{split}", lambda: iter(saved))
    if not path.exists():
        raise UserError(f"prompts {text!r}: no such file; give {', '.join(SUFFIXES)}, {HUB}owner/name or {PREFIX}NAME")
    readers = {".txt": _lines, ".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise UserError(f"prompts {text!r}: unknown kind of file {path.suffix!r}; allowed: {', '.join(SUFFIXES)}")
    return Rows(path.stem, lambda: _checked(path, readers[path.suffix.lower()]))


def _folder_and_split(path: Path) -> tuple[Path, str | None]:
    """`folder@split` in two, where `folder` is one and nothing has the whole name."""
    name, at, split = path.name.rpartition("@")
    folder = path.parent / name
    return (folder, split) if at and not path.exists() and folder.is_dir() else (path, None)


def _checked(path: Path, reader: Callable[[Path], Iterator[Any]]) -> Iterator[Any]:
    try:
        plain_file(path, named=True)  # a pipe would be waited for
    except (OSError, ValueError) as err:
        raise UserError(f"prompts {path}: {reason(err)}; check the file") from err
    try:
        yield from reader(path)
    except UnicodeDecodeError as err:
        raise UserError(f"prompts {path}: not UTF-8 text (byte {_bad_byte(path)}); convert the file first") from err
    except OSError as err:
        raise UserError(f"prompts {path}: {err.strerror or err}; check the file") from err


def _bad_byte(path: Path) -> int:
    """Where the file stops being UTF-8; a decoder that reads in pieces counts from the last of them."""
    at = 0
    with path.open("rb") as stream:
        for line in stream:
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as err:
                return at + err.start
            at += len(line)
    return at


def _lines(path: Path) -> Iterator[Any]:
    with path.open(encoding=ENCODING) as stream:
        for line in stream:
            if line.strip():
                yield line.removesuffix("\n")


def _jsonl(path: Path) -> Iterator[Any]:
    with path.open(encoding=ENCODING) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as err:
                if isinstance(err, UnicodeDecodeError):
                    raise
                raise UserError(
                    f"prompts {path}, line {number}: not JSON ({_fault(err)}); a line is one object"
                ) from err
            yield row


def _json(path: Path) -> Iterator[Any]:
    text = path.read_text(encoding=ENCODING)
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as err:
        line = f", line {err.lineno}" if isinstance(err, json.JSONDecodeError) else ""
        raise UserError(f"prompts {path}: not JSON ({_fault(err)}{line}); a file of prompts is one list") from err
    if not isinstance(rows, list):
        raise UserError(f"prompts {path}: holds a {type(rows).__name__}; a .json file of prompts must hold a list")
    yield from rows


def _fault(err: Exception) -> str:
    """Why json refused a text, in a few words."""
    if isinstance(err, json.JSONDecodeError):
        return err.msg
    return "nested too deep" if isinstance(err, RecursionError) else "a number with too many digits"


def _csv(path: Path) -> Iterator[Any]:
    number = 0
    try:
        with path.open(encoding=ENCODING, newline="") as stream:
            reader = csv.DictReader(stream)
            while (row := _next_row(reader)) is not None:
                number += 1
                if None in row:
                    columns = len(reader.fieldnames or ())
                    raise UserError(
                        f"prompts {path}, row {number} (line {reader.line_num}): has {columns + len(row[None])} "
                        f"cells and the header {columns}; put a cell that holds a comma in double quotes"
                    )
                yield row
    except csv.Error as err:
        raise UserError(
            f"prompts {path}, row {number + 1}: cannot be read as CSV ({err}); a cell has at most {LONGEST_CELL} "
            "characters, and every double quote is closed"
        ) from err


def _next_row(reader: Any) -> dict[Any, Any] | None:
    """The next row; csv's limit of a cell is the whole program's, so it is raised for no longer than a row takes."""
    limit = csv.field_size_limit(LONGEST_CELL)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path) -> Iterator[Any]:
    try:
        for batch in parquet_batches(path, named=True):
            yield from batch.to_pylist()
    except (ValueError, OverflowError) as err:  # the second: a date that Python has not
        raise UserError(f"prompts {path}: {reason(err)}") from err


def _saved(path: Path, split: str | None) -> Any:
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as err:
        raise UserError(f"prompts {path}: a folder, but not one that datasets' save_to_disk made; give a file") from err
    return _split(found, str(path), split)


def _hub(text: str) -> Any:
    import datasets

    name, _, split = text.removeprefix(HUB).partition("@")
    repo, _, config = name.partition(":")
    try:
        found = datasets.load_dataset(repo, config or None)
    except Exception as err:  # the hub client has dozens of errors; each means the same to the user
        reason = (str(err).strip().splitlines() or [type(err).__name__])[0][:160]
        raise UserError(f"prompts {text!r}: the hub did not give this dataset ({reason}); write "
                        f"{HUB}owner/name[:config][@split], or give a local file") from err  # fmt: skip
    return _split(found, text, split or None)


def _split(found: Any, name: str, split: str | None) -> Any:
    if split is not None and not hasattr(found, "keys"):
        raise UserError(f"prompts {name!r}: is one dataset without splits; leave @{split} out")
    if hasattr(found, "keys"):
        if split is None and "train" not in found and len(found) > 1:
            raise UserError(f"prompts {name!r}: has splits {', '.join(found)}; choose one with @split")
        if split is None and len(found) > 1:
            log.info("prompts %s: the split train of %s is read; choose another with @split", name, ", ".join(found))
        split = split if split is not None else "train" if "train" in found else next(iter(found))
        if split not in found:
            raise UserError(f"prompts {name!r}: no split {split!r}; allowed: {', '.join(found)}")
        found = found[split]
    return found
