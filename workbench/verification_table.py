"""What `workbench verify` prints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .sites import Site
from .verification import EDITED, LOGITS, MODEL, Agreement, Difference, Tried

if TYPE_CHECKING:
    from rich.table import Table


def agreement_table(found: Agreement) -> Table:
    """The differences of each backend, layer by layer: `max`, the largest, and `rel`, relative to the residual stream."""
    from rich.table import Table
    from rich.text import Text

    tried = [one for one in found.backends if not one.refused]
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    table.add_column("what", no_wrap=True)
    table.add_column("norm", justify="right")
    for one in tried:
        table.add_column(f"{one.name}\n{'max':>5} {'rel':>6}", justify="right", no_wrap=True)
    by_name = {(d.backend, d.what): d for d in found.differences}
    names = list(dict.fromkeys(d.what for d in found.differences))
    for name in sorted(names, key=_place):
        shown = [by_name.get((one.name, name)) for one in tried]
        norm = "" if LOGITS in name or name.startswith(EDITED) else f"{found.norms[Site.parse(name).layer]:.3g}"
        against = {d.against for d in shown if d is not None}
        cells = [
            Text("=" if one.name in against else "-") if d is None else Text(_cell(d), style="" if d.agrees else "red")
            for one, d in zip(tried, shown, strict=True)
        ]
        table.add_row(Text(name), norm, *cells)
    table.caption = Text(
        "resid_post and logits against Hugging Face's own, the\nrest against the first backend, shown there as =; a\n"
        "point that a backend does not have is shown as -.\nmax: the largest of an element; rel: of a token, in\n"
        "units of the norm of the residual stream there (of\nits own: mlp_act, logits, edited).", style="dim"
    )  # fmt: skip
    table.caption_justify = "left"
    return table


def summary_lines(found: Agreement) -> Iterator[str]:
    """A line for each backend, and the verdict."""
    for one in found.backends:
        yield f"{one.name}: refused: {one.refused}" if one.refused else f"{one.name}: {_line(found, one)}"
    verdict = "agree" if found.agrees else "DISAGREE"
    yield f"{found.model} ({found.family}, {found.dtype}): the backends {verdict} to {found.tolerance:g}"


def _line(found: Agreement, one: Tried) -> str:
    worst = found.worst(one.name)
    assert worst is not None
    points = " ".join(one.points) + (f" (on some layers: {' '.join(one.partly)})" if one.partly else "")
    tokens = "the same tokens" if one.same_tokens else "OTHER TOKENS"
    against = "Hugging Face" if worst.against == MODEL else worst.against
    return (f"{points}; at most {_figure(worst.relative)} from {against}, at {worst.what}; {tokens} generated under an edit; "
            f"a pass costs {one.cost:.2f} of a plain one")  # fmt: skip


def _cell(difference: Difference) -> str:
    return f"{_figure(difference.largest)} {_figure(difference.relative):>6}"


def _figure(value: float) -> str:
    return f"{value:.0e}" if value else "0"


def _place(name: str) -> tuple[bool, bool, int]:
    """Plain before edited, sites before logits; the sites of a layer stay in their order."""
    site = None if LOGITS in name else Site.parse(name.removeprefix(EDITED))
    return name.startswith(EDITED), site is None, site.layer if site is not None else 0
