"""Ridge maps from moments, their penalty given or chosen by folds or by generalised cross-validation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import UserError
from .linear_map import LinearMap
from .moments import Moments, total
from .scores import HeldOut
from .spectrum import Spectrum
from .whitening import Whitener

ALPHAS: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
"""relative penalties, in units of the mean diagonal of the centred X'X"""
REFERENCE_ALPHAS: tuple[float, ...] = (0.1, 1.0, 10.0, 100.0, 1e3, 2e3, 5e3, 1e4)
"""absolute penalties of arXiv:2508.17540, released code `transport_operator.py:87-99`"""
Choice = int | float | Literal["cv", "gcv"]


@dataclass(frozen=True)
class RidgeFit:
    """A ridge map and how its penalty was chosen."""

    map: LinearMap
    alpha: float
    """chosen penalty in units of the mean diagonal of the centred X'X"""
    alpha_absolute: float
    """the same as sklearn.linear_model.Ridge counts it: alpha * mean diagonal"""
    cv: tuple[tuple[float, float], ...]
    """(alpha, score) for every candidate, in the units that the candidates were given in; the score is the mean over
    folds of the held-out R2, or the R2 by GCV; empty where alpha was given"""
    folds: tuple[tuple[float, ...], ...] = ()
    """the held-out R2 of every fold (outer) and candidate (inner)"""


def fit_ridge_targets(
    parts: Sequence[Moments],
    source: str,
    targets: Sequence[str],
    *,
    alpha: Choice = "cv",
    alphas: Sequence[int | float] = ALPHAS,
    absolute: bool = False,
    metric: str = "uniform",
    centred: bool = True,
    dtype: torch.dtype = torch.float32,
    width: int | None = None,
) -> dict[str, RidgeFit]:
    """Ridge maps from one source to many targets: one eigendecomposition per training set serves them all.

    `iter_ridge_targets` hands out the same fits one by one.

    Args:
        parts: moments, one per fold; for "gcv" or a given alpha their division does not matter.
        source, targets: names of blocks.
        alpha: a penalty; "cv": the best mean held-out R2 over the folds; "gcv": generalised cross-validation, one
            decomposition in all.
        alphas: candidates; equal absolute values in all folds, as in GridSearchCV.
        absolute: penalties count as in sklearn's Ridge; False: in units of the mean diagonal of X'X.
        metric: which held-out R2 chooses: "uniform" (as sklearn's), "weighted" or "whitened".
        centred: False: no bias, moments about zero.
        dtype: of the maps; the solve is in float64.
        width: of the source before a change of basis; default its own.

    Raises:
        UserError: alpha below 0, no candidate, fewer than two folds, a source that never varies, too few rows for "gcv"
            to score any candidate.

    Source: formulas and their proofs in Golub, Heath, Wahba 1979 and in the notes of `HeldOut.path`.
    """
    return dict(iter_ridge_targets(parts, source, targets, alpha=alpha, alphas=alphas, absolute=absolute, metric=metric,
                                   centred=centred, dtype=dtype, width=width))  # fmt: skip


def iter_ridge_targets(
    parts: Sequence[Moments],
    source: str,
    targets: Sequence[str],
    *,
    alpha: Choice = "cv",
    alphas: Sequence[int | float] = ALPHAS,
    absolute: bool = False,
    metric: str = "uniform",
    centred: bool = True,
    dtype: torch.dtype = torch.float32,
    width: int | None = None,
) -> Iterator[tuple[str, RidgeFit]]:
    """`fit_ridge_targets` target by target: no more than one map need be held at a time."""
    pairs = [(source, target) for target in targets]
    chosen_parts = [part.select(pairs) for part in parts]
    whole = total(chosen_parts)
    spectrum = Spectrum.of(whole, source, centred=centred)
    unit = float(spectrum.values.sum()) / (width or len(spectrum.values))
    scale = 1.0 if absolute else unit
    if alpha in ("cv", "gcv"):
        if not alphas or (alpha == "cv" and len(parts) < 2):
            raise UserError("cross-validation needs at least one alpha and two folds")
        penalties = [penalty(a) * scale for a in alphas]
    else:
        penalties = [penalty(alpha) * scale]
    scores: dict[str, Tensor] = {}
    if alpha == "cv":
        scores = fold_scores(whole, chosen_parts, source, targets, penalties, metric=metric, centred=centred)
    for target in targets:
        cross = spectrum.cross(target)
        found = spectrum.gcv(target, penalties, cross=cross)[None] if alpha == "gcv" else scores.get(target)
        yield target, _chosen(spectrum, target, cross, found, alphas, penalties, unit, dtype)


def fold_scores(
    whole: Moments,
    parts: Sequence[Moments],
    source: str,
    targets: Sequence[str],
    penalties: Sequence[float],
    *,
    metric: str = "uniform",
    centred: bool = True,
) -> dict[str, Tensor]:
    """The held-out R2 of every fold and absolute penalty, [fold, penalty], for every target; training = whole - fold."""
    scores = {target: torch.zeros(len(parts), len(penalties), dtype=torch.float64) for target in targets}
    for i, part in enumerate(parts):
        train = Spectrum.of(whole - part, source, centred=centred)
        held = HeldOut.of(train, part)
        for target in targets:
            white = Whitener.of_block(train.train, target) if metric == "whitened" else None
            scores[target][i] = held.path(target, penalties, metric, whitener=white)
    return scores


def penalty(alpha: int | float | str) -> float:
    """A penalty that is a number from 0 up, else UserError."""
    if isinstance(alpha, str) or not 0 <= alpha < float("inf"):
        raise UserError(f'alpha must be a number from 0 up, or "cv" or "gcv"; got {alpha!r}')
    return float(alpha)


def _chosen(
    spectrum: Spectrum,
    target: str,
    cross: Tensor,
    scores: Tensor | None,
    alphas: Sequence[int | float],
    penalties: list[float],
    unit: float,
    dtype: torch.dtype,
) -> RidgeFit:
    cv: tuple[tuple[float, float], ...] = ()
    folds: tuple[tuple[float, ...], ...] = ()
    best = 0
    if scores is not None:
        mean = scores.mean(0).tolist()
        cv = tuple(zip(map(float, alphas), mean, strict=True))
        best = max(range(len(mean)), key=mean.__getitem__)
        if not mean[best] > -math.inf:
            raise UserError(f"gcv has too few rows to choose a penalty for {spectrum.source} to {target}: {spectrum.train.n} "
                            "rows leave no degree of freedom at any of the candidates; use cv or a number, or give more "
                            "rows")  # fmt: skip
        folds = tuple(map(tuple, scores.tolist())) if len(scores) > 1 else ()
    made = spectrum.ridge(target, penalties[best], dtype=dtype, cross=cross)
    relative = penalties[best] / unit
    made = LinearMap(made.weight, made.bias, {**made.meta, "alpha": relative})
    return RidgeFit(made, relative, penalties[best], cv, folds)
