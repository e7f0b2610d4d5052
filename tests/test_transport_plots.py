"""Transport figures show the numbers of their tables, and say so where there are none."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

from workbench import transport_plots as plots
from workbench.sites import Site
from workbench.transport import TransportGrid, transport_grid

from .transport.streams import stream, write_stream


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
    assert figure.layout.xaxis.title.text == "target"


def test_curves_have_every_arm_with_its_interval(grid):
    figure = plots.grid_curves(grid, target=2)
    assert [t.name for t in figure.data] == grid.arms
    ridge, cell = figure.data[0], grid.cell(1, 2)
    assert list(ridge.x) == ["resid_post.0", "resid_post.1"]
    assert ridge.y[1] == pytest.approx(cell["r2_uniform"])
    assert ridge.error_y.array[1] == pytest.approx(cell["r2_uniform_high"] - cell["r2_uniform"])
    assert list(plots.grid_curves(grid, source=0).data[0].x) == ["resid_post.1", "resid_post.2"]


def test_empty_tables_say_what_is_missing():
    nothing = pd.DataFrame()
    for figure in (plots.efficiency_by_rank(nothing), plots.feature_scatter({}), plots.causal_bars(nothing),
                   plots.shortcut_points(nothing)):  # fmt: skip
        assert isinstance(figure, go.Figure)
        assert len(figure.data) == 0
        assert figure.layout.annotations[0].text


def test_efficiency_is_drawn_over_ranks():
    columns = ("optimal", "truncated", "bound", "efficiency", "efficiency_truncated")
    table = pd.DataFrame({"source": "a", "target": "b", "rank": [1, 2], **{c: [0.1, 0.2] for c in columns}})
    figure = plots.efficiency_by_rank(table)
    assert len(figure.data) == 5
    assert list(figure.data[0].x) == [1, 2]
    assert figure.layout.xaxis2.title.text == "rank"


def test_features_are_points_by_verdict_and_html_is_escaped():
    table = pd.DataFrame({"verdict": ["transported", "rare", "synthesised"], "r2": [0.9, float("nan"), -3.0],
                          "identity_carries": [0.8, 0.1, 0.2], "count": [30, 1, 40]})  # fmt: skip
    figure = plots.feature_scatter({"<b>x</b>": table})
    assert {t.name: list(t.y) for t in figure.data} == {"transported": [0.9], "synthesised": [-0.5]}
    assert "<b>x</b>" not in figure.to_json()


def test_causal_arms_and_shortcuts_have_their_intervals():
    ends = {"delta": [0.0, 0.5], "delta_low": [0.0, 0.4], "delta_high": [0.0, 0.7]}
    bars = plots.causal_bars(pd.DataFrame({"source": "a", "target": "b", "arm": ["untouched", "mean"], **ends}))
    assert [t.name for t in bars.data] == ["mean"]
    assert bars.data[0].error_y.array[0] == pytest.approx(0.2)
    single = pd.DataFrame({"blocks": ["", "1"], "saved": [0.0, 0.2], **ends})
    points = plots.shortcut_points(single, single)
    assert [t.name for t in points.data] == ["one run of blocks", "greedy"]
    assert list(points.data[0].x) == [0, 20]
    assert points.data[0].text[0] == "the whole model"


def test_sites_are_ordered_by_layer(grid):
    assert [Site.parse(s).layer for s in plots.grid_heatmap(grid).data[0].x] == [1, 2]
