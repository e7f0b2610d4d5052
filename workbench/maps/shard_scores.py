"""R2 of one map on held-out rows with intervals: sums of errors by shard of prompts, from moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from .jackknife import Estimate, jackknife
from .linear_map import LinearMap
from .moments import Moments, total
from .scores import live_squares
from .spectrum import constant_floor
from .symmetric import quadratic_diagonal, symmetric_product

ROUNDING = 1e-13
"""a variance below this share of the squares that it is left of is rounding"""


@dataclass(frozen=True, eq=False)
class ShardScores:
    """What the R2 of a map on some rows is made of, shard by shard; see `scores` for the definitions.

    The intervals are of the score of this map on further prompts: the map itself stays as it was fitted.
    """

    n: tuple[int, ...]
    sse: Float[Tensor, "s d"]
    """sum of squared errors"""
    first: Float[Tensor, "s d"]
    """sum of y less its training mean"""
    second: Float[Tensor, "s d"]
    """sum of squares of the same"""
    live: Float[Tensor, " d"]
    """1 where an output varies in these rows, else 0"""
    floor: Float[Tensor, "s d"]
    """what of the sums of squares may be rounding"""
    white: Float[Tensor, "s 2"] | None
    """||(Y - Y_hat) K||^2 and ||(Y - m) K||^2 with K and m of the training rows"""

    @classmethod
    def of(
        cls,
        fitted: LinearMap,
        shards: Sequence[Moments],
        source: str,
        target: str,
        *,
        train: Moments,
        precision: Float[Tensor, "d d"] | None = None,
    ) -> ShardScores:
        """One product per shard, of which half is needed; none for a map that only scales.

        Args:
            fitted: y = x @ W + b; shards: moments of disjoint sets of rows, at least two of them with rows.
            train: moments of the training rows, whose means sums are taken about.
            precision: K^2, the inverse covariance of the target over the training rows; None: no whitened R2.

        Raises:
            UserError: fewer than two shards with rows, or a target that never varies in them.
        """
        filled = [shard for shard in shards if shard.n]
        if len(filled) < 2:
            raise UserError(f"intervals need at least 2 shards of held-out rows; got {len(filled)}: give more prompts")
        x_mean, y_mean = train.mean(source), train.mean(target)
        weight = fitted.weight.to(x_mean)
        offset = fitted.bias.to(y_mean) + x_mean @ weight - y_mean  # what is added to (x - x_mean) W
        scale = _scale(weight)
        turned = image = None  # W P and W P W^T, of which the whitened error is made by sums alone
        if precision is not None:
            turned = weight @ precision if scale is None else scale * precision
            image = symmetric_product(turned, weight.T) if scale is None else scale**2 * precision
        sse, first, second, white = [], [], [], []
        for shard in filled:
            sxy, sxx = shard.about(source, target, x_mean, y_mean), shard.about(source, source, x_mean, x_mean)
            sum_y = shard.n * (shard.mean(target) - y_mean)
            gap = sum_y - shard.n * (shard.mean(source) - x_mean) @ weight
            squares = shard.squares(target, y_mean)
            carried = quadratic_diagonal(sxx, weight) if scale is None else scale**2 * sxx.diagonal()
            error = squares - 2 * (weight * sxy).sum(0) + carried
            sse.append(error - 2 * gap * offset + shard.n * offset.square())
            first.append(sum_y)
            second.append(squares)
            if precision is not None and turned is not None and image is not None:
                around = (shard.about(target, target, y_mean, y_mean) * precision).sum()
                error = around - 2 * (turned * sxy).sum() + (image * sxx).sum()
                pull = offset @ precision
                white.append(torch.stack([error - 2 * gap @ pull + shard.n * offset @ pull, around]))
        pair = [shard.select([(source, target)]) for shard in filled]
        live = (live_squares(total(pair), target) > 0).double()
        if not bool(live.any()):
            raise UserError(f"{target} is constant in the rows to score, so no R2 is defined")
        tables = [torch.stack(part).cpu() for part in (sse, first, second)]
        return cls(
            tuple(shard.n for shard in filled), tables[0].clamp_min(0), tables[1], tables[2], live.cpu(),
            torch.stack([constant_floor(shard, target) for shard in filled]).cpu(),
            torch.stack(white).cpu() if white else None,
        )  # fmt: skip

    @property
    def overall(self) -> Estimate:
        """R2 uniform, weighted and whitened, [3]; the last NaN where no precision was given."""
        return self._estimate(self._overall)

    @property
    def per_output(self) -> Estimate:
        """1 - SSE_j / SST_j, [d]; NaN where an output never varies."""
        return self._estimate(self._outputs)

    def _estimate(self, figures: object) -> Estimate:
        assert callable(figures)
        every = torch.ones(len(self.n), dtype=torch.float64)
        left = [figures(every - torch.eye(len(self.n), dtype=torch.float64)[i]) for i in range(len(self.n))]
        return jackknife(figures(every), torch.stack(left), self.n)

    def _sums(self, keep: Tensor) -> tuple[Tensor, Tensor]:
        """(SSE_j, SST_j) over the shards that are kept; SST_j is 0 where an output never varies."""
        n = (keep * torch.tensor(self.n, dtype=torch.float64)).sum()
        sse, first, second = (keep @ part for part in (self.sse, self.first, self.second))
        sst = second - first.square() / n
        return sse, torch.where((self.live > 0) & (sst > ROUNDING * second + keep @ self.floor), sst, 0.0)

    def _outputs(self, keep: Tensor) -> Tensor:
        sse, sst = self._sums(keep)
        return torch.where(sst > 0, 1 - sse / sst, torch.nan)

    def _overall(self, keep: Tensor) -> Tensor:
        sse, sst = self._sums(keep)
        uniform = torch.where(sst > 0, 1 - sse / sst, 0.0).mean()
        whitened = torch.tensor(torch.nan, dtype=torch.float64)
        if self.white is not None:
            error, around = (keep @ self.white).unbind()
            whitened = 1 - error / around
        return torch.stack([uniform, 1 - sse[sst > 0].sum() / sst.sum(), whitened])


def _scale(weight: Tensor) -> float | None:
    """c where W is c I (the identity, a scalar, the mean), else None."""
    if weight.shape[0] != weight.shape[1]:
        return None
    c = weight[0, 0]
    return float(c) if torch.equal(weight, c * torch.eye(len(weight)).to(weight)) else None
