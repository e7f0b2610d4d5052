"""Inner products of the moments of shards, for all pairs of layers at once: CKA, with and without its bias, of any of them.

With rows x_i of one layer and y_i of another, about fixed points, and shards g, h of the rows,

    T[g, h] = <X_g' Y_g, X_h' Y_h> = sum over i in g, j in h of <x_i, x_j> <y_i, y_j>

so that it is made of moments [d, d] or of Gram matrices [n, n], whichever is less work: 64 layers that are 4,096 wide and
4,096 rows are 1.4e14 FLOPs by moments for all 32 x 32 pairs, and 9e12 by Gram matrices. HSIC of all rows, and without any
shard, are sums of T and of a few sums by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .symmetric import gram

GRAM_BYTES = 6 << 30
"""of the Gram matrices that may be held: in float64 where there is room, else in float32, which costs about 1e-6 of a CKA"""
TILE = 256
"""rows of a Gram matrix that are multiplied at a time"""


@runtime_checkable
class Layers(Protocol):
    """Layers whose rows answer to one another, read one at a time."""

    @property
    def widths(self) -> Sequence[int]:
        """Columns of each."""
        ...

    def __len__(self) -> int: ...

    def centred(self, i: int) -> Float[Tensor, "n d"]:
        """The rows of layer i about their mean, float64."""
        ...


@dataclass(frozen=True, eq=False)
class ShardProducts:
    """T and the sums by row of a layers on one side and b on the other; rows of a shard lie together.

    Args:
        rows: of each of the k shards.
        cross: T of each pair, [a, b, k, k]; left, right: of each layer with itself, [a, k, k] and [b, k, k].
        sides: for each row the inner products with the k sums of shards, and its squared length, [a, n, k + 1] and
            [b, n, k + 1].
    """

    rows: tuple[int, ...]
    cross: Float[Tensor, "a b k k"]
    left: Float[Tensor, "a k k"]
    right: Float[Tensor, "b k k"]
    sides: tuple[Float[Tensor, "a n k1"], Float[Tensor, "b n k1"]]

    @classmethod
    def of(cls, left: Layers, right: Layers, rows: Sequence[int], grams: Grams | None = None) -> ShardProducts:
        """Reads every layer about once (by moments: the right ones once for each of the left).

        rows: of each shard, in the order of the rows; one shard holds all where no error is wanted.
        grams: the Gram matrices of both sides, where they are at hand.
        """
        starts = [sum(rows[:g]) for g in range(len(rows) + 1)]
        spans = [slice(*ends) for ends in pairwise(starts)]
        sides = tuple(
            torch.stack([_by_row(side.centred(i), spans) for i in range(len(side))]) for side in (left, right)
        )
        if grams is not None:
            cross, own = grams.products(spans)
        else:
            cross, own = _by_moments(left, right, spans)
        return cls(tuple(rows), cross, *own, (sides[0], sides[1]))

    def cka(self, without: int | None = None, *, debiased: bool = False) -> Float[Tensor, "a b"]:
        """CKA of every pair, of all rows or without one shard; not a number where a layer is constant.

        Source: arXiv:1905.00414, eq. 4; debiased: HSIC of Song et al. 2012.
        """
        kept = torch.ones(len(self.rows), dtype=torch.float64)
        if without is not None:
            kept[without] = 0
        kept = kept.to(self.cross)
        a, b = self._totals
        hsic = self._hsic(self.cross, self._mixed[0], a[:, None], b[None], kept, debiased)
        return _ratio(hsic, *self._own(kept, debiased))

    def shuffled(self, products: Float[Tensor, "a b"], order: Int[Tensor, " n"], *, debiased: bool = False) -> Tensor:
        """CKA of every pair where row i of the left meets row order[i] of the right, [a, b].

        products: ||X' Y[order]||^2 of each pair, as `shuffled_products` makes them.
        """
        lengths = [side[..., -1] for side in self.sides]
        mixed = torch.zeros(*products.shape, 1, 2, 2).to(products)
        mixed[..., 0, 1, 1] = lengths[0] @ lengths[1][:, order].T
        # of one shard of all rows, whose sum is zero
        a, b = (torch.stack([torch.zeros_like(x[:, :1]), x.sum(1, keepdim=True)], -1) for x in lengths)
        one = torch.ones(1).to(products)
        hsic = _hsic(products[..., None, None], mixed, a[:, None], b[None], sum(self.rows) * one, one, debiased)
        return _ratio(hsic, *self._own(torch.ones(len(self.rows)).to(products), debiased))

    def _own(self, kept: Tensor, debiased: bool) -> list[Tensor]:
        """HSIC of each layer with itself, [a] and [b]."""
        sides = zip((self.left, self.right), self._mixed[1:], self._totals, strict=True)
        return [self._hsic(t, mixed, sums, sums, kept, debiased) for t, mixed, sums in sides]

    def _hsic(self, t: Tensor, mixed: Tensor, a: Tensor, b: Tensor, kept: Tensor, debiased: bool) -> Tensor:
        return _hsic(t, mixed, a, b, torch.tensor(self.rows).to(kept), kept, debiased)

    @cached_property
    def _totals(self) -> tuple[Tensor, Tensor]:
        """The sums by row, summed over each shard, [a, k, k + 1] and [b, k, k + 1]."""
        a, b = (torch.stack([part.sum(1) for part in side.split(self.rows, 1)], 1) for side in self.sides)
        return a, b

    @cached_property
    def _mixed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Their products, summed over each shard: of pairs [a, b, k, k + 1, k + 1], and of each layer with itself."""
        a, b = ([*side.split(self.rows, 1)] for side in self.sides)
        cross = torch.stack([torch.einsum("aip,biq->abpq", x, y) for x, y in zip(a, b, strict=True)], 2)
        own = [torch.stack([torch.einsum("aip,aiq->apq", x, x) for x in side], 1) for side in (a, b)]
        return cross, own[0], own[1]


class Grams:
    """The Gram matrices of all layers of both sides."""

    def __init__(self, left: Layers, right: Layers) -> None:
        n = len(left.centred(0))
        fits = 8 * (len(left) + len(right)) * n * n <= GRAM_BYTES
        dtype = torch.float64 if fits else torch.float32
        self.left, self.right = (_gram_matrices(side, dtype) for side in (left, right))

    @staticmethod
    def pays(left: Layers, right: Layers, n: int) -> bool:
        """Whether they are less work than moments, and there is room for them."""
        by_gram, by_moments = product_flops(left, right, n)
        return by_gram < by_moments and 4 * (len(left) + len(right)) * n * n <= GRAM_BYTES

    def products(self, spans: Sequence[slice]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """T of every pair, and of each layer with itself."""
        k, (a, b) = len(spans), (self.left, self.right)
        cross = torch.zeros(len(a), len(b), k, k, dtype=torch.float64, device=a.device)
        own = [torch.zeros(len(side), k, k, dtype=torch.float64, device=a.device) for side in (a, b)]
        for g, rows in enumerate(spans):
            for h, columns in enumerate(spans[: g + 1]):
                x, y = (side[:, rows, columns].flatten(1).double() for side in (a, b))
                cross[:, :, g, h] = cross[:, :, h, g] = x @ y.T
                for table, one in zip(own, (x, y), strict=True):
                    table[:, g, h] = table[:, h, g] = one.square().sum(1)
        return cross, (own[0], own[1])

    def shuffled(self, order: Int[Tensor, " n"]) -> Float[Tensor, "a b"]:
        """||X' Y[order]||^2 of every pair."""
        total = torch.zeros(len(self.left), len(self.right), dtype=torch.float64, device=self.left.device)
        order = order.to(self.left.device)
        for some in torch.arange(len(order)).split(TILE):
            x = self.left[:, some].flatten(1).double()
            y = self.right[:, order[some]][:, :, order].flatten(1).double()
            total += x @ y.T
        return total


def shuffled_products(
    left: Layers, right: Layers, order: Int[Tensor, " n"], grams: Grams | None
) -> Float[Tensor, "a b"]:
    """||X' Y[order]||^2 of every pair: what `ShardProducts.shuffled` takes."""
    if grams is not None:
        return grams.shuffled(order)
    lines = []
    for i in range(len(left)):
        x = left.centred(i)
        lines.append(
            torch.stack([(x.T @ right.centred(j)[order.to(x.device)]).square().sum() for j in range(len(right))])
        )
    return torch.stack(lines)


def product_flops(left: Layers, right: Layers, n: int) -> tuple[float, float]:
    """FLOPs of the products of all pairs: by Gram matrices, and by moments."""
    by_gram = 2.0 * n * n * (sum(left.widths) + sum(right.widths)) + 2.0 * n * n * len(left) * len(right)
    by_moments = 2.0 * n * (sum(left.widths) * sum(right.widths) + sum(d * d for s in (left, right) for d in s.widths))
    return by_gram, by_moments


def _hsic(t: Tensor, mixed: Tensor, a: Tensor, b: Tensor, rows: Tensor, kept: Tensor, debiased: bool) -> Tensor:
    """HSIC of the rows in the shards that are kept (a weight of 1 each), times (n - 1)^2, or n (n - 3) where debiased.

    t: T. mixed: sums over each shard of products of the sums by row. a, b: those sums, over each shard.
    """
    n = float(rows @ kept)
    sums = torch.cat([kept, kept.new_zeros(1)])  # of the inner products with the shards' sums, those of what is kept
    whole = torch.einsum("...gh,g,h->...", t, kept, kept)
    m = torch.einsum("...gpq,g->...pq", mixed, kept)
    both = torch.einsum("...pq,p,q->...", m, sums, sums)  # 1' K L 1
    a, b = (torch.einsum("...gp,g->...p", one, kept) for one in (a, b))
    total_a, total_b = a @ sums, b @ sums  # 1' K 1 and 1' L 1
    if not debiased:
        return whole - 2 / n * both + total_a * total_b / n**2
    # the same of K and L without their diagonals
    diagonal = m[..., -1, -1]
    both = both - m[..., -1, :] @ sums - m[..., :, -1] @ sums + diagonal
    total_a, total_b = total_a - a[..., -1], total_b - b[..., -1]
    return whole - diagonal - 2 / (n - 2) * both + total_a * total_b / ((n - 1) * (n - 2))


def _ratio(hsic: Tensor, a: Tensor, b: Tensor) -> Tensor:
    scale = a[:, None] * b[None]
    return torch.where((a[:, None] > 0) & (b[None] > 0), hsic / scale.clamp_min(1e-300).sqrt(), torch.nan)


def _by_row(x: Float[Tensor, "n d"], spans: Sequence[slice]) -> Float[Tensor, "n k1"]:
    sums = torch.stack([x[span].sum(0) for span in spans])
    return torch.cat([x @ sums.T, x.square().sum(1, keepdim=True)], 1)


def _by_moments(left: Layers, right: Layers, spans: Sequence[slice]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    def products(x: Tensor, y: Tensor) -> Tensor:
        made = torch.stack([(x[span].T @ y[span]).flatten() for span in spans])
        return made @ made.T

    lines, own = [], []
    for i in range(len(left)):
        x = left.centred(i)
        own.append(products(x, x))
        lines.append(torch.stack([products(x, right.centred(j)) for j in range(len(right))]))
    others = (right.centred(j) for j in range(len(right)))
    return torch.stack(lines), (torch.stack(own), torch.stack([products(y, y) for y in others]))


def _gram_matrices(side: Layers, dtype: torch.dtype) -> Float[Tensor, "l n n"]:
    first = side.centred(0)
    held = torch.empty(len(side), len(first), len(first), dtype=dtype, device=first.device)
    for i in range(len(side)):
        held[i] = gram(side.centred(i).T)
    return held
