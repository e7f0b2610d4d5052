"""Which pairs of sites a transport is fitted between, and how each is fitted and scored from moments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..maps.baselines import BASELINES, baseline
from ..maps.jackknife import Estimate
from ..maps.linear_map import LinearMap
from ..maps.moments import Moments, total
from ..maps.ridge import Choice, iter_ridge_targets
from ..maps.row_counts import check_counts
from ..maps.shard_scores import ShardScores
from ..maps.whitening import Whitener
from ..sites import Site, depth
from .sums import CONTROL, PairSums, source_name

OPERATOR, SHUFFLED = "ridge", "shuffled"
SitePair = tuple[Site, Site]


def site_pairs(sites: Sequence[Site]) -> list[SitePair]:
    """Every pair of sites of which the first comes before the second, ordered by source.

    >>> [(str(a), str(b)) for a, b in site_pairs([Site(1), Site(0)])]
    [('resid_post.0', 'resid_post.1')]
    """
    ordered = sorted(set(sites), key=depth)
    return [(a, b) for a in ordered for b in ordered if depth(a) < depth(b)]


def check_pairs(pairs: Sequence[SitePair]) -> list[SitePair]:
    """The pairs once each, ordered by source; UserError for none, or where a source is not before its target."""
    if not pairs:
        raise UserError("no pairs of sites to fit; give at least two sites, the source before the target")
    for a, b in pairs:
        if not depth(a) < depth(b):
            raise UserError(f"{a} is not before {b}: the source of a transport comes before its target")
    return sorted(set(pairs), key=lambda pair: (depth(pair[0]), depth(pair[1])))


@dataclass(frozen=True)
class Options:
    """How a pair is fitted."""

    alpha: Choice
    alphas: tuple[float, ...]
    absolute: bool
    baselines: tuple[str, ...]
    control: bool
    positions: str

    def __post_init__(self) -> None:
        unknown = sorted(set(self.baselines) - set(BASELINES))
        if unknown:
            raise UserError(f"unknown baseline {unknown[0]!r}; allowed: {', '.join(BASELINES)}")


def moment_sets(folds: int, shards: int, *, first: bool) -> int:
    """Sets of moments that are held at once while pairs are fitted: what `plan_sums` counts memory in.

    Each part with and, with `first`, without position 0, and then the sum of both; four more are a training set, what it
    was taken from, and the whole of the parts.

    >>> moment_sets(5, 10, first=False), moment_sets(5, 10, first=True)
    (19, 49)
    """
    return (folds + shards) * (1 + 2 * first) + 4


@dataclass(frozen=True, eq=False)
class FittedArm:
    """One map of one pair and how it scores."""

    pair: SitePair
    arm: str
    map: LinearMap
    overall: Estimate
    """R2 uniform, weighted, whitened, [3]"""
    per_output: Estimate
    alpha: float | None
    alpha_absolute: float | None
    n_train: int
    n_held_out: int
    notes: tuple[str, ...]


def fit_pairs(sums: PairSums, pairs: Sequence[SitePair], options: Options, *, first: bool) -> Iterator[FittedArm]:
    """Fits every pair on the folds and scores it on the shards; sources one after the other."""
    parts, shards = sums.parts(first=first)
    if len(parts) < 2 or len(shards) < 2:
        raise UserError(f"only {len(parts)} folds and {len(shards)} shards of held-out prompts hold rows; at least 2 of "
                        "each are needed: give more prompts")  # fmt: skip
    precisions: dict[str, Tensor] = {}
    for source in dict.fromkeys(a for a, _ in pairs):
        targets = [b for a, b in pairs if a == source]
        arms = {OPERATOR: source_name(source, options.positions)}
        if options.control:
            arms[SHUFFLED] = f"{source}{CONTROL}"
        for arm, block in arms.items():
            yield from _fit_source(source, targets, arm, block, parts, shards, precisions, options)


def _fit_source(
    source: Site, targets: list[Site], arm: str, block: str, parts: list[Moments], shards: list[Moments],
    precisions: dict[str, Tensor], options: Options,
) -> Iterator[FittedArm]:  # fmt: skip
    names = [str(t) for t in targets]
    chosen = [part.select([(block, name) for name in names]) for part in parts]
    whole = total(chosen)
    notes = {
        name: check_counts(whole, block, name, penalised=options.alpha != 0, method="a transport") for name in names
    }
    fits = iter_ridge_targets(chosen, block, names, alpha=options.alpha, alphas=options.alphas,
                              absolute=options.absolute, dtype=torch.float64)  # fmt: skip
    n_held = sum(shard.n for shard in shards)
    for target, (name, fit) in zip(targets, fits, strict=True):
        if name not in precisions:
            inverse = Whitener.of_block(whole, name).inverse_root
            precisions[name] = inverse @ inverse
        score: dict[str, Any] = {"train": whole, "precision": precisions[name]}
        maps: dict[str, LinearMap] = {arm: fit.map}
        if arm == OPERATOR:
            maps |= {b: baseline(whole, b, block, name) for b in options.baselines if _applies(b, whole, block, name)}
        for one, fitted in maps.items():
            scores = ShardScores.of(fitted, shards, block, name, **score)
            ridge = fit if one == arm else None
            yield FittedArm(
                (source, target), one, fitted, scores.overall, scores.per_output,
                None if ridge is None else ridge.alpha, None if ridge is None else ridge.alpha_absolute, whole.n, n_held,
                notes[name] if ridge is not None else (),
            )  # fmt: skip


def _applies(name: str, train: Moments, source: str, target: str) -> bool:
    return train.width(source) == train.width(target) or name in ("mean", "procrustes")
