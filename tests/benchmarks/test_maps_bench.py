"""The benchmark of maps runs, and what it compares is equal; times are for its tables alone (acceptance check 15)."""

from __future__ import annotations

import pytest

from .maps_bench import all_pairs, device_rate, features, one_pair, peak_memory, targets_of_one_source


def test_the_engine_chooses_and_scores_as_grid_search():
    found = one_pair(24, 600)
    assert found["same_alpha"]
    assert found["largest_score_difference"] <= 1e-6


def test_all_pairs_are_fitted():
    assert all_pairs(4, 16, 500, sklearn_s=1.0)["pairs"] == 6
    assert set(targets_of_one_source((1, 3), 16, 400)["seconds"]) == {"1", "3"}


def test_features_and_rates_are_measured_at_any_size():
    assert features(12, 300, 16, size=100)["measured"] > 0
    assert device_rate("cpu", 16, 64, repeats=1)["fraction"] > 0


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_rows():
    few, many = peak_memory((10_000, 100_000), 256, 3)["bytes"].values()
    assert many - few < 0.2 * 90_000 * 256 * 3 * 4  # a fifth of what the further rows would take
