"""Answers that lie in files, of one arm or of several, each with its prompt and, where there is one, its gold answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..prompt_files import read_rows
from ..prompts import Prompt

COLUMNS = ("answer", "response", "completion", "output", "generated_text")
"""what a column of answers is called where none is named; the first that is there"""
PROMPTS = ("prompt", "question", "instruction", "input", "text")
GOLD = ("gold", "target")
CHECKED = 20  # prompts whose pairing with the gold rows is looked into where their texts do not say it at once


@dataclass(frozen=True)
class Answers:
    """Answers to the same prompts, by arm; `prompts[i].meta["gold"]` is the right one, where it is known."""

    prompts: tuple[Prompt, ...]
    arms: Mapping[str, tuple[str, ...]]


def read_answers(
    files: str | Path | Sequence[str | Path],
    columns: Sequence[str] = (),
    *,
    gold: str | Path | None = None,
    gold_column: str | None = None,
) -> Answers:
    """Reads answers from .csv, .jsonl, .json or .parquet files: one row for each prompt.

    files: one, or several that answer the same prompts. columns: those that hold answers, an arm each; unless given,
    the first of `COLUMNS` that is there. gold: a file whose rows hold the right answers, in the same order or with the
    same `id`; unless given, they are a column of the answers' own file. gold_column: where; unless given, the first of
    `GOLD`. Arms are named for their column, with the file where there are several.
    Raises UserError for files, columns or cells that are missing, and for files that are not of the same prompts.
    """
    listed = [files] if isinstance(files, (str, Path)) else list(files)
    arms: dict[str, tuple[str, ...]] = {}
    first: list[Prompt] = []
    for file in listed:
        rows = _rows(file)
        chosen = list(columns) or [_column(file, rows, COLUMNS, "answers", "--answer")]
        prompts = [_prompt(row, i, None if gold else gold_column) for i, row in enumerate(rows)]
        if first:
            _check_same(first, prompts, listed[0], file)
        first = first or prompts
        for column in chosen:
            name = (
                column if len(listed) == 1 else Path(file).stem if len(chosen) == 1 else f"{Path(file).stem}:{column}"
            )
            if name in arms:
                raise UserError(f"two arms are both called {name!r}; name the files, or the columns, differently")
            arms[name] = _cells(file, rows, column)
    if gold is not None:
        first = _with_gold(first, gold, gold_column)
    elif gold_column is not None and all("gold" not in p.meta for p in first):
        raise UserError(f"{listed[0]} has no column {gold_column!r} for the gold answers; it has "
                        f"{', '.join(_rows(listed[0])[0])}")  # fmt: skip
    return Answers(tuple(first), arms)


def _rows(file: str | Path) -> list[dict[str, Any]]:
    try:
        rows = list(read_rows(file))
    except UserError as err:
        raise UserError("answers" + str(err).removeprefix("prompts")) from err
    if not rows or not isinstance(rows[0], Mapping):
        raise UserError(f"answers {str(file)!r}: no rows with columns; give a .csv, .jsonl or .parquet file with a column of "
                        "answers")  # fmt: skip
    return rows


def _column(file: str | Path, rows: Sequence[Mapping[str, Any]], known: Sequence[str], what: str, option: str) -> str:
    found = next((name for name in known if name in rows[0]), None)
    if found is None:
        raise UserError(f"{file}: none of the columns {', '.join(known)} is there for the {what}; it has "
                        f"{', '.join(map(str, rows[0]))}; name one with {option}")  # fmt: skip
    return found


def _cells(file: str | Path, rows: Sequence[Mapping[str, Any]], column: str) -> tuple[str, ...]:
    if column not in rows[0]:
        raise UserError(f"{file} has no column {column!r}; it has {', '.join(map(str, rows[0]))}")
    for i, row in enumerate(rows):
        if row.get(column) is None:
            raise UserError(
                f"{file}, row {i}: no answer in column {column!r} (null); an answer of no words is an empty text"
            )
    cells = tuple(str(row[column]) for row in rows)
    if not any(cells):
        raise UserError(f"{file}: the column {column!r} is empty in every row; choose another with --answer")
    return cells


def _text(row: Mapping[str, Any]) -> str:
    """What a row asks: its prompt, or the last user's message of a chat."""
    found = next((row[name] for name in PROMPTS if row.get(name) is not None), "")
    messages = row.get("messages")
    if not found and isinstance(messages, Sequence) and not isinstance(messages, str):
        users = [m.get("content") for m in messages if isinstance(m, Mapping) and m.get("role") == "user"]
        found = users[-1] if users else ""
    return str(found)


def _prompt(row: Mapping[str, Any], index: int, gold_column: str | None) -> Prompt:
    names = GOLD if gold_column is None else (gold_column,)
    gold = next((row[name] for name in names if row.get(name) is not None), None)
    identity = row.get("id")
    identity = str(index if identity is None else identity)
    return Prompt(None, _text(row), identity, meta={} if gold is None else {"gold": gold})


def _check_same(first: Sequence[Prompt], second: Sequence[Prompt], a: str | Path, b: str | Path) -> None:
    if len(first) != len(second):
        raise UserError(f"{a} has {len(first)} answers and {b} has {len(second)}; they must answer the same prompts")
    for x, y in zip(first, second, strict=True):
        if (x.text and y.text and x.text != y.text) or x.id != y.id:
            raise UserError(f"{a} and {b} do not answer the same prompts in the same order: prompt {x.id!r} ({x.text!r:.60}) "
                            f"stands beside {y.id!r} ({y.text!r:.60})")  # fmt: skip


def _with_gold(prompts: Sequence[Prompt], file: str | Path, column: str | None) -> list[Prompt]:
    """The prompts with the gold answers of a file: by their id where all have one, else in order."""
    rows = _rows(file)
    chosen = column or _column(file, rows, (*GOLD, "answer"), "gold answers", "--gold-column")
    by_id = {str(row["id"]): row for row in rows if row.get("id") is not None}
    if len(by_id) == len(rows) and all(p.id in by_id for p in prompts):
        matched = [by_id[p.id] for p in prompts]
    elif len(rows) != len(prompts):
        raise UserError(f"{file} has {len(rows)} gold answers for {len(prompts)} answers, and no ids by which to pair them; "
                        "give one row for each")  # fmt: skip
    else:
        matched = list(rows)
        for name in PROMPTS:
            if name in rows[0]:
                _check_order(prompts, [str(row.get(name) or "") for row in rows], file)
    values = _cells(file, matched, chosen)
    return [replace(p, meta={**p.meta, "gold": value}) for p, value in zip(prompts, values, strict=True)]


def _check_order(prompts: Sequence[Prompt], questions: Sequence[str], file: str | Path) -> None:
    """UserError where a prompt holds the question of another gold row and not that of its own."""
    bare = [q.strip().rstrip("=:?. \n") for q in questions]
    odd = [i for i, (p, q) in enumerate(zip(prompts, bare, strict=True)) if p.text and q and q not in p.text]
    for i in odd[:CHECKED]:
        other = next((j for j, q in enumerate(bare) if len(q) > 8 and q in (prompts[i].text or "")), None)
        if other is not None:
            raise UserError(f"{file} is in another order: the prompt of answer {i} is that of gold row {other}; give both in "
                            "the same order, or with ids")  # fmt: skip
