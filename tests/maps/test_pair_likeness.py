"""SVCCA, PWCCA, Procrustes, RSA and nearest neighbours of all pairs of layers, against formulas written out on rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from workbench.errors import UserError
from workbench.maps.pair_spectra import PairSpectra, spectra_flops
from workbench.maps.row_likeness import Dissimilarities, NearestRows, cosines
from workbench.maps.similarity import procrustes_distance, procrustes_similarity, pwcca, svcca

from .example_rows import activations, moments, noise
from .test_shard_products import Rows

MEASURES = ("svcca", "pwcca", "procrustes")


def gram(x: torch.Tensor) -> torch.Tensor:
    x = x.double() - x.double().mean(0)
    return x @ x.T


def test_all_pairs_are_the_formulas_of_one():
    x, y = activations(300, 9, 6)
    left, right = Rows(x, noise(300, 4)), Rows(y)
    kept = torch.arange(40, 300)
    for rows in (None, kept):
        found = PairSpectra(left, right, MEASURES, kept=rows).scores()
        for i, a in enumerate(left.layers):
            a, b = (a, y) if rows is None else (a[rows], y[rows])
            whole = moments(a, b)
            wanted = [svcca(whole), pwcca(whole), procrustes_similarity(whole)]
            assert found[:, i, 0].tolist() == pytest.approx(wanted, abs=1e-9)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    turned = PairSpectra(left, right, MEASURES).scores(order)[:, 0, 0].tolist()
    whole = moments(x, y[order])
    assert turned == pytest.approx([svcca(whole), pwcca(whole), procrustes_similarity(whole)], abs=1e-9)
    assert procrustes_distance(whole) == pytest.approx(2 - 2 * turned[2], abs=1e-9)
    assert spectra_flops(left, right, 300, MEASURES)[1] > 0


def test_procrustes_is_the_best_rotation():
    """Against a rotation that is fitted and applied."""
    x, y = activations(200, 6)
    a, b = ((r - r.mean(0)) / (r - r.mean(0)).norm() for r in (x, y))
    u, _, vt = torch.linalg.svd(b.T @ a)
    assert procrustes_distance(moments(x, y)) == pytest.approx(float((a - b @ (u @ vt)).square().sum()), abs=1e-10)


def test_too_few_rows_for_pwcca_and_constant_layers_give_no_number():
    found = PairSpectra(Rows(noise(12, 8), torch.ones(12, 3)), Rows(noise(12, 8, seed=1)), MEASURES).scores()
    assert found[1, 0, 0].isnan()
    assert found[2, 0, 0].isfinite()
    assert found[:, 1].isnan().all()


@pytest.fixture(scope="module")
def layers():
    x, y = activations(60, 8, 5)
    return torch.stack([cosines(gram(x)), cosines(gram(y))]), torch.arange(60) // 3, (x, y)


def test_rsa_is_spearman_of_dissimilarities_of_other_prompts(layers):
    tables, group, rows = layers
    found = Dissimilarities(tables, group).correlations(Dissimilarities(tables, group))
    far = []
    for x in rows:
        x = (x - x.mean(0)).numpy()
        far.append([1 - x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j])
                    for i in range(60) for j in range(i + 1, 60) if i // 3 != j // 3])  # fmt: skip
    assert float(found[0, 1]) == pytest.approx(stats.spearmanr(*far).statistic, abs=1e-6)
    assert found.diagonal().tolist() == pytest.approx([1.0, 1.0], abs=1e-6)


def test_neighbours_are_those_of_a_loop(layers):
    tables, group, _ = layers
    k = 4
    found = NearestRows(tables, group, k).overlap(NearestRows(tables, group, k))
    near = []
    for table in tables.numpy():
        sets = []
        for i in range(60):
            others = [j for j in range(60) if j // 3 != i // 3]
            sets.append(set(sorted(others, key=lambda j: -table[i, j])[:k]))
        near.append(sets)
    share = np.mean([len(a & b) / k for a, b in zip(*near, strict=True)])
    assert float(found[0, 1]) == pytest.approx(share, abs=1e-6)
    assert float(found[0, 0]) == pytest.approx(1.0)


def test_prompts_in_another_order_are_rows_in_another_order(layers):
    tables, group, (x, y) = layers
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:, None] * 3 + torch.arange(3)
    order = order.flatten()
    turned = torch.stack([cosines(gram(x)), cosines(gram(y[order]))])
    for made in (Dissimilarities, NearestRows):
        a, b = made(tables[:1], group), made(tables[1:], group)
        wanted = made(turned[:1], group), made(turned[1:], group)
        if made is Dissimilarities:
            torch.testing.assert_close(a.correlations(b, order), wanted[0].correlations(wanted[1]), atol=1e-6, rtol=0)
        else:
            torch.testing.assert_close(a.overlap(b, order), wanted[0].overlap(wanted[1]), atol=1e-6, rtol=0)


def test_cosines_of_some_rows_are_about_their_own_mean():
    x = noise(20, 5) + 3
    some = torch.arange(5, 17)
    torch.testing.assert_close(cosines(gram(x), some), cosines(gram(x[some])), atol=1e-10, rtol=0)
    zero = cosines(gram(torch.cat([x, x.mean(0, keepdim=True)])))
    assert zero.isfinite().all()


def test_refusals():
    table = cosines(gram(noise(6, 3)))[None]
    with pytest.raises(UserError, match="at least 3 pairs of rows of different prompts"):
        Dissimilarities(table, torch.zeros(6, dtype=torch.int64))
    with pytest.raises(UserError, match=r"k must lie in 1\.\.3 \(rows of other prompts\); got 4"):
        NearestRows(table, torch.arange(6) // 3, 4)
