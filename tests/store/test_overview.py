"""The overview of a store shows what was planted in it, from a sample, and nothing of it as HTML."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from workbench import UserError
from workbench.sites import Site
from workbench.store import Store
from workbench.store.overview import store_overview
from workbench.store.rows import RowFiles

from .made import made_store, noise

TEXTS = [" ".join(["start", *(f"w{j}" for j in range(1, 20 + i % 5))]) for i in range(60)]
N, D = sum(len(text.split()) for text in TEXTS), 64
STARTS = np.cumsum([0, *(len(text.split()) for text in TEXTS[:-1])])


def planted(dtype: torch.dtype = torch.float32) -> dict[Site, torch.Tensor]:
    """Noise; dimension 7 large everywhere, dimension 11 massive at position 0 and, once, in row 33 (site 1 alone)."""
    x, y = noise(N, D, 0), noise(N, D, 1)
    y[:, 7] += 40.0
    y[:, 3] *= 3.0
    y[STARTS, 11] = -4000.0
    y[33, 11] = 2500.0
    return {Site(0): x.to(dtype), Site(1): y.to(dtype)}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return made_store(tmp_path_factory.mktemp("overview") / "s", planted(), TEXTS, group=100, shard=128)


def test_norms_are_those_of_the_rows(store):
    found = store_overview(store, rows=N)
    x, first = store.read(0), np.zeros(N, bool)
    first[STARTS] = True
    norm = x.double().norm(dim=1).numpy()
    lines = found.norms.set_index(["site", "group"])
    line = lines.loc[("resid_post.0", "others")]
    assert line["n"] == N - len(TEXTS)
    assert line["median"] == pytest.approx(np.median(norm[~first]), rel=1e-5)
    assert line["q95"] == pytest.approx(np.quantile(norm[~first], 0.95), rel=1e-5)
    assert lines.loc[("resid_post.1", "first")]["median"] > 3900
    assert lines.loc[("resid_post.1", "others")]["median"] < 60, "the first rows are told apart"


def test_norms_by_position_tell_the_first_from_the_others(store):
    found = store_overview(store, rows=N).positions.query("site == 'resid_post.1'")
    assert found.iloc[0][["low", "high"]].tolist() == [0, 0]
    assert found.iloc[0]["median"] > 3900
    assert found.iloc[1:]["median"].max() < 60
    assert found["n"].sum() == N - len(TEXTS) + found.iloc[0]["n"]
    assert (found["low"].to_numpy()[1:] > found["high"].to_numpy()[:-1]).all()


def test_outlier_dimensions_are_those_that_were_planted(store):
    found = store_overview(store)
    assert found.outliers[["site", "dim"]].to_numpy().tolist() == [["resid_post.1", 7]]
    line = found.outliers.iloc[0]
    assert line["mean_abs"] == pytest.approx(40, rel=0.02)
    assert line["std"] == pytest.approx(1, rel=0.1)
    assert line["share"] == pytest.approx(1, abs=0.01)
    assert line["ratio"] > 40
    second = found.dimensions.query("site == 'resid_post.1'").iloc[1]
    assert second["dim"] == 3
    assert not second["outlier"], "what is somewhat larger is listed, and is no outlier"


def test_massive_activations_are_told_apart_from_the_first_token(store):
    found = store_overview(store, rows=N)
    assert set(found.massive["site"]) == {"resid_post.1"}
    assert set(found.massive["dim"]) == {11}
    elsewhere = found.massive[~found.massive["first"]]
    assert elsewhere["row"].tolist() == [33]
    assert elsewhere["value"].tolist() == [2500.0]
    assert elsewhere["token"].tolist() == [store.rows()["text"].iloc[33]]
    assert (found.massive[found.massive["first"]]["position"] == 0).all()
    assert found.told_apart == "60 rows at position 0, 1 elsewhere (listed)"


def test_a_large_value_that_is_not_a_thousand_times_the_median_is_not_massive(tmp_path):
    x = 10 * noise(N, D)
    x[5, 2] = 500.0
    found = store_overview(made_store(tmp_path / "s", {Site(0): x}, TEXTS), rows=N)
    assert found.massive.empty
    assert found.told_apart == "0 rows at position 0, 0 elsewhere (listed)"


def test_a_store_of_bfloat16_gives_nearly_the_same(store, tmp_path):
    other = made_store(tmp_path / "s", planted(torch.bfloat16), TEXTS)
    mine, theirs = store_overview(store, rows=300), store_overview(other, rows=300)
    assert theirs.about["dtype"] == "bfloat16"
    assert theirs.outliers["dim"].tolist() == [7]
    np.testing.assert_allclose(theirs.norms["median"], mine.norms["median"], rtol=0.02)


@pytest.mark.parametrize("count", [1, 80])
def test_stores_of_one_site_and_of_eighty(tmp_path, count):
    x = noise(N, 40)
    store = made_store(tmp_path / "s", {Site(i): (i + 1) * x for i in range(count)}, TEXTS)
    found = store_overview(store, rows=200)
    assert len(found.sites) == count
    others = found.norms.query("group == 'others'").set_index("layer")["median"]
    np.testing.assert_allclose(others / others[0], np.arange(count) + 1, rtol=1e-5)
    assert f"resid_post.0{f'-{count - 1}' if count > 1 else ''}; width 40" in dict(found.facts())["sites"]


def test_it_reads_the_sample_and_no_more(store, monkeypatch):
    rows: list[int] = []
    gather = RowFiles.gather
    monkeypatch.setattr(RowFiles, "gather", lambda self, site, index, *rest: (
        rows.append(len(index)), gather(self, site, index, *rest))[1])  # fmt: skip
    for whole in ("slice", "fill", "read_into"):
        monkeypatch.setattr(RowFiles, whole, lambda *_: pytest.fail("rows were read one after another"))
    found = store_overview(Store.open(store.path), rows=160)
    assert found.sampled == 160
    assert found.first == 20
    assert len(rows) == 2, "each site is read once"
    assert max(rows) <= 160 + 20
    assert "160 of 1,320 rows" in found.sample
    assert "20 rows at position 0" in found.sample


def test_some_sites_alone(store):
    assert [str(s) for s in store_overview(store, sites=[-1]).sites] == ["resid_post.1"]
    with pytest.raises(UserError, match=r"has no mlp_out.0; it has resid_post.0"):
        store_overview(store, sites=["mlp_out.0"])


def test_values_that_are_none_are_counted_and_left_out(tmp_path):
    x = noise(N, D)
    x[40, 3], x[STARTS[2], 0] = float("nan"), float("inf")
    found = store_overview(made_store(tmp_path / "s", {Site(0): x}, TEXTS), rows=N)
    assert dict(zip(found.norms["group"], found.norms["nonfinite"], strict=True)) == {"others": 1, "first": 1}
    assert np.isfinite(found.norms["q95"]).all()
    assert np.isfinite(found.dimensions["mean_abs"]).all()


def test_a_store_without_first_rows_says_so(tmp_path):
    values = {Site(0): noise(N - len(TEXTS), D)}
    found = store_overview(made_store(tmp_path / "s", values, TEXTS, skip=1))
    assert found.first == 0
    assert found.norms["group"].tolist() == ["others"]
    assert "no row is at position 0" in found.sample


def test_nothing_of_a_store_is_html(tmp_path: Path):
    token = "<script>alert(1)</script>" + "x" * 10_000
    x = noise(2, D)
    x[1, 0] = 1e6
    store = made_store(tmp_path / "s", {Site(0): x}, [f"<b>a</b> {token}"], model="<i>model</i>")
    html = store_overview(store)._repr_html_()
    assert "<script>" not in html
    assert "<i>" not in html
    assert "&lt;script&gt;" in html
    assert "(10,025 characters)" in html
    assert len(html) < 20_000


def test_two_overviews_of_one_seed_are_equal(store):
    a, b = (store_overview(store, rows=100, seed=3) for _ in range(2))
    assert a._repr_html_() == b._repr_html_()
