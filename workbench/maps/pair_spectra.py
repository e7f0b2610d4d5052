"""SVCCA, PWCCA and Procrustes similarity of all pairs of layers: an SVD for each pair, an eigendecomposition for each layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .counts import eigh_flops, product_flops, svd_flops
from .shard_products import Layers
from .similarity import Side, procrustes_between, pwcca_between, svcca_between
from .symmetric import gram

BETWEEN = {"svcca": svcca_between, "pwcca": pwcca_between, "procrustes": procrustes_between}


class PairSpectra:
    """Layers of two sides, factorised once; rows of the right may then meet those of the left in any order.

    Args:
        left, right: the layers; every one is read once here, and each pair again for its cross products.
        measures: of `BETWEEN`.
        kept: the rows that count; all unless given.
        variance: of the directions of SVCCA.
    """

    def __init__(
        self, left: Layers, right: Layers, measures: Sequence[str], *, kept: Int[Tensor, " m"] | None = None,
        variance: float = 0.99,
    ) -> None:  # fmt: skip
        self.layers, self.measures, self.kept, self.variance = (left, right), tuple(measures), kept, variance
        self.sides = [[self._side(side, i) for i in range(len(side))] for side in self.layers]

    def scores(self, order: Int[Tensor, " m"] | None = None) -> Float[Tensor, "k a b"]:
        """Each measure of every pair, [measure, a, b]; row i of the left meets row order[i] of the right (its own unless
        given). Not a number where a layer is constant, or PWCCA has too few rows."""
        left, right = self.sides
        found = torch.full((len(self.measures), len(left), len(right)), torch.nan, dtype=torch.float64)
        for i, a in enumerate(left):
            x = self._rows(self.layers[0], i)
            for j, b in enumerate(right):
                if not (bool(a.trace > 0) and bool(b.trace > 0)):
                    continue
                y = self._rows(self.layers[1], j)
                cross = x.T @ (y if order is None else y[order.to(y.device)])
                for m, name in enumerate(self.measures):
                    if name != "pwcca" or a.n - 1 > a.white.shape[1] + b.white.shape[1]:
                        found[m, i, j] = BETWEEN[name](a, cross, b)
        return found

    def _side(self, side: Layers, i: int) -> Side:
        x = self._rows(side, i)
        return Side(f"layer {i}", gram(x), len(x), variance=self.variance)

    def _rows(self, side: Layers, i: int) -> Float[Tensor, "m d"]:
        x = side.centred(i)
        if self.kept is None:
            return x
        x = x[self.kept.to(x.device)]
        return x - x.mean(0)


def spectra_flops(left: Layers, right: Layers, n: int, measures: Sequence[str]) -> tuple[float, float]:
    """FLOPs of what is done once for each layer, and of what is done for every pair and every order of the rows.

    About 9 d^3 for the eigenvectors of a layer, 2 n d^2 for the products of a pair and 20 d^3 for each SVD: of layers that are
    4,096 wide and 4,096 rows, 1.4e12 a pair and measure.
    """
    layers = sum(product_flops(d, n, d) + eigh_flops(d) for side in (left, right) for d in side.widths)
    pairs = sum(product_flops(d, n, e) + len(measures) * svd_flops(d, e) for d in left.widths for e in right.widths)
    return layers, pairs
