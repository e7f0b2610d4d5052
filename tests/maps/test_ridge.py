"""The ridge path, its folds, GCV and leave-one-out against scikit-learn and refits (acceptance checks 2, 3, 5)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV, KFold

from workbench.errors import UserError
from workbench.maps import REFERENCE_ALPHAS, HeldOut, Moments, Spectrum, fit_ridge_targets, leave_one_out, score_map

from .example_rows import activations, folds, moments, noise, relative


@pytest.mark.parametrize(("products", "bound"), [(torch.float64, 1e-6), (torch.float32, 1e-3)])
def test_2_path_is_sklearn_ridge(products, bound):
    x, y = activations(1500, 48)
    train, held = slice(0, 1200), slice(1200, 1500)
    spectrum = Spectrum.of(Moments(products=products).update({"x": x[train], "y": y[train]}))
    part = moments(x[held], y[held])
    scores = HeldOut.of(spectrum, part).path("y", REFERENCE_ALPHAS)
    for alpha, made, score in zip(REFERENCE_ALPHAS, spectrum.path("y", REFERENCE_ALPHAS), scores, strict=True):
        known = Ridge(alpha=alpha).fit(x[train].numpy(), y[train].numpy())
        assert relative(made.weight, torch.from_numpy(known.coef_.T)) <= bound
        assert relative(made.bias, torch.from_numpy(known.intercept_)) <= bound
        assert float(score) == pytest.approx(known.score(x[held].numpy(), y[held].numpy()), abs=1e-6)


def test_3_every_fold_and_alpha_is_grid_search():
    x, y = activations(1200, 40)
    search = GridSearchCV(Ridge(), {"alpha": REFERENCE_ALPHAS}, scoring="r2", cv=KFold(5)).fit(x.numpy(), y.numpy())
    fit = fit_ridge_targets(folds(x, y), "x", ["y"], alphas=REFERENCE_ALPHAS, absolute=True)["y"]
    known = np.stack([search.cv_results_[f"split{i}_test_score"] for i in range(5)])
    np.testing.assert_allclose(np.array(fit.folds), known, atol=1e-6)
    np.testing.assert_allclose([score for _, score in fit.cv], search.cv_results_["mean_test_score"], atol=1e-6)
    assert fit.alpha_absolute == search.best_params_["alpha"]


@pytest.mark.parametrize("metric", ["uniform", "weighted", "whitened"])
def test_the_fast_path_scores_as_the_map_itself(metric):
    x, y = activations(900, 20, 14)
    y[:, 3] = 7
    train, held = moments(x[:600], y[:600]), moments(x[600:], y[600:])
    spectrum = Spectrum.of(train)
    fast = HeldOut.of(spectrum, held).path("y", [0.1, 10.0, 1e3], metric)
    for made, score in zip(spectrum.path("y", [0.1, 10.0, 1e3]), fast, strict=True):
        slow = score_map(made, held, train=train)
        assert float(score) == pytest.approx(slow.as_dict()[f"r2_{metric}"], abs=1e-10)
        assert bool(slow.per_output[3].isnan())
        direct = r2_score(y[600:], made(x[600:]), multioutput="raw_values")
        live = [j for j in range(14) if j != 3]
        np.testing.assert_allclose(slow.per_output[live], direct[live], atol=1e-10)


def test_whitened_r2_is_its_definition():
    x, y = activations(800, 12)
    train, held = moments(x[:500], y[:500]), moments(x[500:], y[500:])
    made = Spectrum.of(train).ridge("y", 5.0)
    values, vectors = np.linalg.eigh(np.cov(y[:500].T.numpy(), bias=True))
    k = torch.from_numpy(vectors / np.sqrt(values) @ vectors.T)
    error, around = (y[500:] - made(x[500:])) @ k, (y[500:] - y[:500].mean(0)) @ k
    expected = 1 - float(error.square().sum() / around.square().sum())
    assert score_map(made, held, train=train).r2_whitened == pytest.approx(expected, abs=1e-10)


def test_one_source_serves_many_targets_alike():
    x, y = activations(600, 16)
    z = y.flip(1) + noise(600, 16, seed=7)
    parts = [Moments().update({"x": a, "y": b, "z": c})
             for a, b, c in zip(x.split(150), y.split(150), z.split(150), strict=True)]  # fmt: skip
    together = fit_ridge_targets(parts, "x", ["y", "z"])
    for target in ("y", "z"):
        alone = fit_ridge_targets(parts, "x", [target])[target]
        assert together[target].map == alone.map
        assert together[target].folds == alone.folds


@pytest.mark.parametrize("alpha", [0.5, 50.0])
def test_5_leave_one_out_is_twenty_refits(alpha):
    x, y = activations(300, 15, 6)
    spectrum = Spectrum.of(moments(x, y))
    # in the place of the others rows at the mean, which have no error: the sum is that of the twenty
    rest = {name: block.mean(0).expand(280, -1) for name, block in (("x", x), ("y", y))}
    found = leave_one_out(spectrum, [{"x": x[:20], "y": y[:20]}, rest], alphas=[alpha])
    refits = torch.zeros(6, dtype=torch.float64)
    for t in range(20):
        rest = torch.arange(300) != t
        made = Spectrum.of(moments(x[rest], y[rest])).ridge("y", alpha)
        refits += (y[t] - made(x[t])).square()
    assert float((found.sse[0] - refits).abs().max()) <= 1e-9
    with pytest.raises(UserError, match="it had 300, the second pass 20"):
        leave_one_out(spectrum, [{"x": x[:20], "y": y[:20]}])


def test_5_leave_one_out_over_all_rows_is_all_refits():
    x, y = activations(60, 5, 3)
    found = leave_one_out(Spectrum.of(moments(x, y)), [{"x": x, "y": y}], alphas=[2.0])
    sse = torch.zeros(3, dtype=torch.float64)
    for t in range(60):
        rest = torch.arange(60) != t
        sse += (y[t] - Spectrum.of(moments(x[rest], y[rest])).ridge("y", 2.0)(x[t])).square()
    torch.testing.assert_close(found.sse[0], sse, rtol=1e-9, atol=1e-9)


def test_5_gcv_is_nearly_leave_one_out():
    x = noise(3000, 40) * torch.logspace(0, -1.5, 40, dtype=torch.float64)
    y = x @ noise(40, 40, seed=2) + 2 * noise(3000, 40, seed=3)
    alphas = REFERENCE_ALPHAS
    spectrum = Spectrum.of(moments(x, y))
    exact = leave_one_out(spectrum, [{"x": x, "y": y}], alphas=alphas)
    gcv = spectrum.gcv("y", alphas)
    for one, other in zip(1 - gcv, 1 - exact.r2_uniform, strict=True):
        assert 0.99 <= float(one / other) <= 1.01
    assert alphas[int(gcv.argmax())] == exact.best
    chosen = fit_ridge_targets([moments(x, y)], "x", ["y"], alpha="gcv", alphas=alphas, absolute=True)["y"]
    assert chosen.alpha_absolute == exact.best


def test_5_gcv_is_its_formula_where_rows_are_few():
    """GCV_j = n RSS_j / (n - tr H)^2 from the hat matrix of 30 rows, the bias among its degrees of freedom."""
    x, y = activations(30, 6, 4)
    centred, around = x - x.mean(0), y - y.mean(0)
    for alpha, found in zip((0.0, 3.0), Spectrum.of(moments(x, y)).gcv("y", [0.0, 3.0]), strict=True):
        hat = 1 / 30 + centred @ torch.linalg.solve(centred.T @ centred + alpha * torch.eye(6), centred.T)
        gcv = 30 * (y - hat @ y).square().sum(0) / (30 - hat.trace()) ** 2
        assert float(found) == pytest.approx(1 - float((gcv / (around.square().sum(0) / 30)).mean()), abs=1e-9)


def test_a_map_without_bias_is_least_squares_through_the_origin():
    x, y = activations(200, 8, 5)
    made = fit_ridge_targets([moments(x, y)], "x", ["y"], alpha=0, centred=False, dtype=torch.float64)["y"].map
    assert relative(made.weight, torch.linalg.lstsq(x, y).solution) <= 1e-9
    assert float(made.bias.abs().max()) == 0


def test_refusals():
    x, y = activations(60, 4)
    part = moments(x, y)
    with pytest.raises(UserError, match="at least one alpha and two folds"):
        fit_ridge_targets([part], "x", ["y"])
    with pytest.raises(UserError, match="from 0 up"):
        fit_ridge_targets([part], "x", ["y"], alpha=-1)
    with pytest.raises(UserError, match="x is constant"):
        Spectrum.of(moments(torch.ones(60, 4), y))
    with pytest.raises(UserError, match="uniform, weighted, whitened; got 'best'"):
        HeldOut.of(Spectrum.of(part), part).path("y", [1.0], "best")
    with pytest.raises(UserError, match="from width 4 to 4; 'x' has width 4 and 'z' 3"):
        score_map(Spectrum.of(part).ridge("y"), Moments().update({"x": x, "z": y[:, :3]}), target="z")
    with pytest.raises(UserError, match="y is constant in the rows to score"):
        score_map(Spectrum.of(part).ridge("y"), moments(x, torch.ones(60, 4)))


def test_gcv_that_can_score_no_candidate_is_refused_and_not_taken_as_no_penalty():
    part = moments(noise(10, 12), noise(10, 3, seed=1))
    with pytest.raises(UserError, match=r"too few rows .* for x to y: 10 rows leave no degree .*; use cv or a number"):
        fit_ridge_targets([part], "x", ["y"], alpha="gcv", alphas=[0.0, 1e-17])
    fit = fit_ridge_targets([part], "x", ["y"], alpha="gcv", alphas=[0.0, 0.1])["y"]
    assert (fit.cv[0][1], fit.alpha) == (-torch.inf, pytest.approx(0.1))
