"""The control of a transport: each row with the source of another prompt, in which nothing can be carried."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from .positions import Index, shuffled_rows

MOST = 65_536
"""rows of a group's first prompt that wait for another prompt's before they are dealt among themselves"""

OWN = 0.01
"""share of the rows with a source of their own prompt from which the control is no control"""


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of targets and sources side by side, with what each is told apart by."""

    blocks: dict[str, Tensor]
    """[n, d] by name"""
    prompt: Index
    part: Index
    kind: Shaped[np.ndarray, " n"]
    group: Index
    """of each row: rows of one group (role and kind) lend one another their sources in the control"""

    def __len__(self) -> int:
        return len(self.prompt)

    def take(self, rows: Index) -> Batch:
        blocks = {name: taken(h, rows) for name, h in self.blocks.items()}
        return Batch(blocks, self.prompt[rows], self.part[rows], self.kind[rows], self.group[rows])

    def __add__(self, other: Batch) -> Batch:
        blocks = {name: torch.cat([h, other.blocks[name]]) for name, h in self.blocks.items()}
        pairs = ((getattr(self, key), getattr(other, key)) for key in ("prompt", "part", "kind", "group"))
        return Batch(blocks, *(np.concatenate(pair) for pair in pairs))


class Control:
    """Gives each row, under other names, the source of a row of another prompt of its group.

    Rows of one batch exchange their sources, each taken once. Where one prompt has more than half of a group's rows in a
    batch (prompts as long as a batch, or the last few rows) they draw, evenly, from what the other prompts have there and
    from rows that were kept of earlier ones: half of these are replaced by each batch. Rows of a group's first prompt
    wait for its second, up to `most` of them. So a row keeps its own prompt only where its group has no other, or not for
    that long: `own` counts them.

    Args:
        names: of the blocks that are made: which source each shuffles.
        rng: of the exchange; what is kept has a stream of its own.
        keep: rows of each group that are kept for later batches.
        most: rows of a group's first prompt that may wait.

    >>> rows = {"x": torch.arange(3.0)[:, None]}, np.zeros(3, dtype=np.int64), np.zeros(3, dtype=np.int64)
    >>> first, second = (Batch(rows[0], rows[1] + i, rows[1], np.full(3, "later"), rows[2]) for i in (0, 1))
    >>> control = Control({"other": "x"}, np.random.default_rng(0))
    >>> control.deal(first), len(control.deal(second)), control.share
    (None, 6, 0.0)
    """

    def __init__(
        self, names: Mapping[str, str], rng: np.random.Generator, *, keep: int = 512, most: int = MOST
    ) -> None:
        self.names, self.keep, self.most = dict(names), keep, most
        self.rows = self.own = 0
        self._rng, (self._other_rng,) = rng, rng.spawn(1)
        self._kept: dict[int, tuple[Index, dict[str, Tensor]]] = {}
        self._late: Batch | None = None

    @property
    def share(self) -> float:
        """Of the rows so far, those that kept their own prompt."""
        return self.own / max(1, self.rows)

    def deal(self, batch: Batch | None) -> Batch | None:
        """The rows that another prompt's sources were found for, with these; those of earlier batches that waited too.

        None for a batch ends it: what still waits gets sources of its own prompt. None is returned where no row is ready.
        """
        last, waited = batch is None, self._late
        self._late = None
        batch = waited if batch is None else batch if waited is None else waited + batch
        if batch is None:
            return None
        found = np.full(len(batch), -1, dtype=np.int64)
        origin, pools = [batch.prompt], list[dict[str, Tensor]]()
        for group in np.unique(batch.group).tolist():
            mine = np.flatnonzero(batch.group == group)
            prompt = batch.prompt[mine]
            if 2 * np.unique(prompt, return_counts=True)[1].max() <= len(mine):
                found[mine] = mine[shuffled_rows(prompt, self._rng)]
                continue
            kept, blocks = self._kept.get(group, (np.empty(0, dtype=np.int64), {}))
            places = np.concatenate([mine, sum(map(len, origin)) + np.arange(len(kept))])
            prompts = np.concatenate([prompt, kept])
            if (prompts == prompts[0]).all():
                if last or len(mine) > self.most:
                    found[mine] = mine[shuffled_rows(prompt, self._rng)]
                continue
            found[mine] = places[_strangers(prompt, prompts, self._other_rng)]
            if len(kept):
                origin.append(kept)
                pools.append(blocks)
        made = {name: taken(torch.cat([batch.blocks[source], *(pool[source] for pool in pools)])
                            if pools else batch.blocks[source], found[found >= 0])
                for name, source in self.names.items()}  # fmt: skip
        ready, late = np.flatnonzero(found >= 0), np.flatnonzero(found < 0)
        dealt = batch.take(ready)
        self._late = batch.take(late) if len(late) else None
        self.rows += len(dealt)
        self.own += int((np.concatenate(origin)[found[ready]] == dealt.prompt).sum())
        for group in np.unique(dealt.group).tolist():
            self._keep(group, dealt)
        return Batch(dealt.blocks | made, dealt.prompt, dealt.part, dealt.kind, dealt.group) if len(dealt) else None

    def _keep(self, group: int, batch: Batch) -> None:
        """Puts rows of a batch in the place of half of those that were kept."""
        mine, rng = np.flatnonzero(batch.group == group), self._other_rng
        prompt, blocks = self._kept.get(group, (np.empty(0, dtype=np.int64), {}))
        some = rng.choice(mine, min(len(mine), max(self.keep // 2, self.keep - len(prompt))), replace=False)
        stay = rng.choice(len(prompt), min(len(prompt), self.keep - len(some)), replace=False)
        sources = {name: taken(batch.blocks[name], some) for name in self.names.values()}
        if len(stay):
            sources = {name: torch.cat([taken(blocks[name], stay), h]) for name, h in sources.items()}
        self._kept[group] = np.concatenate([prompt[stay], batch.prompt[some]]), sources


def control_notes(share: float) -> list[str]:
    """A warning where the share of rows that kept their own prompt is not negligible."""
    if share <= OWN:
        return []
    return [f"the shuffled sources of {100 * share:.1f} % of the rows are of their own prompt, as no other prompt has rows of "
            "their kind: the control is no chance level; give more prompts"]  # fmt: skip


def taken(h: Tensor, rows: Index) -> Tensor:
    """h[rows]; h itself where these are all of its rows, in order."""
    if len(rows) == len(h) and bool((rows == np.arange(len(h))).all()):
        return h
    return h.index_select(0, torch.from_numpy(rows).to(h.device))


def _strangers(prompt: Index, prompts: Index, rng: np.random.Generator) -> Index:
    """For each row of `prompt` the number of one of `prompts` that is another, all of them used evenly."""
    found = np.empty(len(prompt), dtype=np.int64)
    for one in np.unique(prompt):
        mine, others = np.flatnonzero(prompt == one), np.flatnonzero(prompts != one)
        found[mine] = rng.permutation(np.resize(rng.permutation(others), len(mine)))
    return found
