"""RankFamily: nested maps of every rank at once, and their R2 for all ranks in one go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ..errors import UserError
from .linear_map import LinearMap
from .moments import Moments
from .scores import live_squares
from .whitening import Whitener


@dataclass(frozen=True, eq=False)
class RankCurve:
    """R2 of a family of maps at every rank, on one set of rows; index 0 is rank 0, the family without its channel."""

    r2_uniform: Float[Tensor, " k"]
    r2_weighted: Float[Tensor, " k"]
    r2_whitened: Float[Tensor, " k"] | None
    """None where no training covariance was given"""
    per_output: Float[Tensor, "k d_out"]
    """1 - SSE_j / SST_j at every rank; NaN where an output never varies"""
    n: int
    """rows scored"""

    @property
    def ranks(self) -> Int64[Tensor, " k"]:
        """0, 1, .., the highest rank."""
        return torch.arange(len(self.r2_uniform))

    def metric(self, name: str) -> Float[Tensor, " k"]:
        """The curve of a definition by its name: uniform, weighted or whitened."""
        curves = {"uniform": self.r2_uniform, "weighted": self.r2_weighted, "whitened": self.r2_whitened}
        found = curves.get(name)
        if found is None:
            raise UserError(
                f"this curve holds {', '.join(k for k, v in curves.items() if v is not None)}; got {name!r}"
            )
        return found


@dataclass(frozen=True, eq=False)
class RankFamily:
    """Maps y_hat = base + left[:, :r] @ right[:r] of rows about the training means, one for every rank r.

    Args:
        left: [d_in, k]; right: [k, d_out].
        x_mean: [d_in]; y_mean: [d_out]; of the training rows: the bias of every rank is recalibrated on them.
        update: the base is x itself, so that r is the rank of what is added to the identity.
        meta: how it was made; goes into every map.
    """

    left: Float[Tensor, "d_in k"]
    right: Float[Tensor, "k d_out"]
    x_mean: Float[Tensor, " d_in"]
    y_mean: Float[Tensor, " d_out"]
    update: bool
    meta: dict[str, Any]

    @property
    def highest(self) -> int:
        """The highest rank."""
        return self.left.shape[1]

    def map(self, rank: int, *, dtype: torch.dtype = torch.float64) -> LinearMap:
        """The map of one rank; 0 is the mean of the target, or identity + bias where the family is of updates."""
        if not 0 <= rank <= self.highest:
            raise UserError(f"rank must lie in 0..{self.highest}; got {rank}")
        weight = self.left[:, :rank] @ self.right[:rank]
        if self.update:
            weight = weight + torch.eye(len(weight)).to(weight)
        bias = self.y_mean - self.x_mean @ weight
        return LinearMap(weight.to(dtype), bias.to(dtype), {**self.meta, "rank": rank})

    def curve(
        self,
        moments: Moments,
        source: str = "x",
        target: str = "y",
        *,
        train: Moments | None = None,
        whitener: Whitener | None = None,
    ) -> RankCurve:
        """Scores every rank on the rows of `moments`, the training rows or others.

        SSE_j(r) = SSE_j(r-1) + R_rj (2 sum_{i<r} G_ri R_ij + G_rr R_rj - 2 C_rj), G = L^T Sxx L, C = L^T Sxy, the
        moments about the training means: four products for all ranks together.

        Args:
            train: moments of the training rows, for the whitened R2; whitener: its factors where they are at hand.
        """
        syy = moments.about(target, target, self.y_mean, self.y_mean)
        sxx = moments.about(source, source, self.x_mean, self.x_mean)
        sxy = moments.about(source, target, self.x_mean, self.y_mean)
        residual = syy - sxy - sxy.T + sxx if self.update else syy
        carried = self.left.T @ (sxy - sxx if self.update else sxy)
        inner = self.left.T @ sxx @ self.left
        sse = _errors(residual.diagonal(), inner, carried, self.right)
        sst = live_squares(moments, target)
        if not float(sst.sum()) > 0:
            raise UserError(f"{target} is constant in the rows to score, so no R2 is defined")
        per_output = torch.where(sst > 0, 1 - sse / sst, torch.nan).cpu()
        whitened = None
        if train is not None:
            k = (whitener or Whitener.of_block(train, target)).inverse_root
            at = train.mean(target)
            around = ((k @ moments.about(target, target, at, at)) * k).sum()
            errors = _errors(((k @ residual) * k).sum(0), inner, carried @ k, self.right @ k)
            whitened = (1 - errors.sum(1) / around).cpu()
        weighted = (1 - sse[:, sst > 0].sum(1) / sst.sum()).cpu()
        return RankCurve(per_output.nan_to_num(0.0).mean(1), weighted, whitened, per_output, moments.n)


def _errors(base: Tensor, inner: Tensor, carried: Tensor, right: Tensor) -> Tensor:
    """Sum of squared errors of every output at ranks 0..k, [k + 1, d_out]."""
    below = 2 * torch.tril(inner, -1) @ right + inner.diagonal()[:, None] * right
    steps = right * (below - 2 * carried)
    return torch.cat([base[None], base + steps.cumsum(0)])
