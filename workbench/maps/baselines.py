"""Maps with few numbers: what a full map must beat. All from moments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .linear_map import LinearMap
from .moments import Moments

BASELINES = ("mean", "identity", "identity_bias", "scalar", "scalar_bias", "procrustes", "procrustes_scaled")


def baseline(
    train: Moments, method: str, source: str = "x", target: str = "y", *, dtype: torch.dtype = torch.float64
) -> LinearMap:
    """A baseline map fitted to moments.

    mean                y = mean_y
    identity            y = x
    identity_bias       y = x + (mean_y - mean_x)
    scalar              y = c x, c = tr(X^T Y) / tr(X^T X), uncentred
    scalar_bias         y = c x + b, centred
    procrustes          y = x Q + b, Q = U V^T from SVD(Xc^T Yc) = U S V^T: orthogonal for equal widths
    procrustes_scaled   y = c x Q + b, c = tr(S) / tr(Xc^T Xc)

    Raises:
        UserError: an unknown name, or widths that differ where y is x itself.
    """
    if method not in BASELINES:
        raise UserError(f"baseline must be one of {', '.join(BASELINES)}; got {method!r}")
    d_in, d_out = train.width(source), train.width(target)
    if method in ("identity", "identity_bias", "scalar", "scalar_bias") and d_in != d_out:
        raise UserError(f"{method} needs equal widths; {source!r} has {d_in} and {target!r} {d_out}")
    x_mean, y_mean = train.mean(source), train.mean(target)
    weight, extra = _weight(train, method, source, target)
    bias = torch.zeros_like(y_mean) if method in ("identity", "scalar") else y_mean - x_mean @ weight
    return LinearMap(weight.to(dtype), bias.to(dtype), {"method": method, "n": train.n, **extra})


def _weight(train: Moments, method: str, source: str, target: str) -> tuple[Tensor, dict[str, Any]]:
    d = train.width(source)
    eye = torch.eye(d).to(train.sum[source])
    if method == "mean":
        return torch.zeros(d, train.width(target)).to(eye), {}
    if method.startswith("identity"):
        return eye, {}
    if method.startswith("scalar"):
        product = train.raw if method == "scalar" else train.cov
        square = float(product(source, source).trace())
        if not square > 0:
            raise UserError(f"{source} is constant, so there is nothing to fit")
        c = float(product(source, target).trace()) / square
        return c * eye, {"scale": c}
    u, s, vh = torch.linalg.svd(train.cov(source, target), full_matrices=False)
    if method == "procrustes":
        return u @ vh, {}
    c = float(s.sum()) / float(train.cov(source, source).trace())
    return c * u @ vh, {"scale": c}
