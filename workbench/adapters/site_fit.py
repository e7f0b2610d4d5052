"""The low-rank fit of a difference of activations at one site, with what it explains of prompts that it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int64
from torch import Tensor

from ..errors import UserError
from ..maps import MapFit, Moments, fit_map, total
from ..maps.spectrum import constant_floor
from ..sites import Site
from .low_rank import LowRank

if TYPE_CHECKING:
    from ..store import Store

FOLDS = 5
ROWS = 4096
WITHIN = 0.01
"""of the best R2 over folds: the least rank that comes so near is taken"""


@dataclass(frozen=True)
class SiteFit:
    """How well the part at a site does on held-out prompts.

    The difference that it is fitted to is y = h_with - h, h the state that it reads: with the earlier parts acting.
    """

    site: Site
    rank: int
    """of what the part reads; a constant comes on top"""
    alpha: float | None
    """the ridge penalty, absolute; None of a constant"""
    r2: float | None
    """1 - SSE / SST about the held-out mean; None where y does not vary"""
    r2_constant: float | None
    """the same of the mean difference alone, about 0 or below"""
    explained: float
    """1 - SSE / sum |y|^2"""
    explained_constant: float
    """the same of the mean difference alone"""
    explained_whole: float
    """1 - SSE / sum |h_with - h_without|^2, no part acting in h_without"""
    rows: int
    held_out_rows: int


@dataclass(frozen=True, eq=False)
class Split:
    """The fold of each prompt, -1 where it is held out."""

    folds: Int64[Tensor, " n"]

    @classmethod
    def of(cls, n: int, holdout: float, seed: int) -> Split:
        """Raises UserError for a share that leaves too few on either side."""
        if not 0 < holdout < 1:
            raise UserError(
                f"holdout {holdout} is no share of the prompts; give a number between 0 and 1, 0.2 is usual"
            )
        count = max(1, round(holdout * n))
        if n - count < 2 * FOLDS:
            raise UserError(f"{n} prompts, of which {count} are held out, are too few to fit to; give at least "
                            f"{2 * FOLDS + max(1, round(holdout * 3 * FOLDS))}")  # fmt: skip
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        folds = torch.empty(n, dtype=torch.int64)
        folds[order] = torch.arange(n) % FOLDS
        folds[order[:count]] = -1
        return cls(folds)

    @property
    def held(self) -> list[int]:
        """The prompts that are held out."""
        return (self.folds == -1).nonzero().flatten().tolist()

    def rows(self, prompt_index: Tensor, fold: int) -> Tensor:
        """The rows of a fold."""
        return (self.folds[prompt_index] == fold).nonzero().flatten()


def fit_site(
    site: Site, before: Store, after: Store, plain: Store, split: Split, rank: int | str, max_rank: int
) -> tuple[SiteFit, LowRank] | None:
    """The part at `site` that takes the states of `before` to those of `after`; None where they are the same.

    plain: states with no part acting, for `explained_whole`. Raises UserError where the stores do not pair.
    """
    from ..store.store import check_pair

    if not (rank == "cv" or (isinstance(rank, int) and 0 <= rank <= before.width(site))):
        raise UserError(f'rank must lie in 0..{before.width(site)}, or be "cv"; got {rank!r}')
    if max_rank < 1:
        raise UserError(f"max_rank {max_rank} is out of range; give at least 1")
    check_pair(before, after)
    parts = [_moments(site, before, after, split.rows(before.prompt_index, fold)) for fold in range(FOLDS)]
    held_rows = split.rows(before.prompt_index, -1)
    held, whole = _moments(site, before, after, held_rows), total(parts)
    squares = float(held.squares("y", torch.zeros_like(held.mean("y"))).sum())
    if not squares > 0:
        return None
    constant = whole.mean("y")
    fit = _chosen(parts, whole, rank, max_rank)
    chosen, found = (0, None) if fit is None else fit
    part, error = _constant(constant), float(held.squares("y", constant).sum())
    spread = float(held.squares("y").sum())
    error_constant = error
    if found is not None and chosen:
        part = _part(found, chosen)
        curve = found.family.curve(held) if found.family is not None else None
        assert curve is not None, "a reduced rank has a family"
        error = (1 - float(curve.r2_weighted[chosen])) * spread
    at_all = sum(float((a - b).double().square().sum()) for a, b in _pairs(site, plain, after, held_rows))
    said = SiteFit(
        site, chosen, float(found.chosen["alpha_absolute"]) if found is not None and chosen else None,
        1 - error / spread if spread > 0 else None, 1 - error_constant / spread if spread > 0 else None,
        1 - error / squares, 1 - error_constant / squares, 1 - error / at_all if at_all > 0 else 0.0, whole.n, held.n,
    )  # fmt: skip
    return said, part


def _pairs(site: Site, before: Store, after: Store, rows: Tensor) -> Any:
    """(state after, state before) of the same rows, batch by batch, float32."""
    batches = (store.iter_batches(site, ROWS, rows, dtype=torch.float32) for store in (after, before))
    return zip(*batches, strict=True)


def _moments(site: Site, before: Store, after: Store, rows: Tensor) -> Moments:
    made = Moments()
    for with_it, without in _pairs(site, before, after, rows):
        made.update({"x": without, "y": with_it.double() - without.double()})
    return made


def _chosen(parts: Sequence[Moments], whole: Moments, rank: int | str, max_rank: int) -> tuple[int, MapFit] | None:
    """(rank, the family of every rank); None where a constant is all there is to fit."""
    varies = [bool((whole.squares(name) > constant_floor(whole, name)).any()) for name in ("x", "y")]
    if rank == 0 or not all(varies):
        return None
    if isinstance(rank, int):
        return rank, fit_map(parts, "reduced_rank", rank=rank, alpha="cv", dtype=torch.float64)
    found = fit_map(parts, "reduced_rank", rank="cv", alpha="cv", dtype=torch.float64)
    scores = {0: 0.0} | {int(c.options["rank"]): c.score for c in found.tried if c.options["rank"] <= max_rank}
    best = max(scores.values())
    return min(r for r, score in scores.items() if score >= best - WITHIN), found


def _constant(mean: Tensor) -> LowRank:
    return LowRank(torch.zeros(len(mean), 1), torch.ones(1), mean[None].float().contiguous())


def _part(fit: MapFit, rank: int) -> LowRank:
    """y = y_mean + (x - x_mean) L R, L [d, r] and R [r, d]."""
    family = fit.family
    assert family is not None, "a reduced rank has a family"
    left, right = family.left[:, :rank], family.right[:rank]
    read = LowRank(left.float().contiguous(), -(family.x_mean @ left).float(), right.float().contiguous())
    return read.plus(family.y_mean)
