"""Lasso and elastic net for all targets at once, by FISTA on the moments: no row is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from .linear_map import LinearMap
from .spectrum import Spectrum


@dataclass(frozen=True, eq=False)
class SparsePath:
    """Sparse maps, one per penalty, and how far each is from its optimum."""

    maps: tuple[LinearMap, ...]
    alphas: tuple[float, ...]
    gaps: tuple[float, ...]
    """largest violation of the optimality conditions, as a share of the largest |Sxy| / n"""
    iterations: tuple[int, ...]
    tolerance: float

    @property
    def converged(self) -> bool:
        """Whether every map met the tolerance."""
        return all(gap <= self.tolerance for gap in self.gaps)


def sparse_path(
    spectrum: Spectrum,
    target: str = "y",
    alphas: Sequence[int | float] = (0.1,),
    *,
    l1_ratio: float = 1.0,
    tolerance: float = 1e-7,
    max_iterations: int = 5000,
    dtype: torch.dtype = torch.float64,
) -> SparsePath:
    """min ||Yc - Xc W||^2 / (2n) + a l1_ratio |W|_1 + a (1 - l1_ratio) ||W||^2 / 2 for every a, as scikit-learn scales it.

    Accelerated proximal gradient with a restart per output; each iteration is one [d, d] x [d, d_out] product. Runs
    from the largest penalty down, each starting from the last.

    Args:
        spectrum: of the source over the training rows; target: the block that is mapped to.
        alphas: penalties, scikit-learn's `Lasso(alpha)` and `ElasticNet(alpha, l1_ratio)`.
        l1_ratio: 1 is the lasso; 0 is ridge with penalty a n.
        tolerance: stop where the optimality conditions hold to this share of the largest |Sxy| / n.
        max_iterations: per penalty; what was not reached by then shows in `gaps`.

    Raises:
        UserError: no alpha, one below 0, or l1_ratio out of 0..1.

    Source: Beck and Teboulle 2009; restart of O'Donoghue and Candes 2015.
    """
    if not alphas or min(alphas) < 0:
        raise UserError(f"alphas must be numbers from 0 up, at least one; got {list(alphas)}")
    if not 0 <= l1_ratio <= 1:
        raise UserError(f"l1_ratio must lie in 0..1; got {l1_ratio}")
    n = spectrum.train.n
    s = spectrum.covariance(spectrum.source, spectrum.source) / n
    c = spectrum.covariance(spectrum.source, target) / n
    steepest = float(spectrum.values[-1]) / n
    found: dict[float, tuple[Tensor, float, int]] = {}
    weight = torch.zeros_like(c)
    for alpha in sorted({float(a) for a in alphas}, reverse=True):
        weight, gap, steps = _fista(
            s, c, weight, alpha * l1_ratio, alpha * (1 - l1_ratio), steepest, tolerance, max_iterations
        )
        found[alpha] = weight, gap, steps
    x_mean, y_mean = spectrum.x_mean, spectrum.y_mean(target)
    maps = []
    for alpha in map(float, alphas):
        weight = found[alpha][0]
        meta = {"method": "elastic_net", "n": n, "alpha_absolute": alpha, "l1_ratio": l1_ratio}
        maps.append(LinearMap(weight.to(dtype), (y_mean - x_mean @ weight).to(dtype), meta))
    gaps = tuple(found[float(alpha)][1] for alpha in alphas)
    counts = tuple(found[float(alpha)][2] for alpha in alphas)
    return SparsePath(tuple(maps), tuple(map(float, alphas)), gaps, counts, tolerance)


def _fista(
    s: Tensor, c: Tensor, weight: Tensor, l1: float, l2: float, steepest: float, tolerance: float, iterations: int
) -> tuple[Tensor, float, int]:
    """The minimiser for one penalty, its gap and the steps it took, from a starting point."""
    step = 1 / (steepest + l2)
    scale = float(c.abs().max()) or 1.0
    ahead, momentum, gap = weight, torch.ones(c.shape[1]).to(c), float("inf")
    steps = 0
    for i in range(iterations):
        steps = i + 1
        new = _shrunk(ahead - step * (s @ ahead - c + l2 * ahead), step * l1)
        moved = new - weight
        uphill = ((ahead - new) * moved).sum(0) > 0
        following = torch.where(uphill, 1.0, (1 + (1 + 4 * momentum.square()).sqrt()) / 2)
        ahead = new + torch.where(uphill, 0.0, (momentum - 1) / following) * moved
        weight, momentum = new, following
        if i % 10 == 9 or i == iterations - 1:
            direct = _shrunk(weight - step * (s @ weight - c + l2 * weight), step * l1)
            gap = float((direct - weight).abs().max()) / step / scale
            if gap <= tolerance:
                break
    return weight, gap, steps


def _shrunk(weight: Tensor, by: float) -> Tensor:
    return weight.sign() * (weight.abs() - by).clamp_min(0)
