"""Partial least squares from moments: scikit-learn's `PLSRegression` for every number of components at once."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError
from .moments import Moments
from .rank_family import RankFamily
from .spectrum import constant_floor, sign_fixed


def partial_least_squares(
    train: Moments, source: str = "x", target: str = "y", *, components: int = 10, scale: bool = False
) -> RankFamily:
    """PLS regression (PLS2 with deflation of x, NIPALS' solution) with 1..components components.

    Component k: w = leading left singular vector of Sxy (deflated), p = Sxx w / (w^T Sxx w), q = Sxy^T w / (w^T Sxx w);
    then Sxx and Sxy lose what was found. The map of rank r is R_r Q_r^T with R = W (P^T W)^-1. SIMPLS deflates Sxy
    alone and differs from the second component on where there are many outputs; this is what scikit-learn computes.

    Args:
        components: how many; fewer come back where nothing is left to explain, or the rest of x varies less than what
            its products round off (`Moments.noise`).
        scale: standardise the columns of both sides first (scikit-learn's default).

    Raises:
        UserError: `components` out of range.

    Source: Dayal and MacGregor 1997 (kernel form); Wold's NIPALS as in `sklearn.cross_decomposition`.
    """
    sxx, sxy = train.cov(source, source), train.cov(source, target)
    if not 1 <= components <= min(len(sxx), train.n - 1):
        raise UserError(f"components must lie in 1..{min(len(sxx), train.n - 1)}; got {components}")
    x_spread, y_spread = (_spread(train, name) if scale else None for name in (source, target))
    if x_spread is not None and y_spread is not None:
        sxx, sxy = sxx / torch.outer(x_spread, x_spread), sxy / torch.outer(x_spread, y_spread)
    start = float(sxy.norm())
    rotations: list[Tensor] = []
    loadings: list[Tensor] = []
    outputs: list[Tensor] = []
    if not start > 0:
        raise UserError(f"{source} and {target} do not vary together at all, so there is nothing to fit")
    whole = sxx
    for _ in range(components):
        if float(sxy.norm()) <= 1e-13 * start:
            break
        weight = _leading_left(sxy)
        rotation = weight.clone()
        for p, r in zip(loadings, rotations, strict=True):
            rotation -= (p @ weight) * r
        score = float(rotation @ whole @ rotation)  # = w^T Sxx w after deflation, without its rounding
        if score <= train.noise * float(whole.norm() * rotation @ rotation):
            break  # x does not vary there, but for the rounding of its products
        p, q = whole @ rotation / score, sxy.T @ weight / score
        sxy = sxy - score * torch.outer(p, q)
        rotations.append(rotation)
        loadings.append(p)
        outputs.append(q)
    if not rotations:
        raise UserError(f"{target} varies with directions of {source} alone that are too small for products in "
                        f"{str(train.products).removeprefix('torch.')}: use ridge")  # fmt: skip
    left, right = torch.stack(rotations, 1), torch.stack(outputs)
    if x_spread is not None and y_spread is not None:
        left, right = left / x_spread[:, None], right * y_spread
    meta = {"method": "pls", "n": train.n, "scale": scale}
    return RankFamily(left, right, train.mean(source), train.mean(target), False, meta)


def _leading_left(cross: Tensor) -> Tensor:
    """The leading left singular vector, by way of the smaller Gram matrix; its largest entry is positive."""
    if cross.shape[0] <= cross.shape[1]:
        vector = torch.linalg.eigh(cross @ cross.T)[1][:, -1]
    else:
        vector = cross @ torch.linalg.eigh(cross.T @ cross)[1][:, -1]
        vector = vector / vector.norm()
    return sign_fixed(vector[:, None])[0][:, 0]


def _spread(train: Moments, name: str) -> Tensor:
    """Standard deviation of every column (divided by n - 1); 1 where it never varies, as scikit-learn has it."""
    squares = train.cov(name, name).diagonal()
    live = squares > constant_floor(train, name)
    return torch.where(live, (squares / (train.n - 1)).sqrt(), 1.0)
