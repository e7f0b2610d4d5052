"""Quality: definitions against scikit-learn, baselines, warnings, Mahalanobis length."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import r2_score

from workbench.errors import UserError
from workbench.maps.fit import fit_ridge
from workbench.maps.linear_map import LinearMap
from workbench.maps.quality import mahalanobis, quality, r2, row_warning


def test_r2_is_sklearns():
    y, guess = torch.randn(50, 4), torch.randn(50, 4)
    score = r2(y, guess)
    assert score.uniform == pytest.approx(r2_score(y, guess), abs=1e-6)
    assert score.weighted == pytest.approx(r2_score(y, guess, multioutput="variance_weighted"), abs=1e-6)
    assert r2(y, y).uniform == 1
    assert r2(torch.ones(5, 2), torch.ones(5, 2)) == (1.0, 1.0)
    assert r2(y, torch.zeros(50, 4), torch.zeros(4)).weighted == 0


def test_quality_of_a_good_map_beats_its_baselines():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 8, generator=g) + 2
    turn = torch.linalg.qr(torch.randn(8, 8, generator=g)).Q
    y = x @ turn + 0.1 * torch.randn(2000, 8, generator=g)
    there, back = fit_ridge(x[:1500], y[:1500]).map, fit_ridge(y[:1500], x[:1500]).map
    scored = quality(there, x[1500:], y[1500:], back=back, train_mean=y[:1500].mean(0))
    assert scored.r2_uniform > 0.95
    assert scored.r2_identity_bias is not None
    assert scored.r2_mean_baseline <= 0 < scored.r2_weighted
    assert scored.r2_identity_bias < scored.r2_weighted
    assert scored.cosine_centred > 0.95
    assert scored.cycle_error is not None
    assert scored.cycle_error < 0.2
    assert (scored.rank, scored.n, scored.d, scored.warning) == (8, 1500, 8, None)
    assert 1 <= scored.condition < 2
    assert scored.relative_mse < 0.01


def test_the_identity_is_perfect_and_other_widths_have_none():
    x = torch.randn(30, 4)
    same = quality(LinearMap.identity(4), x, x + 1, train_mean=x.mean(0) + 1, n_train=400)
    assert same.r2_identity_bias == pytest.approx(1)
    assert quality(LinearMap.zeros(4, 3), x, torch.randn(30, 3)).r2_identity_bias is None
    with pytest.raises(UserError, match="30 rows of x and 29 rows of y"):
        quality(LinearMap.identity(4), x, x[:29])


def test_warnings():
    assert row_warning(1500, 1000) is None
    assert row_warning(700, 1000) is None
    assert "double-descent" in str(row_warning(701, 1000))
    assert "below 1" in str(row_warning(300, 1000, "pinv"))


def test_mahalanobis_counts_standard_deviations():
    g = torch.Generator().manual_seed(0)
    profile = torch.randn(5000, 3, generator=g, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.2])
    lengths = mahalanobis(profile, profile.T.cov())
    assert float(lengths.square().mean()) == pytest.approx(3, rel=0.05)
    delta = torch.tensor([[0.0, 10.0, 0.0]])
    assert float(mahalanobis(delta, profile.T.cov())) == pytest.approx(2, rel=0.05)
    with pytest.raises(UserError, match="not positive definite"):
        mahalanobis(delta, torch.diag(torch.tensor([1.0, -1.0, 3.0])))
    with pytest.raises(UserError, match="positive mean diagonal"):
        mahalanobis(delta, torch.zeros(3, 3))
