"""Moments summed by an engine: runs of blocks on the workers, added in a tree whose shape hangs on the plan alone.

The sums lie in files that all workers see, so that a lost worker costs its run and nothing else, and a stopped reduction
goes on. All of them are about the shifts that one process would take: products of rows below float64 round alike then, and
the sums differ from that process's in the order of float64 additions only; from one another, by workers, in nothing.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..interrupts import Asked
from ..maps.moments import Moments, total
from ..progress import progress
from ..sites import Site
from ..store.parts import FolderParts
from . import plan as plans
from .pieces import Piece, piece_of, plan_of, settings_of
from .plan import Block, Plan
from .room import check_sums_room
from .run import BlockRunner
from .spool import Numbers
from .told import sums_flops, tell

if TYPE_CHECKING:
    from ..engines import Engine
    from ..models import Model

log = logging.getLogger("workbench")
RUNS = 32
"""runs of blocks at most that are summed apart: each is written once, and as many workers at most have work"""
HERE = "workbench.profile.reduction:"


@dataclass(frozen=True)
class Run:
    """Blocks that are summed together, and the fold that each of a block's prompts belongs to."""

    name: str
    blocks: list[Piece]
    folds: list[Numbers]


def add_rows(sums: Sequence[Moments], fold: Tensor, block: Block, rows: dict[Site, Tensor], plan: Plan,
             device: torch.device) -> None:  # fmt: skip
    """Adds the rows of a block to the sums of the fold that each belongs to, [n]."""
    for i, moments in enumerate(sums):
        mine = (fold == i).nonzero().flatten()
        if len(mine) == 0:
            continue
        step = max(1, plans.BLOCK_BYTES // plan.row_bytes)  # less than all of it for a prompt beyond a block
        whole = len(mine) == block.n and block.n <= step
        for part in mine.split(step):
            moments.update({
                str(site): (v if whole else v.index_select(0, part.to(v.device))).to(device) for site, v in rows.items()
            })  # fmt: skip


def reduced(
    model: Model, plan: Plan, fold_of: Numbers, about: dict[str, Any], folder: Path, engine: Engine, stop: Asked
) -> list[Moments]:
    """The moments of each fold; `folder` keeps the sums on the way, and those of an earlier run with the same arguments.

    fold_of: of each prompt. about: folds, pairs and products, as `profile_moments` has them, and the key of its arguments.
    """
    folds = about["folds"]
    parts = FolderParts(folder, about["key"])
    common = {"settings": settings_of(plan), "place": str(folder), "mark": parts.make(), "about": about, "folds": folds}
    tree = _Tree(parts.folder, _bounds(len(plan.blocks)))
    if tree.needed():
        shifts = _shifts(model, plan, fold_of, common, engine, stop)
        leaves = [i for level, i in tree.needed() if level == 0]
        spans = [tree.bounds[i] for i in leaves]
        runs = (_run(tree.name(0, i), plan, range(*tree.bounds[i]), fold_of) for i in leaves)
        tokens = [sum(plan.tokens_of(plan.blocks[b]) for b in range(*span)) for span in spans]
        before = plan.n_tokens - sum(tokens)
        desc = f"moments of {Path(model.name).name}"
        begin = time.monotonic()
        with progress(total=plan.n_tokens, desc=desc, unit="tok", initial=before, scale=True) as bar:
            for index, _ in engine.spread(
                model, HERE + "sum_run", runs, common={**common, "shifts": shifts}, stop=stop
            ):
                bar.update(tokens[index])
        for level in range(1, tree.height + 1):
            nodes = [tree.node(at, i) for at, i in tree.needed() if at == level]
            for index, _ in engine.spread(None, HERE + "add_sums", nodes, common={"folder": str(parts.folder), "folds": folds},
                                          stop=stop):  # fmt: skip
                tree.forget(nodes[index]["of"], folds)  # not by the worker: it may die and have to do it again
        run = [plan.blocks[b] for span in spans for b in range(*span)]
        tell(model, plan, run, time.monotonic() - begin, sums_flops(plan, run, about["pairs"], model.device.type))
    return [Moments.load(parts.folder / _file(tree.name(tree.height, 0), i)) for i in range(folds)]


def _shifts(
    model: Model, plan: Plan, fold_of: Numbers, common: dict[str, Any], engine: Engine, stop: Asked
) -> list[dict[str, np.ndarray]]:
    """The points to sum about, of each fold: from the first block that has rows of it."""
    first = first_blocks(plan, fold_of)
    numbers = sorted(set(first.values()))
    runs = (_run("", plan, range(number, number + 1), fold_of) for number in numbers)
    made = {
        numbers[i]: shifts for i, shifts in engine.spread(model, HERE + "shifts_of", runs, common=common, stop=stop)
    }
    return [made[first[fold]][fold] if fold in first else {} for fold in range(common["folds"])]


def _run(name: str, plan: Plan, blocks: range, fold_of: Numbers) -> Run:
    several = [plan.blocks[number] for number in blocks]
    folds = [fold_of[np.unique(plan.spool.sequences["prompt"][b.first : b.last])] for b in several]
    return Run(name, [piece_of(plan, number) for number in blocks], folds)


def first_blocks(plan: Plan, fold_of: Numbers) -> dict[int, int]:
    """The first block that has rows of each fold; none for a fold without any."""
    found: dict[int, int] = {}
    for number in range(len(plan.blocks)):
        block = plan.blocks[number]
        kept = plan.spool.sequences["n_rows"][block.first : block.last] > 0
        for fold in np.unique(fold_of[plan.spool.sequences["prompt"][block.first : block.last][kept]]).tolist():
            found.setdefault(fold, number)
        if len(found) == len(np.unique(fold_of)):
            break
    return found


# -- what workers do --------------------------------------------------------------------------------------------------


def shifts_of(
    model: Model, piece: Run, *, settings: dict[str, Any], place: str, mark: str, about: dict[str, Any], folds: int
) -> dict[int, dict[str, np.ndarray]]:
    """The points that one process would sum about, of the folds that have rows in a block. A task of engines."""
    made = {}
    for fold, moments in enumerate(_summed(model, piece, settings, about, [{}] * folds)):
        made[fold] = {name: shift.cpu().numpy() for name, shift in moments.shift.items()}
    return made


def sum_run(
    model: Model, piece: Run, *, settings: dict[str, Any], place: str, mark: str, about: dict[str, Any], folds: int,
    shifts: list[dict[str, np.ndarray]],
) -> int:  # fmt: skip
    """Sums a run of blocks into a file for each fold; how many rows. A task of engines."""
    parts = FolderParts(Path(place), about["key"])
    parts.check(mark)
    made = _summed(model, piece, settings, about, shifts)
    for fold, moments in enumerate(made):
        moments.save(parts.folder / _file(piece.name, fold), overwrite=True)
    (parts.folder / f"{piece.name}.done").touch()
    return sum(moments.n for moments in made)


def add_sums(model: None, piece: dict[str, Any], *, folder: str, folds: int) -> None:
    """Adds two sums of each fold and writes what they make. A task of engines."""
    for fold in range(folds):
        both = [Moments.load(Path(folder) / _file(name, fold)) for name in piece["of"]]
        total(both).save(Path(folder) / _file(piece["name"], fold), overwrite=True)
    (Path(folder) / f"{piece['name']}.done").touch()


def _summed(model: Model, run: Run, settings: dict[str, Any], about: dict[str, Any],
            shifts: Sequence[dict[str, np.ndarray]]) -> list[Moments]:  # fmt: skip
    dtype, device = getattr(torch, about["products"]), model.device
    pairs = None if about["pairs"] is None else [tuple(pair) for pair in about["pairs"]]
    points = [{name: torch.from_numpy(point.copy()).to(device) for name, point in shift.items()} for shift in shifts]
    sums = [Moments(pairs=pairs, products=dtype, shift=point or None) for point in points]
    for piece, folds in zip(run.blocks, run.folds, strict=True):
        plan = plan_of(piece, settings)
        if piece is run.blocks[0]:
            check_sums_room(device, plan, pairs, len(sums), saved=False)
        rows = BlockRunner(model, plan).run(plan.blocks[0])
        fold = torch.from_numpy(folds[plan.prompts_of(plan.blocks[0])])
        add_rows(sums, fold, plan.blocks[0], rows, plan, device)
    return sums


# -- the tree ---------------------------------------------------------------------------------------------------------


def _bounds(n_blocks: int) -> list[tuple[int, int]]:
    """The runs: as even as they can be.

    >>> _bounds(3)
    [(0, 1), (1, 2), (2, 3)]
    """
    count = min(n_blocks, RUNS)
    ends = [n_blocks * i // count for i in range(count + 1)]
    return list(pairwise(ends))


class _Tree:
    """Sums by level and index: node (level, i) is of (level - 1, 2i) and (level - 1, 2i + 1), or is the first alone."""

    def __init__(self, folder: Path, bounds: list[tuple[int, int]]) -> None:
        self.folder, self.bounds, self.height = folder, bounds, math.ceil(math.log2(len(bounds)))

    def _count(self, level: int) -> int:
        return -(-len(self.bounds) // 2**level)

    def name(self, level: int, i: int) -> str:
        """Where the sums of a node are: one without a partner is its child."""
        while level and 2 * i + 1 >= self._count(level - 1):
            level, i = level - 1, 2 * i
        return f"sum-{level}-{i}"

    def node(self, level: int, i: int) -> dict[str, Any]:
        return {"name": self.name(level, i), "of": [self.name(level - 1, 2 * i + k) for k in (0, 1)]}

    def needed(self) -> list[tuple[int, int]]:
        """The nodes that are still to be made, children first."""
        return list(self._needed(self.height, 0))

    def _needed(self, level: int, i: int) -> Iterator[tuple[int, int]]:
        if self._there(self.name(level, i)):
            return
        pair = level > 0 and 2 * i + 1 < self._count(level - 1)
        for k in range(2 if pair else 1) if level else ():
            yield from self._needed(level - 1, 2 * i + k)
        if pair or not level:
            yield level, i

    def _there(self, name: str) -> bool:
        return (self.folder / f"{name}.done").is_file()

    def forget(self, names: list[str], folds: int) -> None:
        for name in names:
            (self.folder / f"{name}.done").unlink(missing_ok=True)
            for fold in range(folds):
                (self.folder / _file(name, fold)).unlink(missing_ok=True)


def _file(name: str, fold: int) -> str:
    return f"{name}-fold-{fold}.safetensors"
