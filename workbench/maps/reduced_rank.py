"""Reduced-rank families: the optimal map of every rank, of the map or of the update, and the truncated one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .rank_family import RankFamily
from .scores import METRICS
from .spectrum import Spectrum, constant_floor, sign_fixed
from .whitening import Whitener


def optimal_ranks(
    spectrum: Spectrum,
    target: str = "y",
    *,
    alpha: float = 0.0,
    metric: str = "weighted",
    update: bool = False,
    whitener: Whitener | None = None,
) -> RankFamily:
    """The best map of every rank at once: min ||(Yc - Xc B) K||^2 + alpha ||B K||^2 subject to rank B <= r.

    B_r = B K R_r R_r^T K^-1 with B the ridge map and R the eigenvectors of K M^T diag(1 / (l + alpha)) M K. In sample
    and at alpha = 0 the curve of its own metric is the ceiling of all affine maps of that rank.

    Args:
        spectrum: of the source over the training rows; target: the block that is mapped to.
        alpha: absolute penalty.
        metric: which R2 is maximised: "weighted" (K = I), "uniform" (K = 1 / standard deviation of each output) or
            "whitened" (K = Syy^(-1/2)).
        update: constrain the rank of the map of y - x instead: T = I + rank r, which leaves the identity path whole.
        whitener: of the target over the training rows, where it is at hand.

    Source: Izenman 1975; ridge form Mukherjee and Zhu 2011.
    """
    if metric not in METRICS:
        raise UserError(f"metric must be one of {', '.join(METRICS)}; got {metric!r}")
    cross = spectrum.cross(target)
    if update:
        cross = cross - _identity_cross(spectrum, cross.shape[1])
    root, inverse = _metric_roots(spectrum, target, metric, whitener)
    seen = cross if inverse is None else cross @ inverse
    gain = spectrum.gain(alpha)[:, None]
    _, vectors = torch.linalg.eigh(seen.T @ (gain * seen))
    k = min(cross.shape)
    (directions,) = sign_fixed(vectors.flip(1)[:, :k])
    left = spectrum.vectors @ (gain * (seen @ directions))
    right = directions.T if root is None else directions.T @ root
    return _family(spectrum, target, left, right, update, "reduced_rank", {"alpha_absolute": alpha, "metric": metric})


def truncated_ranks(spectrum: Spectrum, target: str = "y", *, alpha: float = 0.0, update: bool = False) -> RankFamily:
    """The ridge map cut to its leading singular triples, at every rank, as the released code does it.

    Not the best map of its rank: the leading directions of W need not be where x varies. `optimal_ranks` is.

    Source: arXiv:2508.17540, released code `matched_rank_analysis.py:341-346`.
    """
    gain = spectrum.gain(alpha)[:, None]
    cross = spectrum.cross(target)
    if update:
        cross = cross - _identity_cross(spectrum, cross.shape[1])
    u, s, vh = torch.linalg.svd(spectrum.vectors @ (gain * cross), full_matrices=False)
    u, v = sign_fixed(u, vh.T)
    return _family(spectrum, target, u * s, v.T, update, "truncation", {"alpha_absolute": alpha})


def _identity_cross(spectrum: Spectrum, d_out: int) -> Tensor:
    """V^T Sxx = diag(l) V^T: what the cross moments of y lose when y - x is the target."""
    if d_out != len(spectrum.values):
        raise UserError(f"an update y - x needs equal widths; got {len(spectrum.values)} and {d_out}")
    return spectrum.values[:, None] * spectrum.vectors.T


def _metric_roots(
    spectrum: Spectrum, target: str, metric: str, whitener: Whitener | None
) -> tuple[Tensor | None, Tensor | None]:
    """K^-1 and K as matrices; None for the identity."""
    if metric == "weighted":
        return None, None
    if metric == "whitened":
        white = whitener or Whitener.of_block(spectrum.train, target)
        return white.root, white.inverse_root
    squares = spectrum.train.cov(target, target).diagonal()
    spread = torch.where(squares > constant_floor(spectrum.train, target), squares, 0.0).sqrt()
    return torch.diag(spread), torch.diag(torch.where(spread > 0, 1 / spread, 0.0))


def _family(
    spectrum: Spectrum, target: str, left: Tensor, right: Tensor, update: bool, method: str, meta: dict[str, Any]
) -> RankFamily:
    meta = {"method": method, "n": spectrum.train.n, "update": update, **meta}
    return RankFamily(left, right, spectrum.x_mean, spectrum.y_mean(target), update, meta)
