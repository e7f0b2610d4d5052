"""`workbench compare`: whether two runs hold the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_options import Json
from .cli_values import printed_json, printed_table

if TYPE_CHECKING:
    from rich.table import Table

    from .run_equality import Difference

ROWS = 40
DIFFERENT = 1  # exit code

Folder = Annotated[Path, typer.Argument(metavar="RUN", help="run folder")]


def compare(
    a: Folder,
    b: Annotated[Path, typer.Argument(metavar="OTHER", help="run folder to compare it with")],
    rows: Annotated[int, typer.Option(min=0, help="the most differences to show")] = ROWS,
    timings: Annotated[bool, typer.Option("--timings", help="show every timing of both too")] = False,
    as_json: Json = False,
) -> None:
    """Compares two runs: every figure, and every artefact byte for byte.

    Timings, and what says where a run was made, are told apart from what differs. Exit code 1 where the runs differ.
    """
    from .run_equality import equality_of

    found = equality_of(a, b)
    if as_json:
        printed_json(found.to_dict())
    else:
        if found.differences:
            printed_table(_table(found.differences[:rows], "what differs"))
        if (left := len(found.differences) - rows) > 0:
            typer.echo(f"and {left:,} more: --rows {len(found.differences)} shows all")
        if timings and found.timings:
            printed_table(_table(found.timings, "timings"))
        typer.echo(found.summary + (f": {', '.join(found.timing_names)}" if found.timings else ""))
        for one in found.circumstances:
            typer.echo(f"apart: {one.name or one.file}: {_cell(one.a)} and {_cell(one.b)}")
    if not found.equal:
        raise typer.Exit(DIFFERENT)


def _table(listed: tuple[Difference, ...], title: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(title), title_justify="left", box=None, header_style="bold", pad_edge=False, padding=(0, 1)
    )
    for name in ("file", "figure", "a", "b", "relative"):
        table.add_column(name, justify="left" if name in ("file", "figure") else "right", overflow="fold")
    for one in listed:
        relative = "" if one.relative is None else f"{one.relative:.1e}"
        table.add_row(*(Text(_cell(x)) for x in (one.file, one.name, one.a, one.b)), relative)
    return table


def _cell(value: Any) -> str:
    from .visible_text import visible

    text = f"{value:.8g}" if isinstance(value, float) else str(value)
    return visible(text[:60]) + ("…" if len(text) > 60 else "")
