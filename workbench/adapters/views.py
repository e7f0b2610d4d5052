"""An adapter as lines and rows to print."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .adapter import Adapter

if TYPE_CHECKING:
    from rich.table import Table

    from .weight_change import ResidualFit


def adapter_rows(adapter: Adapter) -> list[dict[str, Any]]:
    """One row for each part: where it acts, its sizes, the length of its constant delta (None where it reads)."""
    rows = []
    for term in adapter.split():
        for site, part in term.parts.items():
            constant = part.constant()
            length = None if constant is None else float(constant.double().norm()) * abs(term.strength)
            rows.append({"site": str(site), "positions": term.positions, "width": part.width, "rank": part.rank,
                         "act": part.act, "dtype": str(part.V.dtype).removeprefix("torch."), "constant": length})  # fmt: skip
    return rows


def adapter_table(adapter: Adapter) -> Table:
    """`adapter_rows` for a terminal."""
    from rich.table import Table
    from rich.text import Text

    rows = adapter_rows(adapter)
    table = Table(*rows[0], box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    for row in rows:
        length = "no, it reads" if row["constant"] is None else f"of length {row['constant']:.4g}"
        table.add_row(*(Text(str(value)) for key, value in row.items() if key != "constant"), Text(length))
    return table


def adapter_lines(adapter: Adapter) -> list[str]:
    """Its name, model, strength and number of parameters."""
    parts = [part for term in adapter.split() for part in term.parts.values()]
    count = sum(t.numel() for part in parts for t in (part.V, part.b, part.U))
    of = adapter.base.get("name") or "a model that is not stated"
    return [f"{adapter.name or 'adapter'}: of {of}, strength {adapter.strength:.4g}, {count:,} parameters"]


def fit_table(made: ResidualFit) -> Table:
    """Of every site that was tried, how much of the difference of a change of weights is explained; kept ones with a *."""
    from rich.table import Table
    from rich.text import Text

    head = ("site", "rank", "R2", "R2 constant", "explained", "constant", "of the whole", "held-out rows")
    table = Table(*head, box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    for f in made.fits:
        r2 = ["-" if x is None else f"{x:.3f}" for x in (f.r2, f.r2_constant)]
        shares = [f"{x:.3f}" for x in (f.explained, f.explained_constant, f.explained_whole)]
        site = f"{f.site}{'*' if f.site in made.adapter.sites else ''}"
        table.add_row(*map(Text, (site, str(f.rank), *r2, *shares, str(f.held_out_rows))))
    return table
