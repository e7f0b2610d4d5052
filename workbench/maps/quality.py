"""How well a map fits rows it has not seen, beside the baselines that it must beat."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from .autoencoder import ReluMap
from .linear_map import LinearMap

PEAK = (0.7, 1.5)
"""rows per width between which an unpenalised fit is at or near its double-descent peak"""


class R2(NamedTuple):
    """Two R2 of one prediction."""

    uniform: float
    """mean over outputs of 1 - SSE_j / SST_j (sklearn's r2_score); outputs that never vary count 0, or 1 if exact"""
    weighted: float
    """1 - sum_j SSE_j / sum_j SST_j"""


@dataclass(frozen=True)
class Quality:
    """Held-out quality of a map. It says how well the map fits, never whether a paste will work."""

    r2_uniform: float
    """mean over outputs of 1 - SSE_j / SST_j, SST about the mean of the held-out rows"""
    r2_weighted: float
    """1 - SSE / SST, summed over outputs"""
    r2_mean_baseline: float
    """r2_weighted of predicting the training mean"""
    r2_identity_bias: float | None
    """r2_weighted of y = x + (mean_y - mean_x), training means; None where the widths differ"""
    relative_mse: float
    """||y - y_hat||^2 / ||y||^2, uncentred"""
    cosine_centred: float
    """mean over rows of cos(y - mean, y_hat - mean), training mean"""
    cycle_error: float | None
    """||back(map(x)) - x|| / ||x - mean_x||: 0 is perfect, 1 no better than the mean; None without a map back"""
    rank: int
    """numerical rank of W"""
    condition: float
    """largest over smallest singular value that counts"""
    n: int
    """rows that the map was fitted on"""
    d: int
    """width that it maps from"""
    warning: str | None
    """set where there are too few rows for the width"""

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON values: what is not finite becomes None."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


def r2(y: Float[Tensor, "n d"], y_hat: Float[Tensor, "n d"], baseline_mean: Float[Tensor, " d"] | None = None) -> R2:
    """R2 of a prediction, uniform and variance-weighted.

    Args:
        y: true rows, [n, d]; y_hat: predicted rows, [n, d].
        baseline_mean: the point that SST is taken about, [d]; default the mean of y, as sklearn's r2_score has it.

    >>> y = torch.tensor([[0.0], [2.0]])
    >>> r2(y, torch.ones(2, 1))
    R2(uniform=0.0, weighted=0.0)
    """
    y, y_hat = y.double(), y_hat.double()
    mean = y.mean(0) if baseline_mean is None else baseline_mean.double()
    sse, sst = ((y - y_hat) ** 2).sum(0), ((y - mean) ** 2).sum(0)
    per_output = torch.where(sst > 0, 1 - sse / sst, (sse == 0).double())
    all_sst = float(sst.sum())
    weighted = 1 - float(sse.sum()) / all_sst if all_sst else float(sse.sum() == 0)
    return R2(float(per_output.mean()), weighted)


def quality(
    fitted: LinearMap | ReluMap,
    x: Float[Tensor, "n d_in"],
    y: Float[Tensor, "m d_out"],
    back: LinearMap | ReluMap | None = None,
    train_mean: Float[Tensor, " d_out"] | None = None,
    *,
    train_mean_x: Float[Tensor, " d_in"] | None = None,
    n_train: int | None = None,
) -> Quality:
    """Scores a map on held-out rows.

    Args:
        fitted: the map under test.
        x, y: held-out rows that pair, [n, d_in] and [n, d_out].
        back: the map from y's space to x's, for the cycle error.
        train_mean: mean of the target over the training rows, [d_out]; default fitted(mean of x).
        train_mean_x: mean of the source over the training rows, [d_in]; default the mean of the held-out x.
        n_train: rows that the map was fitted on; default what the fitter noted in its meta, else the rows of x.

    Raises:
        UserError: rows that do not pair, or none.
    """
    if len(x) != len(y) or not len(x):
        raise UserError(f"x and y must pair row by row; got {len(x)} rows of x and {len(y)} rows of y")
    x, y = x.double(), y.double()
    mean_x = x.mean(0) if train_mean_x is None else train_mean_x.double()
    mean_y = fitted(mean_x) if train_mean is None else train_mean.double()
    predicted = fitted(x)
    score = r2(y, predicted)
    identity = r2(y, x + (mean_y - mean_x)).weighted if x.shape[1] == y.shape[1] else None
    returned = None if back is None else _relative(back(predicted) - x, x - mean_x)
    rows = int(fitted.meta.get("n", len(x))) if n_train is None else n_train
    return Quality(
        r2_uniform=score.uniform,
        r2_weighted=score.weighted,
        r2_mean_baseline=r2(y, mean_y.expand_as(y)).weighted,
        r2_identity_bias=identity,
        relative_mse=_relative(y - predicted, y) ** 2,
        cosine_centred=float(torch.cosine_similarity(y - mean_y, predicted - mean_y, dim=1).mean()),
        cycle_error=returned,
        rank=fitted.rank,
        condition=fitted.condition,
        n=rows,
        d=fitted.d_in,
        warning=row_warning(rows, fitted.d_in, str(fitted.meta.get("method", ""))),
    )


def row_warning(n: int, d: int, method: str = "") -> str | None:
    """One line where n rows are too few for width d, else None.

    >>> row_warning(10_000, 1024) is None
    True
    >>> row_warning(1030, 1024)
    'n/d = 1030/1024 = 1.01 lies in 0.7..1.5, the double-descent peak: profile more prompts, or keep to ridge'
    """
    ratio = f"n/d = {n}/{d} = {n / d:.2f}"
    if PEAK[0] < n / d < PEAK[1]:
        return f"{ratio} lies in {PEAK[0]}..{PEAK[1]}, the double-descent peak: profile more prompts, or keep to ridge"
    if n < d and method == "pinv":
        return f"{ratio} is below 1: pinv reproduces its own rows exactly, so its training error says nothing"
    return None


def mahalanobis(
    delta: Float[Tensor, "n d"], covariance: Float[Tensor, "d d"], jitter: int | float = 1e-6
) -> Float[Tensor, " n"]:
    """Length of each row in standard deviations of a profile: sqrt(delta S^-1 delta^T), float64, [n].

    Args:
        delta: rows, [n, d].
        covariance: covariance of the profile, [d, d] (divided by its rows).
        jitter: S = covariance + jitter * mean diagonal, so that it can be inverted.

    >>> mahalanobis(torch.tensor([[2.0, 0.0]]), 4 * torch.eye(2)).round(decimals=3).item()
    1.0
    """
    s = covariance.double()
    unit = float(s.diagonal().mean())
    if not unit > 0:
        raise UserError(f"a covariance needs a positive mean diagonal; got {unit}")
    factor, failed = torch.linalg.cholesky_ex(s + jitter * unit * torch.eye(len(s), dtype=s.dtype, device=s.device))
    if failed:
        raise UserError("the covariance is not positive definite; pass a larger jitter")
    return torch.linalg.solve_triangular(factor, delta.double().T, upper=False).norm(dim=0)


def _relative(error: Tensor, reference: Tensor) -> float:
    scale = float(reference.norm())
    return float(error.norm()) / scale if scale else float("inf")
