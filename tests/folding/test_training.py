"""The small vision transformers of data/build: seeded images, a training that learns, a folded twin that says the same."""

from __future__ import annotations

import pytest
import torch

from data.build.images import CLASSES, SIZE, images
from data.build.vision import compare, predicted, train
from workbench.folding.vision import fold_vit


def test_images_are_those_of_their_seed():
    pixels, labels = images(64, 3)
    again, same = images(64, 3)
    assert torch.equal(pixels, again)
    assert torch.equal(labels, same)
    assert pixels.shape == (64, 3, SIZE, SIZE)
    assert set(labels.tolist()) <= set(range(CLASSES))
    assert not torch.equal(pixels, images(64, 4)[0])


@pytest.mark.slow
def test_a_twin_learns_and_folds_without_a_change():
    pixels, labels = images(200, 1)
    twin = train(0.75, steps=40, batch=32, n=600)
    folded = fold_vit(twin)
    assert (predicted(folded, pixels) - predicted(twin, pixels)).abs().max() < 1e-3
    assert (predicted(twin, pixels).argmax(1) == labels).double().mean() > 1.5 / CLASSES, "better than chance"


def test_a_comparison_has_every_model():
    found = compare((0.5,), steps=2, n_test=64, n=64, batch=8)
    assert [line["model"] for line in found["lines"]] == ["dense", "idle 0.5", "folded 0.5"]
    assert found["lines"][2]["moved"] < 1e-3
    assert found["lines"][2]["ffn_share"] < 0.65
