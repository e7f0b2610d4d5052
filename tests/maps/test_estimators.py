"""The estimators keep scikit-learn's contract and equal the fitters."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.cross_decomposition import PLSRegression
from sklearn.linear_model import ElasticNet, LinearRegression
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import check_estimator

from workbench.maps.estimators import ElasticNetMap, PinvMap, PLSMap, ProcrustesMap, ReducedRankMap, RidgeMap
from workbench.maps.fit import fit_pinv, fit_ridge


@pytest.mark.parametrize(
    "estimator",
    [
        RidgeMap(),
        RidgeMap(alpha=0.1),
        RidgeMap(alpha="gcv"),
        PinvMap(),
        ProcrustesMap(),
        ProcrustesMap(scale=True),
        ReducedRankMap(),
        ElasticNetMap(),
        PLSMap(),
    ],
)
def test_check_estimator(estimator):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(estimator, on_skip=None)
    assert {entry["status"] for entry in results} <= {"passed", "skipped"}


def test_equal_to_the_fitters():
    x, y = torch.randn(80, 6, dtype=torch.float64), torch.randn(80, 3, dtype=torch.float64)
    groups = [i // 2 for i in range(80)]
    ridge = RidgeMap().fit(x.numpy(), y.numpy(), groups=groups)
    fit = fit_ridge(x, y, groups=groups, dtype=torch.float64)
    assert ridge.map_ == fit.map
    assert (ridge.alpha_, ridge.cv_) == (fit.alpha, fit.cv)
    pinv = PinvMap().fit(x.numpy(), y.numpy())
    np.testing.assert_array_equal(pinv.predict(x.numpy()), fit_pinv(x, y, dtype=torch.float64)(x).numpy())
    assert pinv.coef_.shape == (3, 6)


def test_grid_search_works_over_it():
    x = np.random.default_rng(0).normal(size=(60, 4))
    search = GridSearchCV(RidgeMap(), {"alpha": [0.01, 1.0]}, cv=3).fit(x, x @ np.ones(4))
    assert search.best_params_ == {"alpha": 0.01}
    assert search.predict(x).shape == (60,)


def test_the_other_estimators_equal_scikit_learns():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 6))
    y = x @ rng.normal(size=(6, 4)) + rng.normal(size=(200, 4))
    pairs = [
        (PLSMap(components=3), PLSRegression(3, tol=1e-14, max_iter=10_000), 1e-6),
        (ElasticNetMap(alpha=0.2, tol=1e-12), ElasticNet(alpha=0.2, tol=1e-12), 1e-8),
        (ReducedRankMap(rank=4), LinearRegression(), 1e-10),
    ]
    for mine, known, bound in pairs:
        np.testing.assert_allclose(mine.fit(x, y).predict(x), known.fit(x, y).predict(x), atol=bound)
        assert mine.score(x, y) == pytest.approx(known.score(x, y), abs=1e-6)
    assert ReducedRankMap(rank=2, metric="whitened").fit(x, y).map_.rank == 2
    search = GridSearchCV(ReducedRankMap(), {"rank": [1, 2, 4]}, cv=3).fit(x, y)
    assert search.best_params_ == {"rank": 4}
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    np.testing.assert_allclose(ProcrustesMap().fit(x, x @ turn + 1).coef_, turn.T, atol=1e-10)
