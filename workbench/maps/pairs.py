"""Pairs of maps, there and back, fitted together: whitened, and cycle-regularised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .linear_map import LinearMap
from .moments import Moments
from .ridge import penalty
from .row_counts import check_counts
from .spectrum import Spectrum
from .whitening import Whitener


@dataclass(frozen=True, eq=False)
class PairFit:
    """A map from x to y and a map back."""

    there: LinearMap
    back: LinearMap
    method: str
    objective: tuple[float, ...]
    """what was minimised, after every step; one value for a closed form"""
    converged: bool
    notes: tuple[str, ...]


def fit_pair(
    train: Moments,
    method: str = "cycle",
    *,
    source: str = "x",
    target: str = "y",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> PairFit:
    """Fits maps both ways from the same moments.

    ridge      each on its own; alpha=0.01
    whitened   W = Sx^(-1/2) Q Sy^(1/2) and back Sy^(-1/2) Q^T Sx^(1/2), Q the orthogonal map that best aligns the two
               whitened sides: they carry all variance and undo one another exactly where the ranks are equal;
               shrink=1e-3 of the mean variance is added to every direction first
    cycle      min ||XA - Y||^2 + ||YB - X||^2 + cycle (||XAB - X||^2 + ||YBA - Y||^2) + ridge terms, rows about their
               means and each side divided by its total variance, so that no term is drowned; alpha=0.01, cycle=1.0,
               tolerance=1e-8, max_iterations=500

    `cycle` is an own definition. Given B the objective is quadratic in A and is solved exactly (two symmetric
    eigendecompositions turn its generalised Sylvester equation into a division), then B given A: the objective never
    rises. It is not convex in both together; the pair of ridge maps is the start, and a stationary point the end.

    Args:
        alpha: ridge penalty in units of the mean diagonal of each side's X'X.
        cycle: weight of the cycle terms; 0 gives the ridge pair.
        tolerance: stop where a round lowers the objective by less than this share of it.

    Raises:
        UserError: an unknown method or option, too few rows, a side that never varies, numbers out of range.

    Source: whitened as in Artetxe, Labaka, Agirre 2018 (whitening, rotation, de-whitening).

    >>> x = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    >>> pair = fit_pair(Moments().update({"x": x, "y": 2 * x[:, [1, 0, 3, 2]] + 1}), "whitened")
    >>> bool(torch.allclose(pair.back(pair.there(x)), x, atol=1e-4))
    True
    """
    if method not in _PAIRS:
        raise UserError(f"method must be one of {', '.join(_PAIRS)}; got {method!r}")
    fitter, allowed = _PAIRS[method]
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise UserError(f"{method} has no option {unknown[0]!r}; it has {', '.join(allowed)}")
    for name, value in options.items():
        if not 0 <= value < float("inf"):
            raise UserError(f"{name} must be a number from 0 up; got {value!r}")
    part = train.select([(source, target)])
    notes = (
        *check_counts(part, source, target, penalised=True, method=method),
        *check_counts(part, target, source, penalised=True, method=method),
    )
    a, b, objective, converged = fitter(part, source, target, **options)
    if not converged:
        notes = (
            *notes,
            f"{method} stopped after {len(objective) - 1} rounds before it converged; raise max_iterations",
        )
    x_mean, y_mean = part.mean(source), part.mean(target)
    meta = {"method": f"{method}_pair", "n": part.n, **options}
    there = LinearMap(a.to(dtype), (y_mean - x_mean @ a).to(dtype), meta)
    back = LinearMap(b.to(dtype), (x_mean - y_mean @ b).to(dtype), meta)
    return PairFit(there, back, method, tuple(objective), converged, tuple(dict.fromkeys(notes)))


_Fitted = tuple[Tensor, Tensor, list[float], bool]


def _ridge_pair(train: Moments, source: str, target: str, alpha: float = 0.01) -> _Fitted:
    weights = []
    for name, other in ((source, target), (target, source)):
        spectrum = Spectrum.of(train, name)
        weights.append(spectrum.weight(other, penalty(alpha) * spectrum.unit))
    return weights[0], weights[1], [], True


def _whitened_pair(train: Moments, source: str, target: str, shrink: float = 1e-3) -> _Fitted:
    x, y = (Whitener.of_block(train, name, shrink=shrink) for name in (source, target))
    cross = x.inverse_root @ (train.cov(source, target) / train.n) @ y.inverse_root
    u, _, vh = torch.linalg.svd(cross, full_matrices=False)
    q = u @ vh
    return x.inverse_root @ q @ y.root, y.inverse_root @ q.T @ x.root, [], True


def _cycle_pair(
    train: Moments,
    source: str,
    target: str,
    alpha: float = 0.01,
    cycle: float = 1.0,
    tolerance: float = 1e-8,
    max_iterations: int = 500,
) -> _Fitted:
    first, second, _, _ = _ridge_pair(train, source, target, alpha)
    size_x, size_y = (train.cov(name, name).trace().sqrt() for name in (source, target))
    sx, sy = train.cov(source, source) / size_x**2, train.cov(target, target) / size_y**2
    sxy = train.cov(source, target) / (size_x * size_y)
    a, b = first * size_x / size_y, second * size_y / size_x
    # a hair of penalty keeps the equation solvable where a side has fewer directions than columns, but for rounding
    ridge_x, ridge_y = (max(alpha, 1e-10, len(s) * train.noise) / len(s) for s in (sx, sy))

    def objective() -> float:
        fit = _miss(sx, sxy, sy, a) + _miss(sy, sxy.T, sx, b)
        around = _miss(sx, sx, sx, a @ b) + _miss(sy, sy, sy, b @ a)
        return float(fit + cycle * around + ridge_x * a.square().sum() + ridge_y * b.square().sum())

    history = [objective()]
    converged = False
    for _ in range(int(max_iterations)):
        a = _best_given_back(sx, sy, sxy, b, cycle, ridge_x)
        b = _best_given_back(sy, sx, sxy.T, a, cycle, ridge_y)
        history.append(objective())
        if history[-2] - history[-1] <= tolerance * history[-2]:
            converged = True
            break
    return a * size_y / size_x, b * size_x / size_y, history, converged


def _best_given_back(sx: Tensor, sy: Tensor, sxy: Tensor, b: Tensor, cycle: float, ridge: float) -> Tensor:
    """The A that minimises the objective for a given B: N A + c Sx A (B B^T) = Sxy + c (Sx B^T + B^T Sy).

    N = Sx + c B^T Sy B + ridge I = F F^T; F^-1 Sx F^-T = V diag(l) V^T and B B^T = U diag(m) U^T make it a division.
    """
    factor = torch.linalg.cholesky(sx + cycle * b.T @ sy @ b + ridge * torch.eye(len(sx)).to(sx))
    inner = torch.linalg.solve_triangular(factor, sx, upper=False)
    inner = torch.linalg.solve_triangular(factor, inner.T, upper=False)
    l, v = torch.linalg.eigh((inner + inner.T) / 2)
    m, u = torch.linalg.eigh(b @ b.T)
    right = sxy + cycle * (sx @ b.T + b.T @ sy)
    right = v.T @ torch.linalg.solve_triangular(factor, right, upper=False) @ u
    solved = right / (1 + cycle * torch.outer(l.clamp_min(0), m.clamp_min(0)))
    return torch.linalg.solve_triangular(factor.T, v @ solved @ u.T, upper=True)


def _miss(inner: Tensor, cross: Tensor, own: Tensor, weight: Tensor) -> Tensor:
    """||X W - Y||^2 = tr(W^T Sxx W) - 2 tr(W^T Sxy) + tr Syy."""
    return (weight * (inner @ weight)).sum() - 2 * (weight * cross).sum() + own.trace()


_PAIRS: dict[str, tuple[Callable[..., _Fitted], tuple[str, ...]]] = {
    "ridge": (_ridge_pair, ("alpha",)),
    "whitened": (_whitened_pair, ("shrink",)),
    "cycle": (_cycle_pair, ("alpha", "cycle", "tolerance", "max_iterations")),
}
