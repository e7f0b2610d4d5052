"""Linear maps between rows of activations: fitting, composing, scoring, saving. Tensors only; no models."""

from __future__ import annotations

from .fit import ALPHAS, RidgeFit, fit_pinv, fit_procrustes, fit_ridge, fit_ridge_moments, fold_ids, ridge_path
from .linear_map import LinearMap
from .moments import Moments, total
from .quality import R2, Quality, mahalanobis, quality, r2, row_warning

__all__ = [
    "ALPHAS",
    "R2",
    "LinearMap",
    "Moments",
    "Quality",
    "RidgeFit",
    "fit_pinv",
    "fit_procrustes",
    "fit_ridge",
    "fit_ridge_moments",
    "fold_ids",
    "mahalanobis",
    "quality",
    "r2",
    "ridge_path",
    "row_warning",
    "total",
]
