"""One interface for all fits: against rows and scikit-learn, the order they must keep, refusals (acceptance check 12)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from sklearn.cross_decomposition import PLSRegression
from sklearn.linear_model import ElasticNet, Lasso, LinearRegression, Ridge

from workbench.errors import UserError
from workbench.maps import METHODS, Moments, fit_map, score_map, sparse_path
from workbench.maps.fit import fit_procrustes
from workbench.maps.spectrum import Spectrum

from .example_rows import F64, activations, folds, moments, noise, relative


@pytest.fixture(scope="module")
def square():
    x, y = activations(800, 16)
    return x, x + 0.3 * y


def weight_of(parts, method: str, **options) -> tuple[torch.Tensor, torch.Tensor]:
    made = fit_map(parts, method, dtype=F64, **options).map
    return made.weight, made.bias


def test_12_every_baseline_is_its_definition(square):
    x, y = square
    parts = folds(x, y)
    cx, cy, eye = x - x.mean(0), y - y.mean(0), torch.eye(16, dtype=F64)
    turn, nuclear = orthogonal_procrustes(cx.numpy(), cy.numpy())
    turn = torch.from_numpy(turn)
    expected = {
        "mean": 0 * eye,
        "identity": eye,
        "identity_bias": eye,
        "scalar": (x * y).sum() / x.square().sum() * eye,
        "scalar_bias": (cx * cy).sum() / cx.square().sum() * eye,
        "procrustes": turn,
        "procrustes_scaled": turn * nuclear / cx.square().sum(),
        "lstsq": torch.linalg.lstsq(cx, cy).solution,
    }
    for method, weight in expected.items():
        found, bias = weight_of(parts, method)
        assert float((found - weight).abs().max()) <= 1e-10, method
        centre = 0 * bias if method in ("identity", "scalar") else y.mean(0) - x.mean(0) @ weight
        assert float((bias - centre).abs().max()) <= 1e-9, method
    assert relative(fit_procrustes(x, y, dtype=F64).weight, turn) <= 1e-10
    known = Ridge(alpha=30.0).fit(x.numpy(), y.numpy())
    assert relative(weight_of(parts, "ridge", alpha=30.0, absolute=True)[0], torch.from_numpy(known.coef_.T)) <= 1e-10
    plain = LinearRegression(fit_intercept=False).fit(x.numpy(), y.numpy())
    assert relative(weight_of(parts, "lstsq", bias=False)[0], torch.from_numpy(plain.coef_.T)) <= 1e-9


def test_12_baselines_keep_their_order_in_sample(square):
    whole = moments(*square)
    score = {m: score_map(fit_map([whole], m, dtype=F64).map, whole).r2_weighted
             for m in ("mean", "identity", "identity_bias", "scalar", "scalar_bias", "procrustes", "procrustes_scaled",
                       "lstsq")}  # fmt: skip
    score["ridge"] = score_map(fit_map([whole], "ridge", alpha=0.1, dtype=F64).map, whole).r2_weighted
    assert score["mean"] == pytest.approx(0, abs=1e-12)
    assert score["identity"] <= score["identity_bias"] <= score["scalar_bias"] <= score["procrustes_scaled"]
    assert score["identity"] <= score["scalar"] <= score["scalar_bias"]
    assert score["identity_bias"] <= score["procrustes"] <= score["procrustes_scaled"] <= score["lstsq"]
    assert score["ridge"] <= score["lstsq"]


@pytest.mark.parametrize("l1_ratio", [1.0, 0.5])
def test_sparse_maps_are_sklearns(l1_ratio):
    x, y = activations(400, 12, 5)
    alphas = (0.3, 0.01)
    path = sparse_path(Spectrum.of(moments(x, y)), alphas=alphas, l1_ratio=l1_ratio, tolerance=1e-13,
                       max_iterations=100_000)  # fmt: skip
    for alpha, made in zip(alphas, path.maps, strict=True):
        plain = Lasso(alpha=alpha, tol=1e-12, max_iter=100_000) if l1_ratio == 1 else ElasticNet(
            alpha=alpha, l1_ratio=l1_ratio, tol=1e-12, max_iter=100_000)  # fmt: skip
        known = plain.fit(x.numpy(), y.numpy())
        np.testing.assert_allclose(made.weight.T, known.coef_, atol=1e-8)
        np.testing.assert_allclose(made.bias, known.intercept_, atol=1e-7)
        assert int((made.weight == 0).sum()) == int((known.coef_ == 0).sum())
    assert path.converged
    assert not sparse_path(Spectrum.of(moments(x, y)), max_iterations=1).converged


def test_a_sparse_truth_is_chosen_by_folds():
    x = noise(500, 20)
    weight = torch.zeros(20, 3, dtype=F64)
    weight[:3] = 1
    fit = fit_map(folds(x, x @ weight + noise(500, 3, seed=1)), "lasso", alphas=(1e-4, 0.1, 10.0), dtype=F64)
    assert fit.chosen == {"alpha": 0.1, "l1_ratio": 1.0}
    assert int((fit.map.weight[3:] == 0).sum()) > 30
    assert [c.options["alpha"] for c in fit.tried] == [1e-4, 0.1, 10.0]
    mixed = fit_map(folds(x, x @ weight), "elastic_net", alphas=(0.1,), l1_ratios=(0.1, 0.9))
    assert len(mixed.tried) == 2


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("d_out", [1, 6])
def test_pls_is_sklearns(scale, d_out):
    x, y = activations(400, 10, d_out)
    fit = fit_map([moments(x, y)], "pls", components=7, scale=scale, dtype=F64)
    for k in (1, 3, 7):
        known = PLSRegression(k, scale=scale, tol=1e-14, max_iter=100_000).fit(x.numpy(), y.numpy())
        predicted = known.predict(x.numpy()).reshape(400, d_out)
        np.testing.assert_allclose(fit.family.map(k)(x), predicted, atol=1e-6)


def test_the_rank_of_a_planted_channel_is_chosen_by_folds():
    x = noise(3000, 30)
    y = x @ noise(30, 4, seed=1) @ noise(4, 30, seed=2) / 5 + noise(3000, 30, seed=3)
    parts = folds(x, y)
    for metric in ("uniform", "weighted", "whitened"):
        fit = fit_map(parts, "reduced_rank", metric=metric)
        assert fit.chosen["rank"] == 4, metric
        assert fit.map.rank == 4
    assert len(fit.tried) == 30
    cut = fit_map(parts, "truncation", rank=4, alpha="gcv")
    assert cut.map.rank == 4
    assert cut.chosen["alpha_absolute"] > 0
    assert cut.family is not None
    assert fit_map(parts, "pls", at_most=6).chosen["rank"] <= 6


def test_ridge_by_folds_by_gcv_and_the_truth():
    x, y = activations(600, 10)
    by_folds, by_gcv = fit_map(folds(x, y), "ridge"), fit_map([moments(x, y)], "ridge", alpha="gcv")
    assert by_folds.notes == by_gcv.notes == ()
    assert len(by_folds.tried) == len(by_gcv.tried) == 11
    assert by_folds.map.meta["method"] == "ridge"
    assert by_folds.n == 600


def test_few_rows_get_a_note_and_fewer_are_refused():
    x, y = activations(90, 60)
    assert fit_map([moments(x, y)], "ridge", alpha=0.1).notes == (
        "90 rows are few for width 60 (n/d = 1.50): have at least 120",
    )
    assert "have at least 600" in fit_map([moments(x, y)], "lstsq").notes[0]
    with pytest.raises(UserError, match=r"lstsq from width 60 needs at least 62 rows; got 50: .* or use ridge"):
        fit_map([moments(x[:50], y[:50])], "lstsq")
    with pytest.raises(UserError, match="ridge from width 60 needs at least 6 rows; got 5: profile more prompts"):
        fit_map([moments(x[:5], y[:5])], "ridge", alpha=0.1)


def test_dimensions_that_never_vary_are_named():
    x, y = activations(200, 6)
    x[:, 2], y[:, :2] = 5.1, -0.3
    notes = fit_map([moments(x, y)], "ridge", alpha=0.1).notes
    assert notes == ("1 of 6 dimensions of x never vary", "2 of 6 dimensions of y never vary")
    with pytest.raises(UserError, match="y is constant"):
        fit_map([moments(x, torch.full((200, 3), 0.1))], "ridge", alpha=0.1)


def test_nan_in_saved_moments_is_refused():
    part = moments(*activations(100, 4))
    part.product["x", "x"][0, 0] = torch.nan
    with pytest.raises(UserError, match="hold NaN or infinite"):
        fit_map([part], "ridge", alpha=0.1)


@pytest.mark.parametrize(
    ("message", "method", "options"),
    [
        ("method must be one of mean, identity", "best", {}),
        ("ridge has no option 'rank'; it has alpha, alphas", "ridge", {"rank": 3}),
        ("mean has no option 'alpha'; it has none", "mean", {"alpha": 3}),
        ("identity needs equal widths; 'x' has 6 and 'y' 4", "identity", {}),
        (r'rank must lie in 1\.\.4, or be "cv"; got 5', "reduced_rank", {"rank": 5}),
        (r"components must lie in 1\.\.6; got 0", "pls", {"components": 0}),
        ("at least two folds", "reduced_rank", {}),
        ("at least two folds", "lasso", {}),
        ("at least one alpha", "elastic_net", {"alphas": ()}),
        ("from 0 up", "lasso", {"alpha": -1.0}),
        (r"l1_ratio must lie in 0\.\.1; got 2", "elastic_net", {"alpha": 1.0, "l1_ratios": (2,)}),
    ],
)
def test_bad_input_is_one_clear_line(message, method, options):
    part = moments(*activations(100, 6, 4))
    with pytest.raises(UserError, match=message) as raised:
        fit_map([part], method, **options)
    assert "\n" not in str(raised.value)


def test_no_moments_are_refused():
    with pytest.raises(UserError, match="no moments given"):
        fit_map([], "ridge")
    with pytest.raises(UserError, match="no block 'z'"):
        fit_map([moments(*activations(100, 4))], target="z")
    with pytest.raises(UserError, match="name the pair"):
        fit_map([Moments(pairs=[]).update(dict(zip("xy", activations(100, 4), strict=True)))])


def test_every_method_is_deterministic(square):
    parts = folds(*square, 3)
    for method in METHODS:
        assert fit_map(parts, method).map == fit_map(parts, method).map, method
