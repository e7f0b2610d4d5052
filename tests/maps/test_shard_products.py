"""CKA of all pairs of layers from shard products: the formulas on rows, either way of making them, and without a shard."""

from __future__ import annotations

import math

import pytest
import torch

from workbench.maps.shard_products import Grams, ShardProducts, product_flops, shuffled_products
from workbench.maps.similarity import debiased_cka, linear_cka

from .example_rows import activations, moments, noise

SHARDS = (50, 70, 30, 90)


class Rows:
    """Layers that are held."""

    def __init__(self, *layers):
        self.layers = layers
        self.widths = [x.shape[1] for x in layers]

    def __len__(self):
        return len(self.layers)

    def centred(self, i):
        x = self.layers[i].double()
        return x - x.mean(0)


@pytest.fixture(scope="module")
def sides():
    x, y = activations(240, 10, 7)
    return Rows(x, y[:, :5]), Rows(y, noise(240, 12, seed=8), x.square())


def unbiased(x: torch.Tensor, y: torch.Tensor) -> float:
    """Debiased CKA from Gram matrices without their diagonals (Song et al. 2012)."""

    def hsic(k: torch.Tensor, l: torch.Tensor) -> float:
        k, l = k - k.diag().diag(), l - l.diag().diag()
        n = len(k)
        return float((k * l).sum() + k.sum() * l.sum() / (n - 1) / (n - 2) - 2 / (n - 2) * (k @ l).sum())

    k, l = x @ x.T, y @ y.T
    return hsic(k, l) / math.sqrt(hsic(k, k) * hsic(l, l))


@pytest.mark.parametrize(("by_gram", "room"), [(False, 1 << 30), (True, 1 << 30), (True, 0)])
def test_it_is_cka_of_all_rows_and_without_a_shard(sides, by_gram, room, monkeypatch):
    """Where there is room in float64; else to the rounding of float32."""
    monkeypatch.setattr("workbench.maps.shard_products.GRAM_BYTES", room)
    left, right = sides
    near = 1e-9 if room else 1e-5
    grams = Grams(left, right) if by_gram else None
    made = ShardProducts.of(left, right, SHARDS, grams)
    ends = torch.tensor((0, *SHARDS)).cumsum(0).tolist()
    for without in (None, *range(len(SHARDS))):
        keep = torch.ones(240, dtype=torch.bool)
        if without is not None:
            keep[ends[without] : ends[without + 1]] = False
        plain, debiased = made.cka(without), made.cka(without, debiased=True)
        for i, x in enumerate(left.layers):
            for j, y in enumerate(right.layers):
                x_kept, y_kept = x[keep], y[keep]
                assert float(plain[i, j]) == pytest.approx(linear_cka(moments(x_kept, y_kept)), abs=near)
                assert float(debiased[i, j]) == pytest.approx(unbiased(x_kept, y_kept), abs=near)
    whole = moments(left.layers[0], right.layers[0])
    direct = debiased_cka(whole, [{"x": left.layers[0], "y": right.layers[0]}])
    assert float(made.cka(debiased=True)[0, 0]) == pytest.approx(direct, abs=near)


@pytest.mark.parametrize("by_gram", [False, True])
def test_rows_may_meet_in_another_order(sides, by_gram):
    left, right = sides
    grams = Grams(left, right) if by_gram else None
    made = ShardProducts.of(left, right, SHARDS, grams)
    order = torch.randperm(240, generator=torch.Generator().manual_seed(3))
    products = shuffled_products(left, right, order, grams)
    for debiased in (False, True):
        turned = ShardProducts.of(left, Rows(*(y[order] for y in right.layers)), SHARDS).cka(debiased=debiased)
        torch.testing.assert_close(made.shuffled(products, order, debiased=debiased), turned, atol=1e-7, rtol=0)


def test_a_constant_layer_is_like_nothing(sides):
    made = ShardProducts.of(Rows(torch.ones(240, 3)), sides[1], SHARDS)
    assert made.cka().isnan().all()
    assert made.cka(debiased=True).isnan().all()


def test_gram_matrices_pay_where_layers_are_wide_and_rows_few():
    class Wide:
        widths = [4096] * 32

        def __len__(self):
            return 32

        def centred(self, i):
            raise AssertionError("nothing is read")

    by_gram, by_moments = product_flops(Wide(), Wide(), 4096)
    assert by_moments > 10 * by_gram
    assert Grams.pays(Wide(), Wide(), 4096)
    assert not Grams.pays(Wide(), Wide(), 20_000), "they have no room"
    narrow = Rows(noise(500, 4))
    assert not Grams.pays(narrow, narrow, 500)
