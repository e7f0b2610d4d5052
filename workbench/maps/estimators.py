"""The fitters as scikit-learn estimators: `fit`, `predict`, `score`, trailing underscores, clone and grid search."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from .fit import ALPHAS, fit_pinv, fit_ridge
from .linear_map import LinearMap


class _MapEstimator(MultiOutputMixin, RegressorMixin, BaseEstimator, ABC):
    """What both estimators share: validation, prediction and the shape of y."""

    def fit(self, X: Any, y: Any, groups: Any = None) -> _MapEstimator:
        """Fits the map from rows X [n, d_in] to y [n, d_out] or [n].

        Args:
            groups: one label per row, for cross-validation by prompt.
        """
        X, y = validate_data(self, X, y, multi_output=True, y_numeric=True, dtype=np.float64, ensure_min_samples=2)
        table = np.asarray(y, dtype=np.float64)
        single = table.ndim == 1
        rows = torch.from_numpy(np.array(X)), torch.from_numpy(np.array(table.reshape(len(table), -1)))
        self.map_ = self._fit(*rows, groups)
        weight, bias = self.map_.weight.T.numpy(), self.map_.bias.numpy()
        self.coef_: NDArray[np.float64] = weight[0] if single else weight
        self.intercept_: Any = bias[0] if single else bias
        return self

    def predict(self, X: Any) -> NDArray[np.float64]:
        """X @ W + b, [n, d_out], or [n] where y was one column without a second axis."""
        check_is_fitted(self)
        rows = validate_data(self, X, reset=False, dtype=np.float64)
        predicted = self.map_(torch.from_numpy(np.array(rows))).numpy()
        return predicted[:, 0] if self.coef_.ndim == 1 else predicted

    @abstractmethod
    def _fit(self, x: torch.Tensor, y: torch.Tensor, groups: Any) -> LinearMap:
        """The map of float64 rows x [n, d_in] to y [n, d_out]."""


class RidgeMap(_MapEstimator):
    """Centred ridge (`workbench.maps.fit.fit_ridge`) as an estimator; float64 throughout.

    Args:
        alpha: penalty in units of the mean diagonal of the centred X'X, or "cv".
        alphas: candidates for "cv".
        folds: number of folds; fewer where there are fewer rows.
        random_state: seed that deals the groups into folds.

    After `fit`: `map_` (LinearMap), `coef_` [d_out, d_in], `intercept_` [d_out], `alpha_` (relative, as `alpha`),
    `alpha_absolute_` (as sklearn's Ridge counts it) and `cv_` ((alpha, R2) for every candidate).

    >>> X = np.arange(12.0).reshape(6, 2) ** 2
    >>> round(float(RidgeMap(alpha=0.0).fit(X, X @ [1.0, 2.0] + 3).intercept_), 6)
    3.0
    """

    def __init__(self, alpha: Any = "cv", alphas: Any = ALPHAS, folds: Any = 5, random_state: Any = 0) -> None:
        # untyped on purpose: scikit-learn asks that __init__ take anything and that fit does the checking
        self.alpha = alpha
        self.alphas = alphas
        self.folds = folds
        self.random_state = random_state

    def _fit(self, x: torch.Tensor, y: torch.Tensor, groups: Any) -> LinearMap:
        folds = min(self.folds, len(x if groups is None else set(groups)))
        options: dict[str, Any] = {"alpha": self.alpha, "alphas": self.alphas, "groups": groups, "folds": folds}
        fit = fit_ridge(x, y, seed=self.random_state, dtype=torch.float64, **options)
        self.alpha_, self.alpha_absolute_, self.cv_ = fit.alpha, fit.alpha_absolute, fit.cv
        return fit.map


class PinvMap(_MapEstimator):
    """Minimum-norm least squares without a bias, as Command-V fits its converters (`fit_pinv`).

    Args:
        rtol: singular values below rtol * the largest count as zero; None: max(n, d_in) * eps.

    After `fit`: `map_` (LinearMap), `coef_` [d_out, d_in], `intercept_` (zeros).
    """

    def __init__(self, rtol: Any = None) -> None:
        self.rtol = rtol

    def _fit(self, x: torch.Tensor, y: torch.Tensor, groups: Any) -> LinearMap:
        return fit_pinv(x, y, rtol=self.rtol, dtype=torch.float64)
