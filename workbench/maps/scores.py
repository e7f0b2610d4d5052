"""R2 from moments, in every one of its definitions by name: of any map, and of a whole ridge path at once.

uniform    mean over outputs of 1 - SSE_j / SST_j, SST about the mean of the scored rows (sklearn's `r2_score`)
weighted   1 - sum_j SSE_j / sum_j SST_j, about the same mean (sklearn's `variance_weighted`)
whitened   1 - ||(Y - Y_hat) K||^2 / ||(Y - m) K||^2 with K = S^(-1/2) and m of the target over the TRAINING rows

Outputs that never vary in the scored rows count 0 in the uniform mean and nothing in the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from .linear_map import LinearMap
from .moments import Moments
from .spectrum import Spectrum, constant_floor
from .symmetric import symmetric_product
from .whitening import Whitener

METRICS = ("uniform", "weighted", "whitened")


@dataclass(frozen=True, eq=False)
class MomentScore:
    """How well a map predicts the rows that some moments stand for."""

    sse: Float[Tensor, " d_out"]
    """sum of squared errors per output"""
    sst: Float[Tensor, " d_out"]
    """sum of squares about the mean of the scored rows; 0 where an output never varies"""
    n: int
    """rows scored"""
    r2_whitened: float | None
    """None where no training covariance was given"""

    @property
    def per_output(self) -> Float[Tensor, " d_out"]:
        """1 - SSE_j / SST_j, [d_out]; NaN where an output never varies."""
        return torch.where(self.sst > 0, 1 - self.sse / self.sst, torch.nan)

    @property
    def r2_uniform(self) -> float:
        return float(self.per_output.nan_to_num(0.0).mean())

    @property
    def r2_weighted(self) -> float:
        return 1 - float(self.sse[self.sst > 0].sum()) / float(self.sst.sum())

    def as_dict(self) -> dict[str, Any]:
        """The overall figures, for a table."""
        figures = {"r2_uniform": self.r2_uniform, "r2_weighted": self.r2_weighted}
        return {**figures, "r2_whitened": self.r2_whitened, "n": self.n}


def score_map(
    fitted: LinearMap,
    moments: Moments,
    source: str = "x",
    target: str = "y",
    *,
    train: Moments | None = None,
    whitener: Whitener | None = None,
) -> MomentScore:
    """Scores any map, wherever it is from, on the rows of `moments`.

    Args:
        fitted: y = x @ W + b; moments: of the rows to score, with the pair (source, target).
        train: moments of the training rows, for the whitened R2; whitener: its factors, where they are at hand.

    Raises:
        UserError: widths that do not fit, or a target that never varies in these rows.

    >>> x = torch.tensor([[0.0], [2.0], [4.0]])
    >>> score_map(LinearMap.identity(1), Moments().update({"x": x, "y": x + 1})).r2_uniform
    0.625
    """
    if (fitted.d_in, fitted.d_out) != (moments.width(source), moments.width(target)):
        raise UserError(
            f"the map goes from width {fitted.d_in} to {fitted.d_out}; {source!r} has width {moments.width(source)} "
            f"and {target!r} {moments.width(target)}"
        )
    weight, bias = fitted.weight.to(moments.sum[source]), fitted.bias.to(moments.sum[target])
    sxy, syy = moments.cov(source, target), moments.cov(target, target)
    carried = moments.cov(source, source) @ weight
    offset = moments.mean(target) - moments.mean(source) @ weight - bias
    sst = live_squares(moments, target)
    sse = syy.diagonal() - 2 * (weight * sxy).sum(0) + (weight * carried).sum(0) + moments.n * offset.square()
    if not float(sst.sum()) > 0:
        raise UserError(f"{target} is constant in the rows to score, so no R2 is defined")
    whitened = None
    if train is not None:
        k = (whitener or Whitener.of_block(train, target)).inverse_root
        at = train.mean(target)
        wk, ck = weight @ k, offset @ k
        error = ((k @ syy) * k).sum() - 2 * (wk * (sxy @ k)).sum() + (wk * (carried @ k)).sum()
        around = ((k @ moments.about(target, target, at, at)) * k).sum()
        whitened = 1 - float(error + moments.n * ck.square().sum()) / float(around)
    return MomentScore(sse.clamp_min(0), sst, moments.n, whitened)


def live_squares(moments: Moments, target: str) -> Float[Tensor, " d_out"]:
    """Sum of squares of each output about its mean, [d_out]; 0 where it is rounding alone."""
    squares = moments.squares(target)
    return torch.where(squares > constant_floor(moments, target), squares, 0.0)


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Rows that a spectrum was not made of, written in its basis: A = V^T Sxx' V, shared by every target."""

    spectrum: Spectrum
    part: Moments
    inner: Float[Tensor, "d d"]

    @classmethod
    def of(cls, spectrum: Spectrum, part: Moments) -> HeldOut:
        """Args: spectrum: of the training rows; part: moments of the held-out rows."""
        at, v, name = spectrum.x_mean, spectrum.vectors, spectrum.source
        return cls(spectrum, part, symmetric_product(v.T @ part.about(name, name, at, at), v))

    def path(
        self,
        target: str,
        alphas: Sequence[int | float],
        metric: str = "uniform",
        *,
        whitener: Whitener | None = None,
    ) -> Float[Tensor, " k"]:
        """The held-out R2 of the ridge map at every absolute penalty, [k].

        With M = V^T Sxy, B = V^T Sxy' (about the training means) and weights C on the outputs,
        SSE(a) = tr(C Syy') - 2 g . diag(M C B^T) + g^T (A o (M C M^T)) g, g = 1 / (l + a): three products per target,
        one of them symmetric, then O(d^2) per penalty, however many there are.
        """
        if metric not in METRICS:
            raise UserError(f"metric must be one of {', '.join(METRICS)}; got {metric!r}")
        spectrum, part = self.spectrum, self.part
        at = spectrum.y_mean(target)
        cross = spectrum.cross(target)
        held = spectrum.vectors.T @ part.about(spectrum.source, target, spectrum.x_mean, at)
        sst = live_squares(part, target)
        if metric != "uniform" and not float(sst.sum()) > 0:
            raise UserError(f"{target} is constant in the held-out rows, so no R2 is defined")
        if metric == "whitened":
            k = (whitener or Whitener.of_block(spectrum.train, target)).inverse_root
            mean = spectrum.train.mean(target)
            cross, held = cross @ k, held @ k
            around = part.about(target, target, at, at)
            total = ((k @ around) * k).sum()
            scale, best = 1 / ((k @ part.about(target, target, mean, mean)) * k).sum(), 1.0
            weighted = cross
        else:
            live = sst > 0
            weights = torch.where(live, 1 / sst, 0.0) / len(sst) if metric == "uniform" else 1 / sst.sum() * live
            best = float(live.double().mean()) if metric == "uniform" else 1.0
            around = part.squares(target, at)
            weighted, total, scale = cross * weights, (around * weights).sum(), torch.ones_like(sst[0])
        linear, square = (weighted * held).sum(1), self.inner * symmetric_product(weighted, cross.T)
        gains = torch.stack([spectrum.gain(alpha) for alpha in alphas])
        sse = total - 2 * gains @ linear + ((gains @ square) * gains).sum(1)
        return (best - scale * sse).cpu()
