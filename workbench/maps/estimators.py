"""The fitters as scikit-learn estimators: `fit`, `predict`, `score`, trailing underscores, clone and grid search."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from .baselines import baseline
from .fit import check_rows, fit_pinv, fit_ridge
from .linear_map import LinearMap
from .moments import Moments
from .pls import partial_least_squares
from .reduced_rank import optimal_ranks
from .ridge import ALPHAS, penalty
from .sparsity import sparse_path
from .spectrum import Spectrum


class _MapEstimator(MultiOutputMixin, RegressorMixin, BaseEstimator, ABC):
    """What the estimators share: validation, prediction and the shape of y."""

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
        alpha: penalty in units of the mean diagonal of the centred X'X, "cv" or "gcv".
        alphas: candidates for "cv" and "gcv".
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


class ProcrustesMap(_MapEstimator):
    """The orthogonal map nearest in least squares, with a bias (`baseline`).

    Args:
        scale: multiply the rotation by the best number.

    After `fit`: `map_` (LinearMap), `coef_` [d_out, d_in], `intercept_` [d_out].
    """

    def __init__(self, scale: Any = False) -> None:
        self.scale = scale

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.regressor_tags.poor_score = True  # a rotation fits only what was rotated
        return tags

    def _fit(self, x: torch.Tensor, y: torch.Tensor, groups: Any) -> LinearMap:
        return baseline(_moments(x, y), "procrustes_scaled" if self.scale else "procrustes")


class ReducedRankMap(_MapEstimator):
    """The best map of one rank (`optimal_ranks`), with a bias.

    Args:
        rank: of the map, or of y - x with `update`; from 1 to the smaller width.
        alpha: ridge penalty in units of the mean diagonal of the centred X'X.
        metric: the R2 that is maximised: "weighted", "uniform" or "whitened".
        update: constrain the rank of what is added to the identity.

    After `fit`: `map_` (LinearMap), `coef_` [d_out, d_in], `intercept_` [d_out], `family_` (the maps of every rank).
    """

    def __init__(self, rank: Any = 1, alpha: Any = 0.0, metric: Any = "weighted", update: Any = False) -> None:
        self.rank = rank
        self.alpha = alpha
        self.metric = metric
        self.update = update

    def _fit(self, x: torch.Tensor, y: torch.Tensor, groups: Any) -> LinearMap:
        spectrum = Spectrum.of(_moments(x, y))
        absolute = penalty(self.alpha) * spectrum.unit
        self.family_ = optimal_ranks(spectrum, alpha=absolute, metric=self.metric, update=self.update)
        return self.family_.map(self.rank)


class ElasticNetMap(_MapEstimator):
    """Lasso and elastic net for all outputs at once (`sparse_path`), with a bias.

    Args:
        alpha, l1_ratio: as scikit-learn's `ElasticNet`; l1_ratio=1 is the lasso.
        tol: share of the largest |X'y| / n to which the optimality conditions hold.
        max_iter: steps at most; `gap_` says what was reached.

    After `fit`: `map_` (LinearMap), `coef_` [d_out, d_in], `intercept_` [d_out], `gap_`, `n_iter_`.
    """

    def __init__(self, alpha: Any = 0.1, l1_ratio: Any = 0.5, tol: Any = 1e-7, max_iter: Any = 5000) -> None:
        self.alpha = alpha
        self.l1_ratio = l1_ratio
        self.tol = tol
        self.max_iter = max_iter

    def _fit(self, x: torch.Tensor, y: torch.Tensor, groups: Any) -> LinearMap:
        options: dict[str, Any] = {"l1_ratio": self.l1_ratio, "tolerance": self.tol, "max_iterations": self.max_iter}
        path = sparse_path(Spectrum.of(_moments(x, y)), alphas=[penalty(self.alpha)], **options)
        self.gap_, self.n_iter_ = path.gaps[0], path.iterations[0]
        return path.maps[0]


class PLSMap(_MapEstimator):
    """Partial least squares regression (`partial_least_squares`), with a bias.

    Args:
        components: how many; where fewer explain everything, those.
        scale: standardise the columns of both sides first.

    After `fit`: `map_` (LinearMap), `coef_` [d_out, d_in], `intercept_` [d_out], `family_` (every number of components).
    """

    def __init__(self, components: Any = 1, scale: Any = True) -> None:
        self.components = components
        self.scale = scale

    def _fit(self, x: torch.Tensor, y: torch.Tensor, groups: Any) -> LinearMap:
        self.family_ = partial_least_squares(_moments(x, y), components=self.components, scale=self.scale)
        return self.family_.map(self.family_.highest)


def _moments(x: torch.Tensor, y: torch.Tensor) -> Moments:
    x, y = check_rows(x, y)
    return Moments().update({"x": x, "y": y})
