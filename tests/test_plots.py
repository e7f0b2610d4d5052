"""Figures show the numbers of the metrics, and say so where there are none."""

from __future__ import annotations

import plotly.graph_objects as go
import pytest

from workbench import plots
from workbench.summary import ARMS

from .metrics_example import EVIL, metrics

FIGURES = (plots.arms, plots.forecast, plots.layer_pairs, plots.dose)


@pytest.mark.parametrize("draw", FIGURES)
def test_empty_metrics_give_a_figure_that_says_what_is_missing(draw):
    for nothing in ({}, {"behaviours": {}}, {"behaviours": {"a": {}}}):
        figure = draw(nothing)
        assert isinstance(figure, go.Figure)
        assert len(figure.data) == 0
        assert figure.layout.annotations[0].text


@pytest.mark.parametrize("draw", FIGURES)
def test_every_axis_has_a_title_and_no_text_is_raw_html(draw):
    text = draw(metrics()).to_json()
    assert "<script" not in text
    assert EVIL not in text
    figure = draw(metrics())
    titles = [axis.title.text for axis in (*figure.select_xaxes(), *figure.select_yaxes())]
    assert any("nats" in t or "layer" in t for t in titles if t)
    assert "(" in str(figure.layout) or draw is plots.layer_pairs


def test_arms_have_their_values_intervals_and_distinct_looks():
    found = metrics()
    figure = plots.arms(found)
    assert len(figure.data) == 2 * 2 * len(ARMS)
    paste = next(t for t in figure.data if t.name == "paste")
    assert paste.x[0] == pytest.approx(80)
    assert (paste.error_x.array[0], paste.error_x.arrayminus[0]) == pytest.approx((5, 5))
    assert len(set(plots.ARM_STYLE.values())) == len(ARMS)


def test_arms_without_intervals_or_rates_are_drawn_as_far_as_they_go():
    found = metrics()
    arms = found["behaviours"]["reasoning"]["arms"]
    arms["paste"] = {"rate": {"value": 0.5}, "log_odds": None}
    arms["native"] = {"rate": None}
    names = [t.name for t in plots.arms(found).data]
    assert names.count("paste") == 3  # one of four panels is gone
    assert names.count("native training") == 2


def test_forecast_draws_measured_candidates_and_rings_the_chosen():
    figure = plots.forecast(metrics())
    points = [t for t in figure.data if t.mode == "markers"]
    assert sum(len(t.x) for t in points if t.name != "chosen") == 2 * 4  # donor layer 0 was not measured
    chosen = next(t for t in points if t.name == "chosen")
    assert (chosen.x[0], chosen.y[0]) == pytest.approx((0.6, 0.8))
    assert "off target: forecast -0.10" in chosen.text[0]


def test_layer_pairs_take_the_best_candidate_and_leave_blanks():
    found = metrics()
    reasoning = found["behaviours"]["reasoning"]["forecast"]
    worse = {**reasoning["candidates"][5], "on": 0.1, "chosen": False}
    reasoning["candidates"] = [*reasoning["candidates"][1:], worse]
    grid = plots.pair_grid(found["behaviours"]["reasoning"])
    assert grid[2, 1]["on"] == pytest.approx(0.6)
    heat = next(t for t in plots.layer_pairs(found).data if t.type == "heatmap")
    assert heat.z[0][0] is None  # the pair 0, 0 was taken out
    assert "not tried" in heat.text[0][0]


def test_pair_grid_prefers_reaching_the_target_without_side_effects():
    near = {"donor_site": "resid_post.1", "recipient_site": "resid_post.1", "on": 1.0, "off": 0.1}
    far = {**near, "on": 5.0, "off": 2.0}
    assert plots.pair_grid({"forecast": {"target": 1.0, "candidates": [far, near]}})[1, 1]["on"] == 1.0


def test_dose_is_in_order_of_strength_with_and_without_kl():
    figure = plots.dose(metrics())
    line = next(t for t in figure.data if t.mode == "lines+markers")
    assert list(line.x) == [0.0, 0.5, 1.0]
    assert figure.layout.yaxis2.title.text.startswith("KL")
    bare = metrics()
    for b in bare["behaviours"].values():
        for point in b["dose"]:
            del point["kl"]
    assert "yaxis2" not in plots.dose(bare).layout


def test_a_correspondence_shows_every_score_and_the_matching_over_it():
    scores = {(d, r): d - r / 2 for d in (1, 3) for r in (0, 2, 4)}
    figure = plots.correspondence(scores, {1: 0, 3: 2}, "held-out R2 <b>")
    heat, path = figure.data
    assert [list(row) for row in heat.z] == [[1.0, 0.0, -1.0], [3.0, 2.0, 1.0]]
    assert (list(path.x), list(path.y)) == (["0", "2"], ["1", "3"])
    assert (heat.zmin, heat.zmax) == (-3.0, 3.0)
    assert "<b>" not in figure.to_json()
    assert len(plots.correspondence(scores).data) == 1
    assert plots.correspondence({(0, 0): 0.5}).data[0].zmin is None  # nothing below 0: no sign to show
    assert plots.correspondence({}).layout.annotations[0].text
