"""The quality of converters as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .summary import plain

if TYPE_CHECKING:
    from rich.table import Table


def quality_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows of `converter_files.quality_rows`: held-out R2 of each map beside its baselines, and its cycle error."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    table.add_column("from")
    table.add_column("to")
    for column in ("alpha", "R2", "R2 mean", "R2 same", "cycle"):
        table.add_column(column, justify="right", no_wrap=True)
    keys = ("alpha", "r2_weighted", "r2_mean_baseline", "r2_identity_bias", "cycle_error")
    for row in rows:
        table.add_row(Text(row["from"]), Text(row["to"]), *(plain(row[key]) for key in keys))
    table.caption = Text(
        "Held out. R2 mean: of the training mean; R2 same: of x plus a bias (equal widths). cycle: 0 is perfect,\n"
        "1 no better than the mean. How well a map fits does not say whether a paste will work.", style="dim"
    )  # fmt: skip
    table.caption_justify = "left"
    return table
