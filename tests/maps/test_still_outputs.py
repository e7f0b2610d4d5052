"""Outputs that stand still in the rows to score alone: they count 0 in the uniform R2 and nothing in the weighted one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score

from workbench.maps import GroupedMoments, HeldOut, Moments, Spectrum, optimal_ranks, score_map
from workbench.maps.jackknife import jackknife
from workbench.maps.shard_scores import ShardScores

from .example_rows import noise

TRAIN = 400


@pytest.fixture(scope="module")
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """The third output varies in the training rows and stands still, elsewhere, in the last 200; in float32, so that both
    precisions have the same rows."""
    x = noise(600, 6).float()
    y = x @ noise(6, 4, seed=1).float() + 0.1 * noise(600, 4, seed=2).float()
    y[TRAIN:, 2] = 4.9
    return x, y


@pytest.mark.parametrize("products", [torch.float64, torch.float32])
@pytest.mark.parametrize("together", [True, False])  # whether both sides have one shift, as in a grid
def test_every_way_to_score_leaves_them_out_as_scikit_learn_does(rows, products, together):
    x, y = rows
    shard = [-1] * TRAIN + [i // 50 for i in range(200)]
    if together:
        grouped = GroupedMoments("shard", products=products).update({"x": x, "y": y}, shard=shard)
        parts = grouped.parts("shard")
        train, shards = parts[-1], [parts[i] for i in range(4)]
    else:
        train, *shards = (Moments(products=products).update({"x": a, "y": b})
                          for a, b in zip(x.split([TRAIN, *[50] * 4]), y.split([TRAIN, *[50] * 4]), strict=True))  # fmt: skip
    held = shards[0] + shards[1] + shards[2] + shards[3]
    spectrum = Spectrum.of(train)
    fitted = spectrum.ridge("y", 1.0)
    true, predicted = y[TRAIN:].double().numpy(), fitted(x[TRAIN:].double()).numpy()
    known = r2_score(true, predicted, multioutput="variance_weighted")
    uniform = np.mean([0.0 if j == 2 else r2_score(true[:, j], predicted[:, j]) for j in range(4)])
    assert known > 0.98

    score = score_map(fitted, held)
    overall = ShardScores.of(fitted, shards, "x", "y", train=train).overall
    curve = optimal_ranks(spectrum, alpha=1.0).curve(held)
    found = {
        "score_map": (score.r2_uniform, score.r2_weighted),
        "shards": overall.value[:2].tolist(),
        "ranks": (float(curve.r2_uniform[-1]), float(curve.r2_weighted[-1])),
        "path": [float(HeldOut.of(spectrum, held).path("y", [1.0], metric)) for metric in ("uniform", "weighted")],
    }
    for name, values in found.items():
        assert values == pytest.approx((uniform, known), abs=1e-5), name
    assert float(overall.error[1]) < 0.01
    assert torch.isnan(score.per_output).tolist() == [False, False, True, False]


@pytest.mark.parametrize("products", [torch.float64, torch.float32])
def test_an_output_that_moves_in_one_shard_alone_is_left_out_with_that_shard(products):
    x = noise(1000, 6).float()
    y = x @ noise(6, 4, seed=1).float() + 0.1 * noise(1000, 4, seed=2).float()
    train = Moments(products=products).update({"x": x[:TRAIN], "y": y[:TRAIN]})
    x, y = x[TRAIN:], y[TRAIN:]
    y[:, 2] = 4.9
    y[:150, 2] += noise(150, seed=3).float()
    shift = {"x": torch.zeros(6), "y": torch.full((4,), 0.1)}
    shards = [Moments(products=products, shift=shift).update({"x": a, "y": b})
              for a, b in zip(x.split(150), y.split(150), strict=True)]  # fmt: skip
    fitted = Spectrum.of(train).ridge("y", 1.0)

    def known(rows: torch.Tensor) -> torch.Tensor:
        true, predicted = y[rows].double().numpy(), fitted(x[rows].double()).numpy()
        still = true.std(0) == 0
        parts = np.where(still, 0.0, r2_score(true, predicted, multioutput="raw_values"))
        return torch.tensor([parts.mean(), r2_score(true, predicted, multioutput="variance_weighted")])

    at = torch.arange(600)
    left = torch.stack([known(at[at // 150 != i]) for i in range(4)])
    estimate = jackknife(known(at), left, [150] * 4)
    found = ShardScores.of(fitted, shards, "x", "y", train=train).overall
    torch.testing.assert_close(found.value[:2], estimate.value, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.error[:2], estimate.error, rtol=1e-4, atol=0)
