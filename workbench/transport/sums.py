"""The moments of a transport: by fold of the training prompts and shard of the held-out ones, in as many passes as fit."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from numpy.typing import NDArray

from ..errors import UserError
from ..maps.grouped import GroupedMoments, plan_passes
from ..maps.moments import Moments, Pair
from ..maps.moments import total as summed
from ..sites import Site
from .control import Batch, Control, taken
from .positions import ATTENTION, Index, is_first, paired_rows
from .routing import attention_between, routing_figures
from .rows import Rows, RowSource

SHARE = 0.6  # of the memory that is free, for moments
SHUFFLED = "shuffled"
CONTROL = f"@{SHUFFLED}"
FIRST, LATER, EVERY = "first", "later", "every"
"""kinds of rows: those with position 0 (BOS) at either end, and the others; where a row's source is another once position
0 may be one, all of them anew"""


@dataclass(frozen=True)
class Split:
    """The prompts dealt out: `folds` parts to train on, and `shards` parts that no map has seen."""

    part: Index
    """of each prompt: 0..folds-1 a fold, folds..folds+shards-1 a shard"""
    folds: int
    shards: int

    @classmethod
    def of(cls, n_prompts: int, *, folds: int, shards: int, holdout: float, seed: int) -> Split:
        """Deals `n_prompts` by `seed`; UserError where they are too few for the parts.

        >>> Split.of(8, folds=2, shards=2, holdout=0.25, seed=0).part.tolist().count(0)
        3
        """
        if folds < 2 or shards < 2:
            raise UserError(f"folds and shards must be at least 2; got folds={folds}, shards={shards}")
        if not 0 < holdout < 1:
            raise UserError(f"holdout is a share of the prompts between 0 and 1; got {holdout:g}")
        held = round(holdout * n_prompts)
        if held < shards or n_prompts - held < folds:
            raise UserError(f"{n_prompts} prompts are too few for {folds} folds and {shards} shards of held-out prompts "
                            f"(holdout={holdout:g}); give more prompts, or fewer parts")  # fmt: skip
        order = list(range(n_prompts))
        random.Random(seed).shuffle(order)
        part = np.empty(n_prompts, dtype=np.int64)
        part[order[:held]] = folds + np.arange(held) % shards
        part[order[held:]] = np.arange(n_prompts - held) % folds
        return cls(part, folds, shards)


@dataclass(frozen=True, eq=False)
class PairSums:
    """The moments of some pairs of blocks, ready to be added up."""

    grouped: GroupedMoments
    split: Split
    pairs: tuple[tuple[Site, Site], ...]
    routing: Mapping[str, float] = field(default_factory=dict)
    """of one pair that attention routes: see `_routed_sums`"""
    own: float = 0.0
    """share of the rows whose shuffled source is of their own prompt"""

    def parts(self, *, first: bool = False) -> tuple[list[Moments], list[Moments]]:
        """(folds, shards); rows at position 0 only with `first`. Parts without rows are left out."""
        groups = self.grouped.groups
        with_first = (EVERY,) if any(kind == EVERY for _, kind in groups) else (LATER, FIRST)
        kinds = with_first if first else (LATER,)
        made: list[list[Moments]] = [[], []]
        for part in range(self.split.folds + self.split.shards):
            found = [groups[part, kind] for kind in kinds if (part, kind) in groups]
            if found and sum(m.n for m in found):
                made[part >= self.split.folds].append(summed(found))
        return made[0], made[1]

    @property
    def n_first(self) -> int:
        """Rows that are there with position 0 alone."""
        n = {of: sum(m.n for (_, kind), m in self.grouped.groups.items() if kind == of) for of in (FIRST, LATER, EVERY)}
        return n[FIRST] + max(0, n[EVERY] - n[LATER])


def source_name(site: Site, positions: str) -> str:
    """The block of a site as a source; other than the target's where it holds other rows."""
    return str(site) if positions == "same" else f"{site}@{positions}"


def plan_sums(
    source: RowSource, pairs: Sequence[tuple[Site, Site]], *, positions: str, control: bool, copies: int,
    memory: int | None,
) -> list[list[tuple[Site, Site]]]:  # fmt: skip
    """The pairs divided into passes over the rows, each of which fits into `memory` bytes.

    Where not even the targets of one source fit together, they are divided too. Pairs that attention routes have rows of
    their own, and share nothing.
    """
    free = memory or free_bytes(source.device)
    copies = copies * (1 + control)  # the control's cross products, and its sources once more
    by_name = {_planned(a, b, positions): (a, b) for a, b in pairs}
    widths = {name: source.width(s) for names, pair in by_name.items() for name, s in zip(names, pair, strict=True)}
    by_source: dict[str, list[Pair]] = {}
    for name in by_name:
        by_source.setdefault(name[0], []).append(name)
    chunks: list[list[Pair]] = []
    for names in by_source.values():
        step = len(names)
        while step > 1 and not _fits(widths, names[:step], free, copies):
            step = (step + 1) // 2
        chunks += [names[i : i + step] for i in range(0, len(names), step)]
    passes: list[list[Pair]] = []
    for chunk in chunks:  # of one source each
        if passes and _fits_together(widths, [*passes[-1], *chunk], free, copies):
            passes[-1] += chunk
        else:
            passes += plan_passes(widths, chunk, free, copies=copies)
    return [[by_name[name] for name in some] for some in passes]


def _planned(a: Site, b: Site, positions: str) -> Pair:
    if positions == ATTENTION:
        return f"{source_name(a, positions)}>{b}", f"{a}>{b}"
    return source_name(a, positions), str(b)


def _fits(widths: dict[str, int], pairs: list[Pair], memory: int, copies: int) -> bool:
    try:
        plan_passes(widths, pairs, memory, copies=copies)
    except UserError:
        return False
    return True


def _fits_together(widths: dict[str, int], pairs: list[Pair], memory: int, copies: int) -> bool:
    return _fits(widths, pairs, memory, copies) and len(plan_passes(widths, pairs, memory, copies=copies)) == 1


def free_bytes(device: torch.device) -> int:
    """Bytes that moments may take on a device."""
    if device.type == "cuda":
        return int(SHARE * torch.cuda.mem_get_info(device)[0])
    try:
        return int(SHARE * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError):  # a system that does not say
        return 4 << 30


def sum_pairs(
    source: RowSource, pairs: Sequence[tuple[Site, Site]], split: Split, *, positions: str, control: bool, first: bool,
    products: torch.dtype, seed: int,
) -> list[PairSums]:  # fmt: skip
    """One pass over the rows: the moments of all pairs, or of each of them where attention routes each in its own way.

    The control, and positions="shuffled", pair each target with a row of another prompt of its role (train, held out) and
    kind: see `Control`.
    """
    options: dict[str, Any] = {"positions": positions, "control": control, "products": products}
    rng = np.random.default_rng(seed)
    if positions == ATTENTION:
        return _routed_sums(source, pairs, split, first, rng, **options)
    sums = _Sums(pairs, split, rng, **options)
    for rows in source.read(sorted({site for pair in pairs for site in pair})):
        pairing = "same" if positions == SHUFFLED else positions  # who gets whose source is for the control to say
        from_, to = paired_rows(pairing, rows.prompt, rows.position, rng)
        at_start = is_first(rows.position[from_]) | is_first(rows.position[to])
        if not first:
            from_, to, at_start = from_[~at_start], to[~at_start], at_start[~at_start]
        sums.add(rows, from_, to, at_start, np.where(at_start, FIRST, LATER))
    return [sums.finish()]


def _routed_sums(
    source: RowSource, pairs: Sequence[tuple[Site, Site]], split: Split, first: bool, rng: np.random.Generator,
    **options: Any,
) -> list[PairSums]:  # fmt: skip
    """The moments of each pair by itself, from one pass; with `first`, of its rows twice: see `EVERY`.

    The figures of each: the share of rows whose source is the token `itself`, or the `previous` one, the mean `distance`
    in tokens, and the mean `weight`, which is the share of the averaged attention that the source has.
    """
    spans = {pair: attention_between(*pair) for pair in pairs}
    sums = {pair: _Sums([pair], split, rng, waiting=4096 // len(pairs), **options) for pair in pairs}
    seen: dict[tuple[Site, Site], Counter[str]] = {pair: Counter() for pair in pairs}
    for rows in source.read(sorted({s for pair in pairs for s in pair}), sorted(set(spans.values()))):
        for pair, span in spans.items():
            route = rows.routes[span]
            for kind, chosen in zip((LATER, EVERY) if first else (LATER,), route.source, strict=False):
                to = np.flatnonzero((chosen >= 0) & ((kind == EVERY) | ~is_first(rows.position)))
                at_start = is_first(rows.position[chosen[to]])
                sums[pair].add(rows, chosen[to], to, at_start, np.full(len(to), kind))
                if kind == LATER:
                    seen[pair].update(routing_figures(route, to, rows.position))
    return [replace(one.finish(), routing={k: v / max(1.0, seen[pair]["rows"]) for k, v in seen[pair].items()
                                           if k != "rows"}) for pair, one in sums.items()]  # fmt: skip


class _Sums:
    """The moments of some pairs that are all paired in the same way."""

    def __init__(
        self, pairs: Sequence[tuple[Site, Site]], split: Split, rng: np.random.Generator, *, positions: str, control: bool,
        products: torch.dtype, waiting: int = 4096,
    ) -> None:  # fmt: skip
        self.split, self.pairs, self.positions = split, tuple(pairs), positions
        wanted: list[Pair] = []
        for a, b in pairs:
            wanted.append((source_name(a, positions), str(b)))
            if control:
                wanted.append((f"{a}{CONTROL}", str(b)))
        self.grouped = GroupedMoments("part", "kind", pairs=wanted, products=products, waiting=waiting)
        self.names = list(dict.fromkeys(pair[i] for i in (1, 0) for pair in wanted))
        self.sources, self.targets = (sorted({pair[i] for pair in pairs}) for i in (0, 1))
        self.pairing = "same" if positions == SHUFFLED else positions
        shuffled = {f"{s}{CONTROL}": source_name(s, self.pairing) for s in self.sources}
        self.control = Control(shuffled, rng, keep=max(16, waiting // 8)) if control or positions == SHUFFLED else None

    def add(
        self, rows: Rows, from_: Index, to: Index, at_start: NDArray[np.bool_], kind: Shaped[np.ndarray, " n"]
    ) -> None:
        """Adds the rows `to` of the targets, each with the row `from_` of the sources."""
        if not len(to):
            return
        part = self.split.part[rows.prompt[to]]
        blocks = {str(s): taken(rows.blocks[s], to) for s in self.targets}
        for s in self.sources:
            if (name := source_name(s, self.pairing)) not in blocks:
                blocks[name] = taken(rows.blocks[s], from_)
        group = 4 * (kind == EVERY) + 2 * (part >= self.split.folds) + at_start
        batch = Batch(blocks, rows.prompt[to], part, kind, group)
        self._update(batch if self.control is None else self.control.deal(batch))

    def finish(self) -> PairSums:
        """The sums of all rows, those that waited for a stranger's source among them."""
        if self.control is None:
            return PairSums(self.grouped, self.split, self.pairs)
        self._update(self.control.deal(None))
        return PairSums(self.grouped, self.split, self.pairs, own=self.control.share)

    def _update(self, batch: Batch | None) -> None:
        if batch is not None:
            blocks = {name: batch.blocks[name] for name in self.names}
            self.grouped.update(blocks, part=batch.part.tolist(), kind=batch.kind.tolist())
