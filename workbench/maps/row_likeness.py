"""Likeness that needs the rows themselves: representational similarity (RSA) and mutual nearest neighbours.

Both look at the cosines between rows about their mean, which no rotation and no scale changes, and only at rows of different
groups (prompts): that tokens of one prompt lie together is no likeness of two models.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import UserError


def cosines(gram: Float[Tensor, "n n"], kept: Int[Tensor, " m"] | None = None) -> Float[Tensor, "m m"]:
    """Cosines between some rows (all unless given) about their mean, from the inner products of all about any point; 0 for
    a row that is the mean.

    >>> x = torch.tensor([[0.0, 1.0], [0.0, -1.0]])
    >>> cosines(x @ x.T).tolist()
    [[1.0, -1.0], [-1.0, 1.0]]
    """
    part = gram if kept is None else gram[kept][:, kept]
    part = part - part.mean(0) - part.mean(1, keepdim=True) + part.mean()
    size = part.diagonal().clamp_min(0).sqrt()
    size = torch.where(size > 1e-7 * size.max(), size, torch.inf)
    return part / size[:, None] / size


class Dissimilarities:
    """Ranks of the dissimilarities 1 - cosine of the rows of l layers, over the pairs of rows of different groups.

    Args:
        tables: cosines of each layer, [l, n, n].
        group: the group of each row.

    Source: Kriegeskorte, Mur and Bandettini 2008, with Spearman's correlation.
    """

    def __init__(self, tables: Float[Tensor, "l n n"], group: Int[Tensor, " n"]) -> None:
        from scipy.stats import rankdata

        self.pairs = _counted(group)
        above = self.pairs.triu()
        if int(above.sum()) < 3:
            raise UserError("RSA needs at least 3 pairs of rows of different prompts; give more prompts")
        self.above = above
        ranks = torch.zeros(*tables.shape, dtype=torch.float32)
        for table, made in zip(tables, ranks, strict=True):
            found = torch.from_numpy(rankdata(-table[above].cpu().numpy()))
            found = found - found.mean()
            made[above] = (found / found.norm().clamp_min(1e-300)).float()
        self.ranks = ranks + ranks.transpose(1, 2)

    def correlations(self, other: Dissimilarities, order: Int[Tensor, " n"] | None = None) -> Float[Tensor, "l m"]:
        """Spearman's correlation of every layer's dissimilarities with every other's, whose rows come in an order that
        keeps groups together."""
        mine = self.ranks[:, self.above].double()
        theirs = other.ranks if order is None else other.ranks[:, order][:, :, order]
        return mine @ theirs[:, self.above].double().T


class NearestRows:
    """The k nearest rows of other groups of each row, by cosine, in l layers.

    Args:
        tables: cosines of each layer, [l, n, n].
        group: the group of each row.

    Raises UserError where a row has fewer than k rows of other groups.

    Source: the mutual nearest-neighbour metric of arXiv:2405.07987 (Huh, Cheung, Wang, Isola).
    """

    def __init__(self, tables: Float[Tensor, "l n n"], group: Int[Tensor, " n"], k: int = 10) -> None:
        allowed = _counted(group)
        most = int(allowed.sum(1).min())
        if not 1 <= k <= most:
            raise UserError(f"k must lie in 1..{most} (rows of other prompts); got {k}")
        self.k, self.members = k, torch.zeros(tables.shape, dtype=torch.bool)
        for table, made in zip(tables, self.members, strict=True):
            near = table.cpu().masked_fill(~allowed, -torch.inf).topk(k, 1).indices
            made.scatter_(1, near, True)

    def overlap(self, other: NearestRows, order: Int[Tensor, " n"] | None = None) -> Float[Tensor, "l m"]:
        """The mean share of the k nearest rows that two layers have in common, for every pair of layers."""
        theirs = other.members if order is None else other.members[:, order][:, :, order]
        mine, both = self.members.flatten(1).float(), theirs.flatten(1).float()
        return (mine @ both.T).double() / (self.members.shape[1] * self.k)


def _counted(group: Int[Tensor, " n"]) -> Bool[Tensor, "n n"]:
    return group[:, None] != group[None]
