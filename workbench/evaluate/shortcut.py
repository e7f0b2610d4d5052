"""Blocks skipped: a run of blocks replaced by one map, what it saves and what it costs.

A map from `resid_post.l` to `resid_post.(l+k)` put in at every position is the model without blocks l+1 to l+k.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UserError
from ..maps.linear_map import LinearMap
from ..models import Model
from ..progress import progress
from ..rendering import pad
from ..sites import Site
from ..work import ModelShape
from .causal import EVERYWHERE, UNTOUCHED, choose, replaced, transport
from .scoring import Run, Scores, Sequences, ratio_interval, score
from .skips import Jump, SkipMaps, check_jumps, runs_of, skipped
from .statistics import Interval

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Shortcut:
    """One set of skipped blocks: what it saves, and what it costs on the same sequences."""

    blocks: tuple[int, ...]
    saved: float
    """share of the forward pass's FLOPs that is saved, the maps' own cost taken off"""
    log_perplexity: Interval
    delta: Interval
    """log-perplexity less that of the whole model (paired over sequences)"""
    kl: Interval
    agreement: Interval
    logit_difference: float | None = None
    """largest difference between the logits of the model that skips the blocks and of the one whose states are
    replaced, over the first sequences; None where it was not asked for"""


@dataclass(frozen=True)
class ShortcutCurve:
    """Perplexity against FLOPs saved; the first point is the whole model."""

    points: tuple[Shortcut, ...]

    def __len__(self) -> int:
        return len(self.points)

    def frame(self) -> pd.DataFrame:
        """One line per set of blocks."""
        import pandas as pd

        lines = []
        for p in self.points:
            line: dict[str, Any] = {"blocks": " ".join(map(str, p.blocks)), "skipped": len(p.blocks), "saved": p.saved}
            for key in ("log_perplexity", "delta", "kl", "agreement"):
                found: Interval = getattr(p, key)
                line |= {key: found.value, f"{key}_low": found.low, f"{key}_high": found.high}
            lines.append({**line, "logit_difference": p.logit_difference})
        return pd.DataFrame(lines)


def shortcut_curve(
    model: Model,
    prompts: Any,
    operators: Mapping[Jump, LinearMap],
    *,
    verify: bool = False,
    batch_size: int = 16,
    max_length: int | None = None,
) -> ShortcutCurve:
    """Every run of blocks for which there is an operator, skipped on its own: perplexity against FLOPs saved.

    operators: maps by (l, k). The blocks are really skipped; `verify` also measures, over the first sequences, how far
    their logits are from those of the model whose states are replaced (`Shortcut.logit_difference`). Points come in the
    order of what they save. Raises UserError for operators that the model has no place for.
    """
    check_jumps(model, operators)
    maps = SkipMaps(model, operators)
    sequences = Sequences.of(model, prompts, max_length)
    sets = [frozenset(range(l + 1, l + k + 1)) for l, k in operators]
    points = _measure(maps, sequences, sets, batch_size)
    if verify:
        points = [_verified(model, sequences, point, operators) for point in points]
    return ShortcutCurve(tuple(sorted(points, key=lambda p: p.saved)))


def greedy_skips(
    model: Model,
    prompts: Any,
    operators: Mapping[Jump, LinearMap],
    *,
    budget: float,
    max_blocks: int | None = None,
    held_out: Any = None,
    batch_size: int = 16,
    max_length: int | None = None,
) -> ShortcutCurve:
    """The best set of blocks to skip, found greedily: one more block at a time, the one that costs least.

    Neighbouring skipped blocks count as one run, which needs its own operator (l, k); sets whose runs have none are not
    tried. It ends when the cheapest next block would raise log-perplexity by more than `budget` nats per token over the
    whole model, or after `max_blocks`. The sets were chosen on `prompts`: for figures free of that choice give other
    prompts as `held_out`, and the points are measured there.
    """
    check_jumps(model, operators)
    if not budget > 0:
        raise UserError(f"budget must be a positive rise of log-perplexity, in nats per token; got {budget}")
    maps = SkipMaps(model, operators)
    sequences = Sequences.of(model, prompts, max_length)
    limit = model.n_layers if max_blocks is None else max_blocks
    chosen: frozenset[int] = frozenset()
    path: list[frozenset[int]] = []
    points = _measure(maps, sequences, [], batch_size)
    with progress(total=limit, desc="skipping blocks", unit="block") as bar:
        while len(chosen) < limit:
            tried = [chosen | {b} for b in range(1, model.n_layers) if b not in chosen]
            tried = [blocks for blocks in tried if set(runs_of(blocks)) <= set(operators)]
            if not tried:
                break
            measured = _measure(maps, sequences, tried, batch_size)[1:]
            best = min(measured, key=lambda p: p.delta.value)
            if best.delta.value > budget:
                break
            chosen = frozenset(best.blocks)
            path.append(chosen)
            points.append(best)
            bar.update(1)
    if held_out is not None:
        points = _measure(maps, Sequences.of(model, held_out, max_length), path, batch_size)
    return ShortcutCurve(tuple(points))


def block_flops(model: Model, context: float) -> list[float]:
    """FLOPs per token of each block, attention over what it sees of `context` tokens; see `work.BlockShape.flops`."""
    return [block.flops(block.keys(context)) for block in ModelShape.of(model).blocks]


def saved_share(model: Model, blocks: Collection[int], context: float) -> float:
    """The share of a forward pass's FLOPs (blocks and LM head) that skipping these blocks saves, less their maps'."""
    flops = block_flops(model, context)
    head = 2.0 * ModelShape.of(model).head
    return (sum(flops[b] for b in blocks) - 2.0 * model.width**2 * len(runs_of(blocks))) / (sum(flops) + head)


def _measure(maps: SkipMaps, sequences: Sequences, sets: list[frozenset[int]], batch_size: int) -> list[Shortcut]:
    """The whole model, then each set of blocks, in the order given; each map is loaded once for all batches."""

    def run(jumps: list[Jump]) -> Run:
        return lambda *_: maps.skipped(jumps)

    model, scores = maps.model, dict[str, Scores]()
    for some in maps.groups([runs_of(blocks) for blocks in sets]) or [[]]:
        maps.hold({jump for i in some for jump in runs_of(sets[i])})
        scores |= score(model, sequences, {str(i): run(runs_of(sets[i])) for i in some}, batch_size=batch_size)
    context = float(sequences.predicted.mean()) + 1
    plain = scores[UNTOUCHED]
    every = [(frozenset[int](), plain), *((blocks, scores[str(i)]) for i, blocks in enumerate(sets))]
    return [_point(model, sequences, blocks, found, plain, context) for blocks, found in every]


def _point(
    model: Model, sequences: Sequences, blocks: frozenset[int], found: Scores, plain: Scores, context: float
) -> Shortcut:
    sums = (found.loss, found.loss - plain.loss, found.kl, found.agree)
    loss, delta, kl, agree = (ratio_interval(part, sequences.predicted) for part in sums)
    return Shortcut(tuple(sorted(blocks)), saved_share(model, blocks, context), loss, delta, kl, agree)


def _verified(
    model: Model, sequences: Sequences, point: Shortcut, operators: Mapping[Jump, LinearMap], first: int = 4
) -> Shortcut:
    """The point with the largest difference of logits between skipping its one run and replacing the states after it."""
    if not point.blocks:
        return replace(point, logit_difference=0.0)
    ((l, k),) = runs_of(point.blocks)
    few = Sequences(sequences.ids[:first], starts=sequences.starts[:first], origin=sequences.origin[:first])
    ids, mask = pad(few.ids, model.pad_id, "right")
    keep = torch.zeros(ids.shape, dtype=torch.bool)
    for row, positions in enumerate(choose(model, few, EVERYWHERE)):
        keep[row, positions] = True
    operator = operators[l, k]
    with torch.inference_mode():
        with skipped(model, {(l, k): operator}):
            mine = model.logits(ids, mask).float()
        with replaced(model, Site(l), Site(l + k), transport(operator, model), keep):
            theirs = model.logits(ids, mask).float()
    real = mask.bool().to(mine.device)
    return replace(point, logit_difference=float((mine - theirs)[real].abs().max()))
