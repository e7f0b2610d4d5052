"""The rows of a transport from replicas of its model: made anywhere, handed over in the order of the plan.

The forward passes are what is spread. The sums stay in one place: a shuffled control pairs rows with those of other prompts,
by draws in the order of the rows, and float32 products of other stretches of rows have other roundings, so that a grid summed
by workers would be another with each number of them. Here it is the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..engines import in_order
from ..profile.pieces import piece_of, plan_of, settings_of
from ..profile.plan import Block, Plan
from ..profile.run import run_blocks
from ..replicas import check_device
from ..sites import Site
from .routing import Route, Span

if TYPE_CHECKING:
    from ..engines import Engine
    from ..models import Model
    from ..profile.pieces import Piece

AHEAD = 1 << 30
"""bytes of rows that may lie here and wait for those before them, where that is more than a block for each worker"""


def spread_rows(
    model: Model, plan: Plan, engine: Engine, bar: Any
) -> Iterator[tuple[Block, dict[Site, Tensor], Mapping[Span, Route]]]:
    """(block, its rows on the host, no routes) in the order of the plan; memory holds some blocks, however many there are.

    They are spread a stretch at a time, so that a worker that is slow, or lost, holds up the others before their rows
    pile up here.
    """
    check_device(model, engine)
    settings = settings_of(plan)
    most = max(block.n for block in plan.blocks) * plan.row_bytes
    step = max(engine.workers, AHEAD // max(1, most))
    for first in range(0, len(plan.blocks), step):
        blocks = plan.blocks[first : first + step]
        pieces = (piece_of(plan, first + i) for i in range(len(blocks)))
        results = engine.spread(
            model, "workbench.transport.replica_rows:piece_rows", pieces, common={"settings": settings}
        )
        for block, rows in zip(blocks, in_order(results), strict=True):
            bar.update(plan.tokens_of(block))
            yield block, {Site.parse(name): torch.from_numpy(h.copy()) for name, h in rows.items()}, {}


def piece_rows(model: Model, piece: Piece, *, settings: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
    """The rows of a block on a replica. A task of engines."""
    _, rows, _ = next(run_blocks(model, plan_of(piece, settings), [0]))
    return {str(site): h.numpy() for site, h in rows.items()}
