"""`workbench grade`: answers in files, graded on their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import Json, Plugin
from .cli_values import printed_json, printed_table
from .errors import UserError


def grade(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="answers: .csv, .jsonl, .json or .parquet")],
    grader: Annotated[str, typer.Option(help="by name; docs/jobs.md lists them with their arguments")],
    arg: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="of the grader; may be repeated")] = None,
    answer: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN", help="of answers, an arm each; may be repeated")
    ] = None,
    gold: Annotated[str | None, typer.Option(metavar="FILE", help="of right answers: by id, or in order")] = None,
    gold_column: Annotated[str | None, typer.Option(help="of right answers [gold or target]")] = None,
    plugin: Plugin = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="for the verdicts: .jsonl, .csv or .parquet")] = None,
    as_json: Json = False,
) -> None:
    """Grades answers that lie in files.

    Prints the rate of each arm (a column of answers, or a file) with its 95 % interval by Wilson; of several arms on the
    same prompts, the first is compared with each other one by McNemar's exact test.
    """
    from .evaluate.answer_files import read_answers
    from .evaluate.grading import check_kind, grade_answers
    from .evaluate.plugins import load_plugin

    if out is not None:
        check_kind(out)
    if plugin is not None:
        load_plugin(plugin)
    args = grader_args(grader, arg or [])
    found = grade_answers(read_answers(files, answer or (), gold=gold, gold_column=gold_column), grader, **args)
    if out is not None:
        found.save(out)
    result = found.as_dict()
    if as_json:
        return printed_json(result)
    printed_table(_table(result))


def grader_args(grader: str, given: list[str]) -> dict[str, Any]:
    """The arguments of a grader as written on the command line: JSON, or a text where the grader wants one.

    >>> grader_args("regex", ["pattern=7"]), grader_args("json_field", ["field=A", "lenient=true"])
    ({'pattern': '7'}, {'field': 'A', 'lenient': True})
    """
    from inspect import signature

    from .evaluate.graders import find

    args: dict[str, Any] = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise UserError(f"cannot read the argument {item!r}; write KEY=VALUE, such as field=ANSWER or lenient=true")
        args[key] = value
    known = signature(find(grader, args)).parameters
    return {key: _value(value, str(known[key].annotation) if key in known else "") for key, value in args.items()}


def _value(text: str, kind: str) -> Any:
    if kind in ("str", "str | None", "<class 'str'>"):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _table(result: dict[str, Any]) -> Any:
    from rich.table import Table

    several = len(result["arms"]) > 1
    heads = ["arm", "passed", "rate", "95 % interval", "mean characters"]
    table = Table(*heads, *(["only first", "only this", "p (McNemar)"] if several else []), title=result["grader"])
    for arm, row in result["arms"].items():
        interval, pair = row["rate"], row["paired_with_first"]
        cells = [arm, f"{row['passed']} of {row['n']}", f"{100 * interval['value']:.1f} %",
                 f"{100 * interval['low']:.1f} to {100 * interval['high']:.1f} %", f"{row['mean_chars']:.0f}"]  # fmt: skip
        if several:
            cells += ["", "", ""] if pair is None else [str(pair["only_a"]), str(pair["only_b"]), f"{pair['p']:.2g}"]
        table.add_row(*cells)
    return table
