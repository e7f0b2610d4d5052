"""Figures of likeness: every pair is there, what is no more than chance is marked, and no name of others is markup."""

from __future__ import annotations

import math

import pandas as pd

from workbench.similarity_plots import TITLES, similarity_best, similarity_heatmap

EVIL = "<script>alert(1)</script>"


def pairs(measures=("cka", "knn"), *, layers=(3, 2), low=0.1):
    lines = []
    for measure in measures:
        for i in range(layers[0]):
            for j in range(layers[1]):
                value = low + 0.1 * i + 0.2 * j
                lines.append({"measure": measure, "a": f"resid_post.{i}", "b": f"resid_post.{j}", "value": value,
                              "low": value - 0.05, "high": value + 0.05, "null": 0.05, "null_high": 0.15,
                              "beyond": value > 0.15, "rows": 100})  # fmt: skip
    return pd.DataFrame(lines)


def test_a_heatmap_has_every_pair_the_best_partner_and_what_is_chance():
    figure = similarity_heatmap(pairs(), "cka", names=("one", EVIL))
    heat, best, chance = figure.data
    assert (heat.zmin, round(heat.zmax, 6)) == (0, 0.5)
    assert best.showlegend
    assert [list(line) for line in heat.z] == [[0.1 + 0.1 * i + 0.2 * j for j in range(2)] for i in range(3)]
    assert list(zip(best.y, best.x, strict=True)) == [(f"resid_post.{i}", "resid_post.1") for i in range(3)]
    assert list(zip(chance.y, chance.x, strict=True)) == [("resid_post.0", "resid_post.0")]
    assert heat.colorbar.title.text == "linear CKA (0 to 1)"
    assert "95 % interval 0.050 to 0.150" in heat.text[0][0]
    assert figure.layout.yaxis.title.text == "layer of one (resid_post)"
    assert "<script" not in figure.to_json().replace("\\u003c", "<")


def test_values_below_zero_have_diverging_colours_and_a_pair_can_be_picked():
    figure = similarity_heatmap(pairs(low=-0.3), "cka", picked=("resid_post.1", "resid_post.0"))
    assert figure.data[0].zmin == -figure.data[0].zmax
    assert [shape.name for shape in figure.layout.shapes] == ["picked"]
    assert tuple(figure.data[-1].customdata[0]) == ("resid_post.0", "resid_post.0")


def test_the_best_partners_stand_beside_their_null():
    figure = similarity_best(pairs(tuple(TITLES)), names=(EVIL, "b"))
    assert len(figure.data) == 2 * len(TITLES)
    assert [a.text for a in figure.layout.annotations] == [t.partition(" (")[0] for t in TITLES.values()]
    assert [round(v, 6) for v in figure.data[0].y] == [0.3, 0.4, 0.5]
    assert [round(v, 6) for v in figure.data[0].error_y.array] == [0.05] * 3
    assert list(figure.data[1].y) == [0.15] * 3
    assert "<script" not in figure.to_json().replace("\\u003c", "<")


def test_a_measure_without_intervals_or_null_is_drawn():
    table = pairs(("svcca",)).assign(low=math.nan, high=math.nan, null=math.nan, null_high=math.nan, beyond=False)
    assert "interval" not in similarity_heatmap(table, "svcca").data[0].text[0][0]
    assert len(similarity_heatmap(table, "svcca").data) == 2
    assert len(similarity_best(table).data) == 2


def test_what_is_not_there_is_said():
    assert "No pair of layers has SVCCA" in similarity_heatmap(pairs(), "svcca").layout.annotations[0].text
    assert (
        "No pair of layers was compared" in similarity_best(pairs().assign(value=math.nan)).layout.annotations[0].text
    )
    assert similarity_heatmap(pd.DataFrame()).layout.annotations
