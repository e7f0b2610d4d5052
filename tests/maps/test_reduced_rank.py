"""Curves over all ranks against explicit predictions, and the order that they must keep (acceptance check 7)."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import r2_score

from workbench.errors import UserError
from workbench.maps import RankFamily, Spectrum, Whitener, optimal_ranks, score_map, truncated_ranks

from .example_rows import F64, activations, moments, noise, relative

D = 24


@pytest.fixture(scope="module")
def split():
    x, y = activations(900, D)
    return x[:600], y[:600], x[600:], y[600:]


def families(spectrum: Spectrum) -> dict[str, RankFamily]:
    found = {
        f"{metric} {alpha} {update}": optimal_ranks(spectrum, alpha=alpha, metric=metric, update=update)
        for metric in ("uniform", "weighted", "whitened")
        for alpha in (0.0, 50.0)
        for update in (False, True)
    }
    found["cut"], found["cut_update"] = truncated_ranks(spectrum, alpha=50.0), truncated_ranks(spectrum, update=True)
    return found


def test_7_curves_are_the_scores_of_explicit_predictions(split):
    x, y, held_x, held_y = split
    train, held = moments(x, y), moments(held_x, held_y)
    k = Whitener.of_block(train, "y").inverse_root
    for name, family in families(Spectrum.of(train)).items():
        curve = family.curve(held, train=train)
        assert curve.ranks[-1] == family.highest == D
        for r in (0, 1, 5, D):
            predicted = family.map(r)(held_x)
            error, around = (held_y - predicted) @ k, (held_y - y.mean(0)) @ k
            assert float(curve.r2_uniform[r]) == pytest.approx(r2_score(held_y, predicted), abs=1e-9), name
            weighted = r2_score(held_y, predicted, multioutput="variance_weighted")
            assert float(curve.r2_weighted[r]) == pytest.approx(weighted, abs=1e-9), name
            whitened = 1 - float(error.square().sum() / around.square().sum())
            assert float(curve.r2_whitened[r]) == pytest.approx(whitened, abs=1e-9), name
            raw = torch.from_numpy(r2_score(held_y, predicted, multioutput="raw_values"))
            torch.testing.assert_close(curve.per_output[r], raw, atol=1e-9, rtol=0)


def test_7_both_whitenings_of_the_truncated_curve(split):
    x, y, held_x, held_y = split
    train, held = moments(x, y), moments(held_x, held_y)
    family = truncated_ranks(Spectrum.of(train), alpha=20.0)
    uncentred = Whitener.of(train.raw("y", "y") / train.n)
    for white in (Whitener.of_block(train, "y"), uncentred):
        curve = family.curve(held, train=train, whitener=white)
        for r in range(D + 1):
            error = (held_y - family.map(r)(held_x)) @ white.inverse_root
            around = (held_y - y.mean(0)) @ white.inverse_root
            whitened = 1 - float(error.square().sum() / around.square().sum())
            assert float(curve.r2_whitened[r]) == pytest.approx(whitened, abs=1e-6)


def test_7_the_optimal_rank_is_never_below_the_truncated_in_sample(split):
    train = moments(*split[:2])
    spectrum = Spectrum.of(train)
    cut = truncated_ranks(spectrum).curve(train, train=train)
    for metric in ("uniform", "weighted", "whitened"):
        best = optimal_ranks(spectrum, metric=metric).curve(train, train=train).metric(metric)
        assert bool((best >= cut.metric(metric) - 1e-12).all())
        assert bool((best.diff() >= -1e-12).all())


@pytest.mark.parametrize("alpha", [0.0, 50.0])
@pytest.mark.parametrize("metric", ["uniform", "weighted", "whitened"])
def test_7_full_rank_is_the_full_ridge(split, alpha, metric):
    spectrum = Spectrum.of(moments(*split[:2]))
    full = spectrum.ridge("y", alpha)
    for update in (False, True):
        made = optimal_ranks(spectrum, alpha=alpha, metric=metric, update=update).map(D)
        expected = full
        if update and alpha:  # the penalty is on the update: ridge of y - x, and x
            shifted = Spectrum.of(moments(split[0], split[1] - split[0])).ridge("y", alpha)
            expected = type(full)(shifted.weight + torch.eye(D, dtype=F64), shifted.bias)
        assert relative(made.weight, expected.weight) <= 1e-8
    assert relative(truncated_ranks(spectrum, alpha=alpha).map(D).weight, full.weight) <= 1e-10


@pytest.mark.parametrize("update", [False, True])
def test_truncation_keeps_the_leading_triples_of_the_map_or_of_its_update(split, update):
    """Of W, or with the update of the ridge map of y - x, beside which the identity stays whole."""
    x, y = split[:2]
    family = truncated_ranks(Spectrum.of(moments(x, y)), alpha=20.0, update=update)
    base = torch.eye(D, dtype=F64) * update
    u, s, vh = torch.linalg.svd(Spectrum.of(moments(x, y - x @ base)).ridge("y", 20.0).weight)
    for r in (0, 1, 5, D):
        torch.testing.assert_close(family.map(r).weight, base + u[:, :r] * s[:r] @ vh[:r], rtol=0, atol=1e-9)


def test_a_small_update_is_found_with_its_rank_where_truncation_loses_the_identity():
    x = noise(4000, D)
    y = x + 2 * x @ noise(D, 2, seed=5) @ noise(2, D, seed=6) / D + 0.05 * noise(4000, D, seed=7)
    train, held = moments(x[:3000], y[:3000]), moments(x[3000:], y[3000:])
    spectrum = Spectrum.of(train)
    update = optimal_ranks(spectrum, update=True).curve(held).r2_weighted
    assert float(update[2]) > 0.99
    assert float(update[2] - update[1]) > 0.02
    assert float(truncated_ranks(spectrum).curve(held).r2_weighted[2]) < 0.7
    identity = score_map(optimal_ranks(spectrum, update=True).map(0), held)
    assert identity.r2_weighted == pytest.approx(float(update[0]), abs=1e-12)


def test_refusals(split):
    train = moments(*split[:2])
    family = optimal_ranks(Spectrum.of(train))
    with pytest.raises(UserError, match=r"0\.\.24; got 25"):
        family.map(25)
    with pytest.raises(UserError, match="uniform, weighted, whitened; got 'all'"):
        optimal_ranks(Spectrum.of(train), metric="all")
    with pytest.raises(UserError, match="holds uniform, weighted; got 'whitened'"):
        family.curve(train).metric("whitened")
    with pytest.raises(UserError, match="equal widths; got 24 and 5"):
        optimal_ranks(Spectrum.of(moments(split[0], split[1][:, :5])), update=True)
