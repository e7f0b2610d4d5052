"""Similarities from moments against their direct formulas on rows, and what they must not change under."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from workbench.errors import UserError
from workbench.maps import Spectrum, score_map
from workbench.maps.similarity import (
    cross_cka,
    debiased_cka,
    linear_cka,
    linearity_score,
    procrustes_distance,
    pwcca,
    svcca,
)

from .example_rows import activations, folds, moments, noise


@pytest.fixture(scope="module")
def rows():
    return activations(300, 10, 7)


def centred(rows) -> list[np.ndarray]:
    return [(r - r.mean(0)).numpy() for r in rows]


def test_cka_and_procrustes_are_their_direct_formulas(rows):
    x, y = centred(rows)
    k, l = x @ x.T, y @ y.T
    assert linear_cka(moments(*rows)) == pytest.approx((k * l).sum() / np.linalg.norm(k) / np.linalg.norm(l), abs=1e-13)
    nuclear = np.linalg.svd(x.T @ y, compute_uv=False).sum()
    direct = 2 - 2 * nuclear / np.linalg.norm(x) / np.linalg.norm(y)
    assert procrustes_distance(moments(*rows)) == pytest.approx(direct, abs=1e-13)


def test_debiased_cka_is_the_unbiased_hsic_of_gram_matrices(rows):
    def hsic(k: np.ndarray, l: np.ndarray) -> float:
        k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))
        n = len(k)
        cross = k.sum() * l.sum() / (n - 1) / (n - 2) - 2 / (n - 2) * (k @ l).sum()
        return float(((k * l).sum() + cross) / n / (n - 3))

    x, y = (r.numpy() for r in rows)
    k, l = x @ x.T, y @ y.T
    direct = hsic(k, l) / math.sqrt(hsic(k, k) * hsic(l, l))
    batches = [{"x": a, "y": b} for a, b in zip(rows[0].split(70), rows[1].split(70), strict=True)]
    assert debiased_cka(moments(*rows), batches) == pytest.approx(direct, abs=1e-9)
    with pytest.raises(UserError, match="they had 300, the second pass 70"):
        debiased_cka(moments(*rows), batches[:1])


def test_independent_sides_have_no_debiased_cka():
    x, y = noise(400, 100), noise(400, 100, seed=1)
    assert linear_cka(moments(x, y)) > 0.15
    assert abs(debiased_cka(moments(x, y), [{"x": x, "y": y}])) < 0.02
    assert abs(cross_cka(folds(x, y))) < 0.03
    assert cross_cka(folds(x, x)) == pytest.approx(1)


def test_svcca_and_pwcca_are_their_direct_formulas(rows):
    x, y = centred(rows)
    u_x, s_x, _ = np.linalg.svd(x, full_matrices=False)
    u_y, s_y, _ = np.linalg.svd(y, full_matrices=False)

    def leading(s: np.ndarray) -> int:
        return int(np.searchsorted((s**2).cumsum() / (s**2).sum(), 0.99) + 1)

    rho = np.linalg.svd(u_x[:, : leading(s_x)].T @ u_y[:, : leading(s_y)], compute_uv=False)
    assert svcca(moments(*rows)) == pytest.approx(rho.mean(), abs=1e-10)
    p, rho, _ = np.linalg.svd(u_x.T @ u_y, full_matrices=False)
    weights = np.abs((u_x @ p).T @ x).sum(1)
    assert pwcca(moments(*rows)) == pytest.approx((weights * rho).sum() / weights.sum(), abs=1e-10)


def test_the_linearity_score_is_in_sample_least_squares(rows):
    whole = moments(*rows)
    direct = score_map(Spectrum.of(whole).ridge("y"), whole).r2_weighted
    assert linearity_score(whole) == pytest.approx(direct, abs=1e-12)


def test_rotation_scale_and_shift_change_nothing():
    x, _ = activations(300, 10)
    turned = 3 * x @ torch.linalg.qr(noise(10, 10, seed=5)).Q - 4
    whole = moments(x, turned)
    for similarity in (linear_cka, svcca, pwcca, linearity_score):
        assert similarity(whole) == pytest.approx(1, abs=1e-9), similarity
    assert procrustes_distance(whole) == pytest.approx(0, abs=1e-9)


def test_refusals(rows):
    with pytest.raises(UserError, match="y is constant"):
        linear_cka(moments(rows[0], torch.ones(300, 2)))
    with pytest.raises(UserError, match=r"0\.\.1; got 0"):
        svcca(moments(*rows), variance=0.0)
    with pytest.raises(UserError, match="at least two parts"):
        cross_cka([moments(*rows)])
    with pytest.raises(UserError, match="at least 4 rows"):
        debiased_cka(moments(rows[0][:3], rows[1][:3]), [])
