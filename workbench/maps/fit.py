"""Fitters of linear maps from paired rows: pinv as Command-V has it, centred ridge, orthogonal Procrustes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ..errors import UserError
from .linear_map import LinearMap
from .moments import Moments
from .ridge import ALPHAS, Choice, RidgeFit, fit_ridge_targets, penalty
from .spectrum import Spectrum


def check_rows(
    x: Float[Tensor, "n d_in"], y: Float[Tensor, "m d_out"]
) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "m d_out"]]:
    """Both in float64, or UserError where no map can be fitted: shapes, row counts, NaN, infinity, constants."""
    for name, rows in (("x", x), ("y", y)):
        if rows.ndim != 2 or not rows.numel():
            raise UserError(f"{name} must be a table of rows [n, d] that is not empty; got shape {list(rows.shape)}")
    if len(x) != len(y):
        raise UserError(f"x and y must pair row by row; got {len(x)} rows of x and {len(y)} rows of y")
    if len(x) < 2:
        raise UserError("a map needs at least 2 rows; got 1 row")
    for name, rows in (("x", x), ("y", y)):
        if not torch.isfinite(rows).all():
            bad = int((~torch.isfinite(rows).all(1)).sum())
            raise UserError(
                f"{name} holds NaN or infinite values in {bad} of {len(rows)} rows; remove those rows first"
            )
        if bool((rows == rows[0]).all()):
            raise UserError(f"{name} is constant: all {len(rows)} rows are the same, so there is nothing to fit")
    return x.double(), y.double()


def default_rtol(x: Float[Tensor, "n d"]) -> float:
    """max(n, d) * eps of the precision that the rows came in (half precisions count as float32)."""
    return max(x.shape) * torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps


def fit_pinv(
    x: Float[Tensor, "n d_in"],
    y: Float[Tensor, "m d_out"],
    *,
    rtol: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> LinearMap:
    """The minimum-norm least-squares map without centring or bias: W = pinv(X) @ Y.

    Args:
        x: rows to map from, [n, d_in]; y: rows to map to, [n, d_out].
        rtol: singular values below rtol * the largest count as zero; default max(n, d_in) * eps of the dtype of x,
            the cut that torch.linalg.pinv makes on the published float32 activations. The solve itself is in float64.
        dtype: of the map.

    Raises:
        UserError: the rows do not pair, are empty or constant, or hold NaN or infinity.

    >>> fit_pinv(torch.tensor([[1.0], [2.0]]), torch.tensor([[2.0], [4.0]])).weight.item()
    2.0

    Source: arXiv:2506.19140, released code `converters.py:22-29`; there the SVD itself is in float32.
    """
    rtol = default_rtol(x) if rtol is None else rtol
    x, y = check_rows(x, y)
    weight = torch.linalg.pinv(x, rtol=rtol) @ y
    meta = {"method": "pinv", "n": len(x), "rtol": rtol}
    return LinearMap(weight.to(dtype), torch.zeros(y.shape[1], dtype=dtype, device=weight.device), meta)


def fit_procrustes(
    x: Float[Tensor, "n d_in"], y: Float[Tensor, "m d_out"], *, dtype: torch.dtype = torch.float32
) -> LinearMap:
    """The (semi-)orthogonal map nearest in least squares, with a bias: W = U V^T from SVD(Xc^T Yc) = U S V^T.

    For equal widths W is orthogonal and this is the minimiser; for other widths W has orthonormal columns or rows
    (whichever are fewer) and maximises tr(W^T Xc^T Yc). b = mean(y) - mean(x) @ W. Raises as `fit_pinv`.
    """
    x, y = check_rows(x, y)
    x_mean, y_mean = x.mean(0), y.mean(0)
    u, _, vh = torch.linalg.svd((x - x_mean).T @ (y - y_mean), full_matrices=False)
    weight = u @ vh
    return LinearMap(weight.to(dtype), (y_mean - x_mean @ weight).to(dtype), {"method": "procrustes", "n": len(x)})


def fit_ridge(
    x: Float[Tensor, "n d_in"],
    y: Float[Tensor, "m d_out"],
    *,
    alpha: Choice = "cv",
    alphas: Sequence[int | float] = ALPHAS,
    groups: Collection[Any] | None = None,
    folds: int = 5,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> RidgeFit:
    """Centred ridge with a bias, its penalty given or chosen by grouped K-fold cross-validation.

    minimises ||Yc - Xc W||^2 + a ||W||^2, a = alpha * mean diagonal of Xc^T Xc; b = mean(y) - mean(x) @ W. Every
    training set costs one eigendecomposition, whatever the number of alphas; the training sets of the folds are
    total - fold, never second passes. Where n < d_in the rows are first written in an orthonormal basis of their own
    span, which changes nothing in the result and makes the decomposition n x n.

    Args:
        x: rows to map from, [n, d_in]; y: rows to map to, [n, d_out].
        alpha: penalty in units of the mean diagonal (0.01 to 0.1 are usual), "cv", or "gcv" (generalised
            cross-validation: no folds, one decomposition in all).
        alphas: candidates for both, in the same units; the absolute values are equal in all folds, as in GridSearchCV.
        groups: one label per row; rows of one label (one prompt) never meet across a fold. None: every row its own.
        folds: number of folds; seed: shuffles the groups into them.
        dtype: of the map; the solve is in float64.

    Raises:
        UserError: as `fit_pinv`; alpha below 0; fewer groups than folds.

    >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    >>> fit = fit_ridge(x, 2 * x + 1)
    >>> fit.alpha, [round(v, 2) for v in fit.map(torch.ones(3)).tolist()]
    (0.0001, [3.0, 3.0, 3.0])
    """
    x, y = check_rows(x, y)
    basis, inner = _row_basis(x)
    if alpha == "cv":
        assigned = fold_ids(len(x), groups=groups, folds=folds, seed=seed).to(x.device)
        parts = [Moments().update({"x": inner[assigned == k], "y": y[assigned == k]}) for k in range(folds)]
    else:
        parts = [Moments().update({"x": inner, "y": y})]
    options: dict[str, Any] = {"alpha": alpha, "alphas": alphas, "width": x.shape[1], "dtype": torch.float64}
    fit = fit_ridge_targets(parts, "x", ["y"], **options)["y"]
    return replace(fit, map=_in_rows(fit.map, basis, dtype))


def fit_ridge_moments(
    parts: Sequence[Moments],
    *,
    alpha: Choice = "cv",
    alphas: Sequence[int | float] = ALPHAS,
    source: str = "x",
    target: str = "y",
    dtype: torch.dtype = torch.float32,
) -> RidgeFit:
    """`fit_ridge` from accumulated moments, one per fold: no row is read again."""
    return fit_ridge_targets(parts, source, [target], alpha=alpha, alphas=alphas, dtype=dtype)[target]


def ridge_path(
    x: Float[Tensor, "n d_in"],
    y: Float[Tensor, "m d_out"],
    alphas: Sequence[int | float] = ALPHAS,
    *,
    dtype: torch.dtype = torch.float32,
) -> list[LinearMap]:
    """One ridge map per alpha (in units of the mean diagonal), all from one eigendecomposition."""
    x, y = check_rows(x, y)
    basis, inner = _row_basis(x)
    maps: list[LinearMap] = []
    spectrum = Spectrum.of(Moments().update({"x": inner, "y": y}))
    unit = float(spectrum.values.sum()) / x.shape[1]
    path = spectrum.path("y", [penalty(alpha) * unit for alpha in alphas])
    for alpha, fitted in zip(alphas, path, strict=True):
        fitted = replace(fitted, meta={**fitted.meta, "alpha": float(alpha)})
        maps.append(_in_rows(fitted, basis, dtype))
    return maps


def fold_ids(n: int, *, groups: Collection[Any] | None = None, folds: int = 5, seed: int = 0) -> Int64[Tensor, " n"]:
    """The fold of each row, 0..folds-1: groups are shuffled by `seed` and dealt out in turn.

    >>> fold_ids(4, groups=["a", "a", "b", "b"], folds=2).unique_consecutive().shape
    torch.Size([2])
    """
    if groups is not None and len(groups) != n:
        raise UserError(f"groups must name one group per row; got {len(groups)} for {n} rows")
    labels = range(n) if groups is None else groups.tolist() if isinstance(groups, Tensor | np.ndarray) else groups
    order = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    if not 2 <= folds <= len(order):
        raise UserError(f"folds must lie in 2..{len(order)} (the number of prompts); got {folds}")
    place = torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))
    return torch.tensor([int(place[order[label]]) % folds for label in labels])


def _row_basis(x: Tensor) -> tuple[Tensor | None, Tensor]:
    """(Q, x @ Q) with Q an orthonormal basis [d, n] of the span of the rows where n < d, else (None, x)."""
    if len(x) >= x.shape[1]:
        return None, x
    q, r = torch.linalg.qr(x.T)
    return q, r.T


def _in_rows(fitted: LinearMap, basis: Tensor | None, dtype: torch.dtype) -> LinearMap:
    """The map of the rows themselves, where the fit saw their coordinates in a basis [d, n] of their span."""
    weight = fitted.weight if basis is None else basis @ fitted.weight
    return LinearMap(weight.to(dtype), fitted.bias.to(dtype), fitted.meta)
