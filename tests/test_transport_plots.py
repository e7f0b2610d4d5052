"""Transport figures show the numbers of their tables, and say so where there are none."""

from __future__ import annotations

import re

import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

from workbench import transport_plots as plots
from workbench.sites import Site
from workbench.transport import TransportGrid, transport_grid

from .transport.streams import stream, write_stream

A, B = "resid_post.0", "resid_post.1"


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> TransportGrid:
    store = write_stream(tmp_path_factory.mktemp("plots") / "s", stream(1200), 20)
    return transport_grid(store, folds=2, shards=4, products=torch.float64)


def test_the_heatmap_has_the_grid_beside_its_control(grid):
    figure = plots.grid_heatmap(grid, "weighted")
    ridge, control = figure.data
    assert ridge.z[0][1] == pytest.approx(grid.cell(0, 2)["r2_weighted"])
    assert ridge.z[1][0] is None
    assert "no such pair" in ridge.text[1][0]
    assert control.z[0][0] == pytest.approx(grid.cell(0, 1, arm="shuffled")["r2_weighted"])
    assert figure.layout.xaxis.title.text == "target layer (resid_post)"
    assert list(figure.layout.xaxis.ticktext) == ["1", "2"]
    assert ridge.texttemplate, "few cells bear their numbers"


def test_curves_have_every_arm_with_its_interval(grid):
    figure = plots.grid_curves(grid, target=2)
    assert [t.name for t in figure.data] == [plots.arm_word(arm) for arm in grid.arms]
    ridge, cell = figure.data[0], grid.cell(1, 2)
    assert list(ridge.x) == ["resid_post.0", "resid_post.1"]
    assert ridge.y[1] == pytest.approx(cell["r2_uniform"])
    assert ridge.error_y.array[1] == pytest.approx(cell["r2_uniform_high"] - cell["r2_uniform"])
    assert f"{cell['r2_uniform_low']:.4f} to {cell['r2_uniform_high']:.4f}" in ridge.text[1]
    assert list(plots.grid_curves(grid, source=0).data[0].x) == ["resid_post.1", "resid_post.2"]


def test_empty_tables_say_what_is_missing():
    nothing = pd.DataFrame()
    for figure in (plots.efficiency_by_rank(nothing), plots.feature_scatter({}), plots.causal_points(nothing),
                   plots.shortcut_points(nothing), plots.verdict_bars([])):  # fmt: skip
        assert isinstance(figure, go.Figure)
        assert len(figure.data) == 0
        assert figure.layout.annotations[0].text


def efficiencies(*pairs: tuple[str, str]) -> pd.DataFrame:
    columns = ("optimal", "truncated", "bound", "efficiency", "efficiency_truncated")
    parts = [
        pd.DataFrame({"source": a, "target": b, "rank": [1, 2], **{c: [0.1, 0.2] for c in columns}}) for a, b in pairs
    ]
    return pd.concat(parts)


def test_efficiency_is_drawn_over_ranks():
    figure = plots.efficiency_by_rank(efficiencies((A, B)))
    curves = [t for t in figure.data if t.x[0] is not None]
    assert [(t.name, list(t.x), list(t.y)) for t in curves] == [("resid_post.0 → 1", [1, 2], [0.1, 0.2])] * 5
    assert figure.layout.xaxis.title.text == "rank of the map"


def test_of_many_pairs_some_are_drawn_and_the_figure_says_so():
    pairs = [("resid_post.0", f"resid_post.{i}") for i in range(1, 10)]
    figure = plots.efficiency_by_rank(efficiencies(*pairs), most=3)
    assert {t.name for t in figure.data if t.x[0] is not None} == {
        "resid_post.0 → 1",
        "resid_post.0 → 5",
        "resid_post.0 → 9",
    }
    assert [a.text for a in figure.layout.annotations][-1] == "3 of 9 pairs are drawn"


def test_features_are_points_by_verdict_and_html_is_escaped():
    table = pd.DataFrame({"verdict": ["transported", "rare", "synthesised"], "r2": [0.9, float("nan"), -3.0],
                          "identity_carries": [0.8, 0.1, 0.2], "count": [30, 1, 40], "name": ["<i>", "", "to"]})  # fmt: skip
    figure = plots.feature_scatter({"<b>x</b>": table})
    assert {t.name: list(t.y) for t in figure.data} == {"transported": [0.9], "synthesised": [plots.LOWEST]}
    assert "fires on to" in figure.data[1].text[0]
    assert not {"<b>x</b>", "<i>"} & set(re.findall(r"<[^>]*>(?:x</b>)?", figure.to_json()))


def test_verdicts_are_shares_of_all_features():
    line = {"source": A, "target": B, "transported": 30, "rotated": 10, "mixed": 0, "synthesised": 50, "rare": 10}
    figure = plots.verdict_bars([line])
    assert {t.name: t.x[0] for t in figure.data} == {
        "transported": 30, "rotated": 10, "mixed": 0, "synthesised": 50, "rare": 10,
    }  # fmt: skip
    assert {t.y[0] for t in figure.data} == {"resid_post.0 → 1"}


@pytest.mark.parametrize(("low", "kind"), [(0.4, "log"), (-0.1, None)])
def test_causal_arms_have_their_intervals_on_a_logarithmic_axis_where_all_lie_above_zero(low, kind):
    ends = {"delta": [0.0, 0.5], "delta_low": [0.0, low], "delta_high": [0.0, 0.7]}
    points = plots.causal_points(pd.DataFrame({"source": A, "target": B, "arm": ["untouched", "mean"], **ends}))
    assert [t.name for t in points.data] == ["mean"]
    assert points.data[0].error_y.array[0] == pytest.approx(0.2)
    assert points.layout.yaxis.type == kind
    assert list(points.layout.xaxis.ticktext) == ["resid_post.0 → 1"]


def test_shortcuts_say_which_blocks_are_left_out():
    ends = {"delta": [0.0, 0.5], "delta_low": [0.0, 0.4], "delta_high": [0.0, 0.7]}
    single = pd.DataFrame({"blocks": ["", "1"], "saved": [0.0, 0.2], **ends})
    points = plots.shortcut_points(single, single)
    assert [t.mode for t in points.data] == ["markers+text", "lines+markers"]
    assert list(points.data[0].x) == [0, 20]
    assert list(points.data[0].text) == ["the whole model", "without 1"]


def test_sites_are_ordered_by_layer(grid):
    assert [Site.parse(s).layer for s in plots.grid_heatmap(grid).data[0].x] == [1, 2]


def test_of_shortcuts_in_a_heap_some_bear_their_names_and_none_leaves_the_plot():
    saved = [0.0, *[0.08] * 11, *[0.16] * 10, 0.92]
    delta = [0.0, *[0.1 + 0.001 * i for i in range(11)], *[0.3 + 0.01 * i for i in range(10)], 4.0]
    blocks = ["", *map(str, range(1, 12)), *(f"{i} {i + 1}" for i in range(10)), " ".join(map(str, range(1, 12)))]
    single = pd.DataFrame({"blocks": blocks, "saved": saved, "delta": delta, "delta_low": delta, "delta_high": delta})
    trace = plots.shortcut_points(single).data[0]
    named = [(name, place) for name, place in zip(trace.text, trace.textposition, strict=True) if name]
    assert ("without 1 2 3 4 5 6 7 8 9 10 11", "middle left") in named
    assert 3 <= len(named) < len(blocks)
    assert list(trace.hovertext) == ["the whole model", *(f"without {b}" for b in blocks[1:])]


def test_cells_can_be_clicked_and_the_picked_one_is_framed(grid):
    figure = plots.grid_heatmap(grid, picked=("resid_post.1", "resid_post.2"))
    cells = figure.data[-1]
    assert [list(pair) for pair in cells.customdata] == [[str(a), str(b)] for a, b in grid.pairs]
    frame = figure.layout.shapes[0]
    assert (frame.x0 + frame.x1, frame.y0 + frame.y1) == (2, 2)  # the second target and the second source
    assert len(plots.grid_heatmap(grid).layout.shapes) == 0
