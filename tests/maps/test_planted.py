"""Planted transport, and what a massive first token does to R2 (acceptance checks 10, 11)."""

from __future__ import annotations

import pytest
import torch

from workbench.maps import GroupedMoments, Moments, Spectrum, fit_map, leave_out_shards, score_map
from workbench.maps.moments import total

from .example_rows import F64, noise

D, LINEAR, N = 128, 100, 40_000


@pytest.fixture(scope="module")
def planted():
    """y = x + P x (rank 5) + noise on 100 dimensions; (x^2 - 1) / 2, an even function, on the other 28."""
    x = noise(N, D)
    channel = noise(D, 5, seed=1) @ noise(5, LINEAR, seed=2) / D
    clean = x[:, :LINEAR] + x @ channel
    linear = clean + 0.2 * clean.std(0) * noise(N, LINEAR, seed=3)
    y = torch.cat([linear, 0.5 * (x[:, LINEAR:] ** 2 - 1)], 1)  # variance 0.5 each
    weight = torch.eye(D, LINEAR, dtype=F64) + channel
    signal = weight.square().sum(0)  # variance of the clean part; x is standard normal
    spread = clean.std(0).square() * 0.04
    truth = float(signal.sum() / (signal.sum() + spread.sum() + 0.5 * (D - LINEAR)))
    return x, y, truth


def test_10_planted_transport_is_found_within_its_error(planted):
    x, y, truth = planted
    cut = 3 * N // 4
    shards = [Moments().update({"x": a, "y": b}) for a, b in zip(x[cut:].chunk(20), y[cut:].chunk(20), strict=True)]
    parts = [Moments().update({"x": a, "y": b}) for a, b in zip(x[:cut].chunk(5), y[:cut].chunk(5), strict=True)]
    fit = fit_map(parts, "ridge", dtype=F64)
    found = leave_out_shards(lambda m: score_map(fit.map, m).r2_weighted, shards)
    assert 0 < float(found.error) < 0.005
    assert abs(float(found.value) - truth) < 3 * float(found.error)
    per_output = score_map(fit.map, total(shards)).per_output
    assert float(per_output[:LINEAR].min()) > 0.95
    assert float(per_output[LINEAR:].abs().max()) < 0.02


def test_11_the_massive_first_token_is_told_apart():
    x = noise(20_000, 24)
    y = x + noise(20_000, 24, seed=5)  # R2 = 0.5
    first = torch.arange(20_000) % 250 == 0
    x[first], y[first] = 100, 100
    kinds = ["bos" if t else "word" for t in first.tolist()]
    grouped = GroupedMoments("part", "kind")
    for name, rows in (("train", slice(0, 15_000)), ("test", slice(15_000, 20_000))):
        grouped.update({"x": x[rows], "y": y[rows]}, part=name, kind=kinds[rows])
    words = Spectrum.of(grouped.total(part="train", kind="word")).ridge("y", 1.0)
    everything = Spectrum.of(grouped.total(part="train")).ridge("y", 1.0)
    assert score_map(words, grouped.total(part="test", kind="word")).r2_uniform == pytest.approx(0.5, abs=0.01)
    assert score_map(everything, grouped.total(part="test")).r2_uniform >= 0.85
    assert score_map(everything, grouped.total(part="test", kind="word")).r2_uniform == pytest.approx(0.5, abs=0.01)
