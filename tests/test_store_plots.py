"""Figures of a store show the numbers of its tables, and text of others as text."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

from probes.projection import Projection, project_rows, stratified_rows
from workbench import store_plots
from workbench.plots import on_dark
from workbench.sites import Site
from workbench.store import Store
from workbench.store.context import row_frame
from workbench.store.overview import store_overview

from .store.made import made_store, noise

TEXTS = [" ".join(["start", *(f"w{j}" for j in range(1, 9))]) for _ in range(30)]
N = 9 * 30


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    x = noise(N, 40)
    x[:, 5] += 30
    labels = [f"label{i % 11}" for i in range(30)]
    return made_store(tmp_path_factory.mktemp("plots") / "s", {Site(0): x, Site(2): 9 * x}, TEXTS, labels=labels)


@pytest.fixture(scope="module")
def plane(store) -> Projection:
    return project_rows(store, 0, stratified_rows(store, 200))


def test_norms_by_layer_are_medians_with_their_bands(store):
    found = store_overview(store)
    figure = store_plots.norms_by_layer(found)
    lines = {t.name: t for t in figure.data if t.mode == "lines+markers"}
    assert list(lines) == ["resid_post", "resid_post, position 0"]
    others = found.norms[found.norms["group"] == "others"]
    assert list(lines["resid_post"].x) == [0.0, 2.0]
    assert list(lines["resid_post"].y) == others["median"].tolist()
    bands = [t for t in figure.data if t.fill]
    assert list(bands[0].y) == [*others["q95"], *others["q05"][::-1]]
    assert figure.layout.yaxis.title.text == "L2 norm (activation units)"


def test_norms_by_position_begin_with_the_first(store):
    found = store_overview(store)
    line = store_plots.norms_by_position(found, -1).data[-1]
    table = found.positions[found.positions["site"] == "resid_post.2"]
    assert line.x[0] == 0
    assert list(line.y) == table["median"].tolist()


def test_outlier_dimensions_are_red(store):
    figure = store_plots.outlier_dimensions(store_overview(store), 0)
    outliers, others = figure.data
    assert (outliers.name, list(outliers.x), outliers.marker.color) == ("outlier", ["5"], store_plots.RED)
    assert len(others.x) == 15
    assert "dimension 5<br>mean |value| 30" in outliers.text[0]


def test_points_know_their_row(plane, store):
    table = row_frame(store, plane.rows)
    for colour in (None, "position", "label", "token"):
        figure = store_plots.projection_scatter(plane, table, colour)
        assert all(isinstance(trace, go.Scattergl) for trace in figure.data)
        rows = np.concatenate([trace.customdata for trace in figure.data])
        assert sorted(rows.tolist()) == plane.rows.tolist()
        for trace in figure.data:
            for x, y, row in zip(trace.x, trace.y, trace.customdata, strict=True):
                i = plane.rows.tolist().index(row)
                assert (x, y) == (float(plane.points[i, 0]), float(plane.points[i, 1]))
    assert figure.layout.xaxis.title.text == plane.axes[0]


def test_the_commonest_values_have_colours_and_the_rest_is_grey(plane, store):
    table = row_frame(store, plane.rows)
    figure = store_plots.projection_scatter(plane, table, "label")
    names = [trace.name for trace in figure.data]
    assert names[0] == "all others (4 values)", "of eleven labels"
    assert names[1:] == list(
        table["label"].value_counts().sort_index().sort_values(ascending=False, kind="stable").index[:7]
    )
    assert figure.data[0].marker.color == store_plots.GREY
    assert len({(t.marker.color, t.marker.symbol) for t in figure.data}) == 8


def test_numbers_are_drawn_on_a_scale(plane, store):
    table = row_frame(store, plane.rows).assign(norm=plane.norms.numpy())
    (trace,) = store_plots.projection_scatter(plane, table, "norm").data
    np.testing.assert_allclose(trace.marker.color, plane.norms)
    assert store_plots.is_scale(pd.Series([*range(20), None], dtype=object))
    assert not store_plots.is_scale(pd.Series([1, 2, 1, 2]))
    assert not store_plots.is_scale(pd.Series(["a", *range(20)], dtype=object))
    assert not store_plots.is_scale(pd.Series([None, None]))


def test_a_figure_of_points_reads_on_a_dark_page(plane, store):
    table = row_frame(store, plane.rows).assign(norm=plane.norms.numpy())
    for colour in ("norm", "label"):
        assert len(on_dark(store_plots.projection_scatter(plane, table, colour)).data) >= 1


def test_two_planes_have_the_same_tokens_in_the_same_colours(store):
    rows = stratified_rows(store, 90)
    planes = [project_rows(store, site, rows) for site in (0, 2)]
    planes[1] = project_rows(store, 2, rows)
    tables = [row_frame(store, rows)] * 2
    figure = store_plots.paired_scatter(planes, tables, ["<b>a</b>", "b"], "label")
    left = {t.name: t for t in figure.data if t.xaxis == "x"}
    right = {t.name: t for t in figure.data if t.xaxis == "x2"}
    assert list(left) == list(right)
    for name, trace in left.items():
        assert trace.customdata.tolist() == right[name].customdata.tolist()
        # the second site is nine times the first: the same plane, larger
        np.testing.assert_allclose(9 * trace.x, right[name].x, rtol=1e-3, atol=1e-2)
    assert figure.layout.annotations[0].text == "&lt;b&gt;a&lt;/b&gt;, resid_post.0"


def test_a_plane_that_is_mirrored_is_turned_over(store):
    rows = torch.arange(60)
    one = project_rows(store, 0, rows)
    mirrored = Projection(
        one.site, "pca", rows, one.points * torch.tensor([-1.0, 1.0]), one.norms, one.shares, 60, N, 0
    )
    figure = store_plots.paired_scatter([one, mirrored], [row_frame(store, rows)] * 2, ["a", "b"])
    np.testing.assert_array_equal(figure.data[0].x, figure.data[1].x)


def test_what_is_not_there_is_said(store):
    found = store_overview(store, sites=[0])
    for figure in (store_plots.norms_by_position(found, 2), store_plots.outlier_dimensions(found, 2)):
        assert len(figure.data) == 0
        assert figure.layout.annotations[0].text


def test_text_of_others_is_escaped_and_cut(tmp_path):
    hostile = ["<script>alert(1)</script>", "**b**", "a\u202eb", "z" * 10_000]
    store = made_store(tmp_path / "s", {Site(0): noise(4, 6)}, hostile, labels=[f"<i>{i}</i>" for i in range(4)],
                       metas=[{"<u>k</u>": "<u>v</u>"}] * 4)  # fmt: skip
    rows = torch.arange(4)
    plane, table = project_rows(store, 0, rows), row_frame(store, rows)
    for colour in ("token", "label", "meta.<u>k</u>"):
        made = json.loads(store_plots.projection_scatter(plane, table, colour).to_json())
        made["layout"].pop("template")
        shown = json.dumps(made, ensure_ascii=False)
        for text in ("<script", "<i>", "<u>", "\u202e", "z" * 50):
            assert text not in shown
        assert "⟨U+202E⟩" in shown
