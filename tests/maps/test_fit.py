"""Fitters against scikit-learn, numpy and planted truths (acceptance checks A4, A5, A9, A10 of the Command-V spec)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, PredefinedSplit

from workbench.errors import UserError
from workbench.maps.fit import fit_pinv, fit_procrustes, fit_ridge, fit_ridge_moments, fold_ids, ridge_path
from workbench.maps.moments import Moments
from workbench.maps.quality import quality, r2

F64 = torch.float64


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def paired(n: int, d_in: int, d_out: int, error: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    x = noise(n, d_in) * torch.logspace(0, -1.5, d_in, dtype=F64) + 3
    return x, x @ noise(d_in, d_out, seed=1) + error * noise(n, d_out, seed=2) - 1


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("n", [300, 2000])
def test_a4_pinv_is_minimum_norm_least_squares(n):
    x, y = noise(n, 512), noise(n, 384, seed=1)
    expected = torch.linalg.lstsq(x, y, driver="gelsd").solution
    assert relative(fit_pinv(x, y, dtype=F64).weight, expected) <= 1e-12


def test_a5_few_rows_interpolate_and_project():
    x, y = noise(60, 100), noise(60, 80, seed=1)
    there, back = fit_pinv(x, y, dtype=F64).weight, fit_pinv(y, x, dtype=F64).weight
    product, projector = there @ back, torch.linalg.pinv(x) @ x
    assert relative(product, projector) <= 1e-12
    assert relative(product @ product, product) <= 1e-12
    assert int(torch.linalg.matrix_rank(product)) == 60
    assert float(((x @ there - y) ** 2).mean()) < 1e-10
    many = noise(300, 100)
    noisy = many @ noise(100, 80, seed=3) + noise(300, 80, seed=4)
    assert float(((fit_pinv(many, noisy, dtype=F64)(many) - noisy) ** 2).mean()) > 0.1


@pytest.mark.parametrize("n", [200, 40])
def test_a9_planted_linear_truth_is_found(n):
    k, d_in, d_out = 10, 64, 48
    z, held = noise(n, k), noise(100, k, seed=9)
    a, b = noise(k, d_in, seed=1), noise(k, d_out, seed=2)
    for fitted in (fit_pinv(z @ a, z @ b), fit_ridge(z @ a, z @ b, alpha=1e-6).map, fit_ridge(z @ a, z @ b).map):
        assert r2(held @ b, fitted(held @ a)).uniform >= 0.9999


def test_a9_procrustes_recovers_a_rotation():
    x, q = noise(200, 32), torch.linalg.qr(noise(32, 32, seed=1)).Q
    fitted = fit_procrustes(x, x @ q + 2, dtype=F64)
    assert float((fitted.weight - q).abs().max()) <= 1e-6
    narrow = fit_procrustes(x, x @ q[:, :8], dtype=F64).weight
    torch.testing.assert_close(narrow.T @ narrow, torch.eye(8, dtype=F64))


def test_a10_double_descent_guard():
    d_in, d_out, n, k = 1024, 2048, 1030, 128
    a, b = noise(k, d_in, seed=1) / k**0.5, noise(k, d_out, seed=2) / k**0.5

    def sample(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        z = noise(rows, k, seed=seed)
        return z @ a + 0.3 * noise(rows, d_in, seed=seed + 1), z @ b + 0.2 * noise(rows, d_out, seed=seed + 2)

    x, y = sample(n, 10)
    held_x, held_y = sample(300, 20)
    peak = quality(fit_pinv(x, y), held_x, held_y, train_mean=y.mean(0))
    default = quality(fit_ridge(x, y, alphas=[0.03, 0.3, 3.0], folds=2).map, held_x, held_y, train_mean=y.mean(0))
    fixed = quality(fit_ridge(x, y, alpha=0.1).map, held_x, held_y, train_mean=y.mean(0))
    assert peak.r2_uniform < 0
    assert default.r2_uniform >= 0.85
    assert fixed.r2_uniform >= 0.85
    for scored in (peak, default, fixed):
        assert scored.warning is not None
        assert "1030/1024" in scored.warning


@pytest.mark.parametrize(("n", "d_in"), [(300, 40), (60, 90)])
def test_ridge_path_is_sklearn_ridge(n, d_in):
    x, y = paired(n, d_in, 12)
    unit = float((x - x.mean(0)).square().sum() / d_in)
    alphas = [1e-3, 0.1, 10.0]
    for alpha, fitted in zip(alphas, ridge_path(x, y, alphas, dtype=F64), strict=True):
        ridge = Ridge(alpha=alpha * unit, solver="svd").fit(x.numpy(), y.numpy())
        assert relative(fitted.weight, torch.from_numpy(ridge.coef_.T)) <= 1e-8
        assert relative(fitted.bias, torch.from_numpy(ridge.intercept_)) <= 1e-8
        assert fit_ridge(x, y, alpha=alpha, dtype=F64).map == fitted


@pytest.mark.parametrize(("n", "d_in"), [(300, 20), (60, 90)])
def test_cross_validation_is_grid_search(n, d_in):
    x, y = paired(n, d_in, 6, error=2.0)
    groups = [i // 3 for i in range(n)]
    alphas = [1e-3, 1e-2, 0.1, 1.0, 10.0]
    fit = fit_ridge(x, y, alphas=alphas, groups=groups, dtype=F64)
    unit = float((x - x.mean(0)).square().sum() / d_in)
    split = PredefinedSplit(fold_ids(n, groups=groups).numpy())
    search = GridSearchCV(Ridge(solver="svd"), {"alpha": [a * unit for a in alphas]}, scoring="r2", cv=split)
    search.fit(x.numpy(), y.numpy())
    np.testing.assert_allclose([score for _, score in fit.cv], search.cv_results_["mean_test_score"], atol=1e-8)
    assert fit.alpha_absolute == pytest.approx(search.best_params_["alpha"], rel=1e-10)
    assert relative(fit.map.weight, torch.from_numpy(search.best_estimator_.coef_.T)) <= 1e-8


def test_ridge_from_moments_is_ridge_from_rows():
    x, y = paired(200, 10, 4)
    assigned = fold_ids(200)
    parts = [Moments().update({"a": x[assigned == k], "b": y[assigned == k]}) for k in range(5)]
    from_moments, from_rows = fit_ridge_moments(parts, source="a", target="b", dtype=F64), fit_ridge(x, y, dtype=F64)
    assert from_moments.alpha == from_rows.alpha
    assert relative(from_moments.map.weight, from_rows.map.weight) <= 1e-10


def test_folds_keep_groups_together_and_follow_the_seed():
    groups = ["a", "b", "c", "d", "e", "f"] * 4
    ids = fold_ids(24, groups=groups, folds=3)
    for label in set(groups):
        assert len({int(i) for i, g in zip(ids, groups, strict=True) if g == label}) == 1
    assert torch.bincount(ids).tolist() == [8, 8, 8]
    assert torch.equal(ids, fold_ids(24, groups=groups, folds=3))
    with pytest.raises(UserError, match=r"2\.\.6"):
        fold_ids(24, groups=groups, folds=7)
    for labels in (torch.tensor([3, 3, 9, 9]), np.array([3, 3, 9, 9])):
        assert fold_ids(4, groups=labels, folds=2).tolist() in ([0, 0, 1, 1], [1, 1, 0, 0])


def test_shuffled_pairs_fail():
    x, y = paired(400, 20, 8)
    shuffled = y[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    held_x, held_y = x[300:], y[300:]
    assert r2(held_y, fit_ridge(x[:300], y[:300]).map(held_x)).weighted > 0.8
    assert r2(held_y, fit_ridge(x[:300], shuffled[:300]).map(held_x)).weighted < 0.1


def test_constant_outputs_among_others_are_fitted_by_the_bias():
    x, y = paired(100, 5, 3)
    y[:, 1] = 7
    fit = fit_ridge(x, y)
    torch.testing.assert_close(fit.map(x.float())[:, 1], torch.full((100,), 7.0))
    assert fit.cv[0][1] < 1


@pytest.mark.parametrize("fitter", [fit_pinv, fit_procrustes, fit_ridge, ridge_path])
def test_bad_rows_are_refused_in_one_line(fitter):
    x, y = torch.randn(20, 3), torch.randn(20, 2)
    with_nan, with_inf = x.clone(), y.clone()
    with_nan[3, 1], with_inf[4, 0] = float("nan"), float("inf")
    cases = {
        "20 rows of x and 19 rows of y": (x, y[:19]),
        "x holds NaN or infinite values in 1 of 20": (with_nan, y),
        "y holds NaN or infinite values in 1 of 20": (x, with_inf),
        "x is constant": (torch.ones(20, 3), y),
        r"not empty; got shape \[0, 3\]": (x[:0], y[:0]),
        "at least 2 rows": (x[:1], y[:1]),
    }
    for message, (a, b) in cases.items():
        with pytest.raises(UserError, match=message) as raised:
            fitter(a, b)
        assert "\n" not in str(raised.value)


def test_bad_alphas_are_refused():
    x, y = torch.randn(20, 3), torch.randn(20, 2)
    with pytest.raises(UserError, match="from 0 up"):
        fit_ridge(x, y, alpha=-1.0)
    with pytest.raises(UserError, match="at least one alpha"):
        fit_ridge(x, y, alphas=[])
    with pytest.raises(UserError, match=r"2\.\.20"):
        fit_ridge(x, y, folds=21)
