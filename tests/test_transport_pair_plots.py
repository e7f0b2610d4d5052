"""Figures of one pair of a transport show the numbers of their tables."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from workbench import transport_pair_plots as plots
from workbench.errors import UserError
from workbench.transport import TransportGrid, transport_grid

from .transport.streams import stream, write_stream


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> TransportGrid:
    store = write_stream(tmp_path_factory.mktemp("pair") / "s", stream(1200), 20)
    return transport_grid(store, folds=2, shards=4, products=torch.float64)


def test_dimensions_are_sorted_with_their_intervals(grid):
    table = plots.dimension_frame(grid, 0, 2)
    value, error = grid.per_output[grid.pairs[1]]
    assert [str(site) for site in grid.pairs[1]] == ["resid_post.0", "resid_post.2"]
    assert list(table["r2"]) == sorted(value.tolist(), reverse=True)
    assert table["r2"].mean() == pytest.approx(grid.cell(0, 2)["r2_uniform"], abs=1e-6)
    first = table.iloc[0]
    assert first["se"] == pytest.approx(float(error[int(first["dimension"])]))
    assert first["high"] - first["r2"] == pytest.approx(3.1824 * first["se"], rel=1e-3)  # Student's t of 4 shards
    with pytest.raises(UserError, match=r"no pair resid_post\.2 to resid_post\.0 in this grid"):
        plots.dimension_frame(grid, 2, 0)


def test_the_curve_the_histogram_and_the_arms_are_drawn(grid):
    figure = plots.r2_by_dimension(grid, 0, 2)
    named = {trace.name: trace for trace in figure.data}
    assert list(named["ridge map"].y) == list(plots.dimension_frame(grid, 0, 2)["r2"])
    for arm, name in (
        ("shuffled", "shuffled (control)"),
        ("identity_bias", "identity + bias"),
        ("ridge", "ridge map, mean"),
    ):
        score = grid.cell(0, 2, arm=arm)["r2_uniform"]
        assert set(named[name].y) == {max(plots.LOWEST, score)}
        assert f"{score:.4f}" in named[name].hovertemplate
    (histogram,) = (trace for trace in figure.data if trace.type == "histogram")
    assert len(histogram.y) == 8
    assert not [a.text for a in figure.layout.annotations]


def test_still_and_hopeless_dimensions_are_told(grid):
    value = grid.per_output[grid.pairs[1]].clone()
    value[0, 0], value[0, 1] = torch.nan, -7.0
    other = TransportGrid(grid.table, {**grid.per_output, grid.pairs[1]: value}, grid.meta)
    figure = plots.r2_by_dimension(other, 0, 2)
    assert figure.layout.annotations[0].text == "1 that never vary are left out; 1 below -0.5 are drawn there"
    assert min(figure.data[1].y) == plots.LOWEST
    value[0] = torch.nan
    assert "No dimension of the target varies" in plots.r2_by_dimension(other, 0, 2).layout.annotations[0].text


def test_efficiency_has_its_bound_and_its_ceiling():
    columns = ("optimal", "truncated", "bound", "ceiling", "ceiling_corrected", "efficiency", "efficiency_truncated")
    table = pd.DataFrame({"rank": [1, 2], **{c: [0.1 * i, 0.2 * i] for i, c in enumerate(columns, 1)}})
    figure = plots.efficiency_of_pair(table)
    assert [list(t.y) for t in figure.data] == [list(table[c]) for c in columns]
    assert [t.name for t in figure.data if t.showlegend is not False] == [name for _, name, _, _ in plots.CURVES]
    assert "it needs more held-out rows" in plots.efficiency_of_pair(table[:0]).layout.annotations[0].text


def test_sizes_stand_beside_those_of_independent_rows():
    size = {"sum_rho2": 5.5, "sum_rho2_null": 0.5, "wachter_count": 7, "held_out_sum": -0.1, "held_out_count": 6,
            "dim_lin": 6.5, "dim_lin_null": 6.0, "rank_x": 8, "rank_y": 9}  # fmt: skip
    bars, ticks = plots.subspace_sizes(size).data
    assert dict(zip(bars.y, bars.x, strict=True)) == {
        "sum of ρ²": 5.5, "sum of ρ², held out": -0.1, "count above Wachter's edge": 7, "count, held out": 6,
        "participation ratio": 6.5,
    }  # fmt: skip
    assert list(ticks.x) == [0.5, 0, 0, 0, 6.0]
    assert list(bars.text)[2] == "7"


def test_of_many_features_each_verdict_keeps_its_share():
    table = pd.DataFrame({"feature": range(1000), "verdict": ["mixed"] * 900 + ["rare"] * 99 + ["rotated"], "r2": 0.1,
                          "identity_carries": 0.5, "count": 30.0})  # fmt: skip
    drawn = plots.spread_features(table, 100)
    assert drawn["verdict"].value_counts().to_dict() == {"mixed": 90, "rare": 9, "rotated": 1}
    assert drawn["feature"].is_monotonic_increasing
    assert plots.spread_features(table, 1000) is table
    figure = plots.features_of_pair(table, "resid_post.0", "resid_post.1", most=100)
    assert sum(len(trace.x) for trace in figure.data) == 100
    assert figure.layout.annotations[-1].text == "100 of 1,000 features are drawn"
