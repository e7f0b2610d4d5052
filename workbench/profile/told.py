"""What a profile did, counted, in one line beside its time: so that the figure can be judged on another machine."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import UserError
from ..maps.counts import moments_flops
from ..work import Lengths, ModelShape, Work, forward
from ..work.work import duration

if TYPE_CHECKING:
    from ..models import Model
    from .plan import Block, Plan

log = logging.getLogger("workbench")


def lengths_of(plan: Plan, blocks: Sequence[Block] | None = None) -> Lengths:
    """The texts that blocks of a plan run, all unless given."""
    read: list[int] = []
    for block in plan.blocks if blocks is None else blocks:
        part = slice(block.first, block.last)
        read += plan.spool.lengths[part][plan.spool.sequences["n_rows"][part] > 0].tolist()
    return Lengths.of(read)


def passes_of(model: Model, plan: Plan, blocks: Sequence[Block] | None = None) -> Work:
    """The forward passes over blocks of a plan, all unless given: each text once, to the last layer that is kept."""
    last = max(site.layer for site in plan.sites)
    return forward(ModelShape.of(model), lengths_of(plan, blocks), stop_after=last)


def sums_flops(plan: Plan, blocks: Sequence[Block], pairs: Sequence[tuple[str, str]] | None, device: str) -> float:
    """FLOPs of the moments of blocks of a plan."""
    order = [str(site) for site in plan.sites]
    index = None if pairs is None else [(order.index(a), order.index(b)) for a, b in pairs]
    rows = float(sum(block.n for block in blocks))
    return moments_flops(rows, [plan.widths[site] for site in plan.sites], index, device)


def tell(model: Model, plan: Plan, blocks: Sequence[Block], seconds: float, sums: float = 0.0) -> None:
    """One line of the log. blocks: those that were run now. sums: FLOPs of their moments.

    Where the model's configuration does not say its sizes, the line says so, and counts no FLOPs.
    """
    if not blocks:
        return
    tokens = sum(plan.tokens_of(block) for block in blocks)
    try:
        passes = passes_of(model, plan, blocks).flops
        of = f"{passes:.3g} FLOPs of passes and {sums:.3g} of sums" if sums else f"{passes:.3g} FLOPs"
        of += f" ({(passes + sums) / max(seconds, 1e-9):.3g} a second)"
    except UserError as err:
        of = str(err)
    log.info("profiled %s: %s tokens in %s, %s", model.name, f"{tokens:,}", duration(seconds), of)
