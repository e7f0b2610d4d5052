"""A block of a plan as plain data, so that another process can compute it without the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError
from ..prompts import Prompt, PromptSet
from ..sites import Site
from ..store.parts import FolderParts, Parts
from ..store.remote import UrlParts
from .plan import Plan
from .run import refuse_nonfinite, run_blocks
from .spool import Numbers, Spool

if TYPE_CHECKING:
    from ..anatomy import Anatomy
    from ..engines import Engine
    from ..models import Model

OUTER = ("resid_pre", "resid_post")
"""points that every block has: of the others only a pass through the weights can tell"""


@dataclass(frozen=True)
class Piece:
    """The sequences of a block.

    Fields:
        tokens, lengths: the token ids of all sequences one after another, and how many each has.
        columns, rows: where the kept tokens lie in their sequence, one sequence after another, and how many each has.
        prompt, names: which of `names`, the prompts' ids, each sequence is of.
    """

    number: int
    tokens: Numbers
    lengths: Numbers
    columns: Numbers
    rows: Numbers
    prompt: Numbers
    names: list[str]


def piece_of(plan: Plan, number: int) -> Piece:
    """Block `number` of a plan."""
    block, spool = plan.blocks[number], plan.spool
    part = slice(block.first, block.last)
    several = range(block.first, block.last)
    prompts, prompt = np.unique(spool.sequences["prompt"][part], return_inverse=True)
    return Piece(
        number, np.concatenate([spool.ids(i) for i in several]).astype(np.int32), spool.lengths[part],
        np.concatenate([spool.columns(i) for i in several]).astype(np.int32), spool.sequences["n_rows"][part], prompt,
        [plan.prompts[int(i)].id for i in prompts],
    )  # fmt: skip


class _PieceSpool(Spool):
    """The part of a spool that running a block needs."""

    def __init__(self, piece: Piece) -> None:
        self._piece = piece
        self._starts = np.concatenate([[0], np.cumsum(piece.lengths)])
        self._firsts = np.concatenate([[0], np.cumsum(piece.rows)])

    @property
    def n_rows(self) -> int:
        return int(self._firsts[-1])

    @cached_property
    def sequences(self) -> dict[str, Numbers]:
        return {"prompt": self._piece.prompt, "first_row": self._firsts[:-1], "n_rows": self._piece.rows}

    @cached_property
    def lengths(self) -> Numbers:
        return self._piece.lengths

    def ids(self, sequence: int) -> Numbers:
        return self._piece.tokens[self._starts[sequence] : self._starts[sequence + 1]]

    def columns(self, sequence: int) -> Numbers:
        return self._piece.columns[self._firsts[sequence] : self._firsts[sequence + 1]]


def settings_of(plan: Plan) -> dict[str, Any]:
    """What the blocks of a plan have in common, as plain data."""
    return {"widths": {str(site): plan.widths[site] for site in plan.sites}, "dtype": plan.dtype,
            "batch_tokens": plan.batch_tokens, "plan": plan.hash}  # fmt: skip


def plan_of(piece: Piece, settings: dict[str, Any]) -> Plan:
    """A plan of that one block: its rows are those of the block in the plan that it is from, bit for bit."""
    widths = {Site.parse(name): width for name, width in settings["widths"].items()}
    prompts = PromptSet(tuple(Prompt(None, "", name) for name in piece.names))
    plan = Plan(prompts, _PieceSpool(piece), list(widths), widths, settings["dtype"], settings["batch_tokens"],
                {"plan": settings["plan"]})  # fmt: skip
    assert len(plan.blocks) == 1, "a piece is one block"
    return plan


def write_piece(
    model: Model, piece: Piece, *, settings: dict[str, Any], place: str, mark: str | None, allow_nonfinite: bool
) -> dict[str, Any]:
    """Computes a block and writes it to its place; the entry of its shard. A task of engines."""
    parts: Parts
    if "://" in place:
        parts = UrlParts(place, settings["plan"])
    else:
        parts = folder = FolderParts(Path(place), settings["plan"])
        if mark is not None:
            folder.check(mark)
    plan = plan_of(piece, settings)
    _check_widths(model, plan)
    _, rows, nonfinite = next(run_blocks(model, plan, [0]))
    if any(nonfinite.values()):
        refuse_nonfinite(plan, 0, rows, nonfinite, allow_nonfinite)
    return parts.write(piece.number, {str(s): v for s, v in rows.items()}, {str(s): n for s, n in nonfinite.items()})


def _check_widths(model: Model, plan: Plan) -> None:
    for site, width in plan.widths.items():
        if model.width_of(site) != width:
            raise UserError(f"{site} is {model.width_of(site)} wide on a worker, and {width} were planned; give every "
                            "machine the same model and versions")  # fmt: skip


def anatomy_of(model: Model, piece: None) -> list[Anatomy]:
    """What a worker found of the parts of each block. A task of engines."""
    return model.anatomy


def borrow_anatomy(model: Model, engine: Engine, sites: Sequence[Site | str | int] | None) -> None:
    """Lets a worker look at the parts of the blocks, for a model without weights here, where a site is within a block."""
    if any(model.site(site).point not in OUTER for site in sites or ()):
        ((_, model.anatomy),) = engine.spread(model, "workbench.profile.pieces:anatomy_of", [None])
