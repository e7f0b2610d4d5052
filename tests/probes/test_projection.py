"""Projections of rows find planted directions, the same for any batch and any order of reading."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch

from probes import projection
from probes.projection import project_rows, stratified_rows
from tests.store.made import made_store, noise
from workbench import UserError
from workbench.sites import Site
from workbench.store import Store
from workbench.store.resident import ResidentRows
from workbench.store.rows import RowFiles

N, D = 1200, 24
TEXTS = ["one two three four five six"] * (N // 6)


def planted(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Noise of variance 0.01 and, far from the origin, two directions of variance 9 and 4."""
    turn = torch.linalg.qr(noise(D, D, 5)).Q
    x = 0.1 * noise(N, D, 1)
    x[:, :2] += noise(N, 2, 2) * torch.tensor([3.0, 2.0])
    return (x @ turn + 50).to(dtype)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    path = tmp_path_factory.mktemp("projection") / "s"
    return made_store(path, {Site(0): planted(), Site(1): noise(N, 1)}, TEXTS, shard=500)


def test_the_plane_of_most_variance_is_found(store):
    found = project_rows(store, 0, torch.arange(N))
    x = planted() - planted().mean(0)
    _, values, axes = torch.linalg.svd(x, full_matrices=False)
    expected = x @ axes[:2].T
    for i in range(2):
        same = torch.corrcoef(torch.stack([found.points[:, i], expected[:, i]]))[0, 1]
        assert abs(same) == pytest.approx(1, abs=1e-4)
        assert float(found.points[:, i].std()) == pytest.approx(float(expected[:, i].std()), rel=1e-3)
    shares = (values**2 / (values**2).sum())[:2].tolist()
    assert found.shares == pytest.approx(shares, rel=1e-3)
    assert sum(found.shares or ()) > 0.9
    assert f"PC 1 ({shares[0]:.1%} of variance" in found.axes[0]


def test_it_does_not_depend_on_batches_or_on_where_the_rows_lie(store, monkeypatch):
    rows = stratified_rows(store, 700, seed=2)
    whole = project_rows(store, 0, rows)
    monkeypatch.setattr(projection, "BATCH", 33)
    for source in (store, ResidentRows(store, "cpu", keep=True), ResidentRows(store, "cpu")):
        other = project_rows(source, 0, rows)
        torch.testing.assert_close(other.points, whole.points)
        assert other.rows.tolist() == rows.tolist()


def test_rows_kept_on_a_device_are_used_there(store, monkeypatch):
    resident = ResidentRows(store, "cpu", keep=True)
    resident.take(0, [0])
    monkeypatch.setattr(RowFiles, "gather", lambda *_: pytest.fail("rows were read from the files"))
    assert len(project_rows(resident, 0, torch.arange(0, N, 7)).points) == len(range(0, N, 7))


def test_it_is_fitted_on_a_sample_and_reads_what_is_shown_and_no_more(store, monkeypatch):
    read: list[int] = []
    gather = RowFiles.gather
    monkeypatch.setattr(RowFiles, "gather", lambda self, site, index, *rest: (
        read.append(len(index)), gather(self, site, index, *rest))[1])  # fmt: skip
    for whole in ("slice", "fill", "read_into"):
        monkeypatch.setattr(RowFiles, whole, lambda *_: pytest.fail("rows were read one after another"))
    found = project_rows(store, 0, stratified_rows(store, 300), fitted=100)
    assert found.fitted == 100
    assert sum(read) == 400
    assert "300 of 1,200 rows at resid_post.0; PCA fitted on 100 of them" in found.remark


def test_signs_are_fixed_and_seeds_repeat(store):
    a, b = (project_rows(store, 0, torch.arange(N), seed=4) for _ in range(2))
    assert torch.equal(a.points, b.points)
    c = project_rows(store, 0, torch.arange(N), seed=5)
    torch.testing.assert_close(a.points, c.points, atol=0.05, rtol=0.01)


def test_bfloat16_rows(tmp_path, store):
    other = made_store(tmp_path / "s", {Site(0): planted(torch.bfloat16)}, TEXTS)
    mine, theirs = (project_rows(s, 0, torch.arange(N)).points for s in (store, other))
    assert torch.corrcoef(torch.stack([mine[:, 0], theirs[:, 0]]))[0, 1].abs() > 0.99
    assert theirs.dtype == torch.float32


def test_narrow_and_constant_sites_have_a_plane_too(tmp_path, store):
    narrow = project_rows(store, 1, torch.arange(N))
    assert narrow.points[:, 1].abs().max() == 0
    assert narrow.shares == (pytest.approx(1), 0.0)
    same = made_store(tmp_path / "s", {Site(0): torch.ones(N, 4)}, TEXTS)
    found = project_rows(same, 0, torch.arange(N))
    assert found.points.abs().max() == 0
    assert found.shares == (0.0, 0.0)


def test_rows_that_are_not_finite_have_no_place(tmp_path):
    x = planted()
    x[[3, 900], [0, 5]] = torch.tensor([float("nan"), float("inf")])
    found = project_rows(made_store(tmp_path / "s", {Site(0): x}, TEXTS), 0, torch.arange(N))
    assert found.points.isnan().any(1).nonzero().flatten().tolist() == [3, 900]
    assert found.fitted == N - 2


def test_the_table_has_rows_and_places(store):
    found = project_rows(store, 0, torch.tensor([7, 3, 11]))
    assert found.frame()["row"].tolist() == [7, 3, 11]
    np.testing.assert_array_equal(found.frame()[["x", "y"]].to_numpy(), found.points.numpy())
    assert "3 of 1,200 rows" in found._repr_html_()


class FakeUMAP:
    """Keeps the first two of the components that it is given."""

    def __init__(self, n_components: int, random_state: int) -> None:
        assert (n_components, random_state) == (2, 9)

    def fit(self, x: np.ndarray) -> FakeUMAP:
        self.fitted = len(x)
        return self

    def transform(self, x: np.ndarray) -> np.ndarray:
        return x[:, :2]


def test_umap_is_given_principal_components(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=FakeUMAP))
    found = project_rows(store, 0, torch.arange(N), "umap", seed=9)
    expected = project_rows(store, 0, torch.arange(N), seed=9)
    torch.testing.assert_close(found.points, expected.points, atol=1e-2, rtol=1e-3)
    assert found.shares is None
    assert found.axes == ("UMAP 1 (no unit)", "UMAP 2 (no unit)")


def test_what_cannot_be_projected_is_refused(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(
        UserError, match="UMAP needs the package umap-learn, which is not installed: pip install umap-learn"
    ):
        project_rows(store, 0, torch.arange(N), "umap")
    with pytest.raises(UserError, match="unknown projection 'tsne'; allowed: pca, umap"):
        project_rows(store, 0, torch.arange(N), "tsne")
    for rows in (torch.arange(1), torch.arange(0)):
        with pytest.raises(UserError, match="a projection is fitted on two or more"):
            project_rows(store, 0, rows)
    with pytest.raises(UserError, match=r"has no mlp_out.1"):
        project_rows(store, "mlp_out.1", torch.arange(N))
