"""Nearest neighbours are exact over the whole store, whatever its dtype, batches and duplicates."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from probes import neighbours
from probes.neighbours import nearest_rows
from tests.store.made import made_store, noise
from workbench import UserError
from workbench.sites import Site
from workbench.store import Store
from workbench.store.resident import ResidentRows
from workbench.store.store import Store as StoreClass

WORDS = 8
TEXTS = [" ".join(f"w{j}" for j in range(WORDS))] * 150
N, D = WORDS * len(TEXTS), 32


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """All rows far from the origin and close together, as activations are."""
    values = {Site(0): noise(N, D) + 20, Site(1): (noise(N, D, 1) + 20).bfloat16().float()}
    return made_store(tmp_path_factory.mktemp("near") / "s", values, TEXTS, shard=500)


def brute(x: torch.Tensor, q: torch.Tensor, metric: str) -> np.ndarray:
    """Nearness of every row in float64: higher is nearer."""
    x, q = x.double(), q.double()
    return ((x @ q) / x.norm(dim=1) / q.norm() if metric == "cosine" else -(x - q).norm(dim=1)).numpy()


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_they_are_those_of_a_search_in_float64(store, tmp_path, monkeypatch, metric, dtype):
    monkeypatch.setattr(neighbours, "CPU_BATCH", 97)
    x = store.read(0).to(dtype)
    made = made_store(tmp_path / "s", {Site(0): x}, TEXTS, shard=333)
    for query in (0, 555, N - 1):
        near = brute(x, x[query], metric)
        near[query] = -np.inf
        order = np.lexsort((np.arange(N), -near))[:25]
        found = nearest_rows(made, 0, query, 25, metric=metric)
        assert found.rows.tolist() == order.tolist()
        expected = near[order] if metric == "cosine" else -near[order]
        np.testing.assert_allclose(found.scores, expected, rtol=1e-12)
        assert found.searched == N - 1


@pytest.mark.parametrize("keep", [True, False])
def test_rows_on_a_device_and_in_files_have_the_same_neighbours(store, keep):
    resident = ResidentRows(store, "cpu", keep=keep)
    a, b = nearest_rows(resident, 1, 44, 9), nearest_rows(store, 1, 44, 9)
    assert torch.equal(a.rows, b.rows)
    assert torch.equal(a.scores, b.scores)
    assert (resident.sites == [Site(1)]) is keep


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_equal_rows_come_in_the_order_of_their_numbers(tmp_path, monkeypatch, metric):
    monkeypatch.setattr(neighbours, "CPU_BATCH", 13)
    x = noise(N, 1001, 3)
    copies = torch.randperm(N, generator=torch.Generator().manual_seed(0))[:200].sort().values
    x[copies] = x[17].clone()
    x[17] *= 1.01
    made = made_store(tmp_path / "s", {Site(0): x}, TEXTS, shard=101)
    found = nearest_rows(made, 0, 17, 40, metric=metric)
    assert found.rows.tolist() == copies[copies != 17][:40].tolist()
    assert len(found.scores.unique()) == 1


def test_neighbours_that_differ_by_less_than_float32_are_told_apart(tmp_path):
    # ever so slightly apart in direction, in descending order of nearness by the number of the row
    x = torch.zeros(N, 4)
    x[:, 0], x[:, 1] = 1000.0, torch.linspace(1.0, 0.0, N)
    made = made_store(tmp_path / "s", {Site(0): x}, TEXTS)
    found = nearest_rows(made, 0, torch.tensor([1.0, 0, 0, 0]), 6)
    assert found.rows.tolist() == list(range(N - 1, N - 7, -1))
    assert (found.scores.diff() < 0).all()


def test_planted_neighbours_and_the_prompt_of_the_query_left_out(tmp_path):
    x = noise(N, D, 7)
    query, mine, theirs = 80, 83, 961  # rows 80 to 87 are one prompt
    x[mine], x[theirs] = x[query] + 0.01 * x[1], x[query] + 0.02 * x[2]
    made = made_store(tmp_path / "s", {Site(0): x}, TEXTS)
    assert nearest_rows(made, 0, query, 2).rows.tolist() == [mine, theirs]
    found = nearest_rows(made, 0, query, N, other_prompts=True)
    assert found.rows[0] == theirs
    assert found.searched == len(found.rows) == N - WORDS
    assert not set(found.rows.tolist()) & set(range(80, 88))
    assert nearest_rows(made, 0, query - N, 1).rows.tolist() == [mine], "a row may be counted from the end"


def test_a_vector_has_neighbours_too(store):
    x = store.read(0)
    found = nearest_rows(store, 0, x[5].clone(), 3)
    assert found.rows[0] == 5
    assert found.scores[0] == pytest.approx(1)
    assert found.query is None
    assert list(found.frame().columns) == ["row", "cosine"]
    assert list(nearest_rows(store, 0, 5, 3, metric="euclidean").frame().columns) == ["row", "distance"]
    assert "<table" in found._repr_html_()


def test_rows_of_zeros_and_rows_that_are_not_finite(tmp_path):
    x = -noise(N, D, 2).abs()
    x[0], x[9] = 1.0, 0.0
    x[4, 3], x[5, 3], x[6, 3] = float("nan"), float("inf"), float("-inf")
    made = made_store(tmp_path / "s", {Site(0): x}, TEXTS)
    for metric in ("cosine", "euclidean"):
        found = nearest_rows(made, 0, 0, N, metric=metric)
        assert len(found.rows) == N - 4
        assert not {0, 4, 5, 6} & set(found.rows.tolist())
    cosine = nearest_rows(made, 0, 0, 1)
    assert (cosine.rows.tolist(), cosine.scores.tolist()) == ([9], [0.0])
    with pytest.raises(UserError, match=r"row 9 of resid_post.0 is zero or not finite"):
        nearest_rows(made, 0, 9)
    with pytest.raises(UserError, match="row 4 of"):
        nearest_rows(made, 0, 4, metric="euclidean")
    assert len(nearest_rows(made, 0, 9, 3, metric="euclidean").rows) == 3


def test_the_store_is_read_in_batches(store, monkeypatch):
    sizes: list[int] = []
    iter_batches = StoreClass.iter_batches

    def counted(self, site, size, *rest, **more):
        for batch in iter_batches(self, site, size, *rest, **more):
            sizes.append(len(batch))
            yield batch

    monkeypatch.setattr(StoreClass, "iter_batches", counted)
    monkeypatch.setattr(neighbours, "CPU_BATCH", 100)
    read = StoreClass.read
    monkeypatch.setattr(StoreClass, "read", lambda self, site, rows, **more: (
        sizes.append(len(rows)), read(self, site, rows, **more))[1])  # fmt: skip
    nearest_rows(store, 0, 3, 5)
    assert max(sizes) <= 100
    assert N <= sum(sizes) < N + 100


def test_what_has_no_neighbours_is_refused(store):
    with pytest.raises(UserError, match="unknown metric 'dot'; allowed: cosine, euclidean"):
        nearest_rows(store, 0, 1, metric="dot")
    with pytest.raises(UserError, match="k=0: ask for one neighbour or more"):
        nearest_rows(store, 0, 1, 0)
    with pytest.raises(UserError, match=f"has rows 0 to {N - 1}"):
        nearest_rows(store, 0, N)
    with pytest.raises(UserError, match=r"has no mlp_out.0"):
        nearest_rows(store, "mlp_out.0", 1)
    with pytest.raises(UserError, match=r"a vector of 3 values has no neighbours at resid_post.0, which is 32 wide"):
        nearest_rows(store, 0, torch.ones(3))
    with pytest.raises(UserError, match="a vector comes from none"):
        nearest_rows(store, 0, torch.ones(D), other_prompts=True)
    with pytest.raises(UserError, match=r"the vector of resid_post.0 is zero or not finite"):
        nearest_rows(store, 0, torch.zeros(D))
