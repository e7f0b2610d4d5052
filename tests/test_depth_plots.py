"""Figures on depth: every line and cell is there with its interval, and no text of others is markup."""

from __future__ import annotations

import pandas as pd
import pytest

from workbench import depth_plots as plots
from workbench.errors import UserError

EVIL = "<script>alert(1)</script> \u202eabc"


def curves(depth: int = 3, names: tuple[str, ...] = ("write", "norm")) -> pd.DataFrame:
    lines = []
    for name in names:
        for layer in (["embeddings"] if name == "norm" else []) + [str(l) for l in range(depth)]:
            value = 1.0 if layer == "embeddings" else 0.5 + int(layer)
            lines.append({"curve": name, "layer": layer, "value": value, "low": value - 0.1, "high": value + 0.2})
    return pd.DataFrame(lines)


def effects(depth: int = 4, changed: tuple[int, ...] = (0, 1, 3)) -> pd.DataFrame:
    lines = []
    for layer in changed:
        for later in [*range(layer + 1, depth), "output"]:
            line = {"kind": "skip", "scope": "future", "layer": layer, "later": str(later)}
            for name, value in (("max", 0.1 * (layer + 1)), ("mean", 0.05)):
                line |= {name: value, f"{name}_low": value - 0.01, f"{name}_high": value + 0.01}
            lines.append(line)
    return pd.DataFrame(lines)


def grid() -> pd.DataFrame:
    lines = []
    for d in range(4):
        for s in range(2):
            error = {"error": 0.1 + abs(d - 2 * s) / 10, "error_low": 0.05, "error_high": 0.6}
            lines.append({"deep": d, "shallow": s, **error, "mean": 0.9, "best": s == d // 2})
    return pd.DataFrame(lines)


def test_curves_of_models_stand_side_by_side():
    figure = plots.depth_curves({"a": curves(), "b": curves()}, ("write", "norm"))
    assert [t.name for t in figure.data] == ["a", "a", "b", "b"]
    assert [t.showlegend for t in figure.data] == [True, False, True, False]
    assert [round(v, 9) for v in figure.data[0].error_y.array] == [0.2] * 3
    assert list(figure.data[1].x) == [0, 1 / 3, 2 / 3, 1]
    assert list(figure.layout.xaxis.ticktext) == ["emb.", "0", "1", "2"]
    assert "layer 1: 1.5" in figure.data[0].text[1]
    assert (figure.layout.yaxis.type, plots.depth_curves({"a": curves(names=("kl",))}, "kl").layout.yaxis.type) == (
        "log",
        None,
    )
    still = plots.depth_curves({"a": curves().assign(low=0.0)}, "write")
    assert still.layout.yaxis.type is None
    unlike = plots.depth_curves({"a": curves(), "b": curves(5)}, ("write",))
    assert unlike.layout.xaxis.title.text.startswith("relative depth")


def test_groups_leave_out_what_is_not_there():
    assert len(plots.depth_curves({"a": curves()}, "stream").data) == 1
    assert "None of these curves was measured" in plots.depth_curves({"a": curves()}, "lens").layout.annotations[0].text
    with pytest.raises(UserError, match="unknown curve 'speed'; allowed: write, "):
        plots.depth_curves({"a": curves()}, "speed")


def test_skipped_layers_stand_over_later_ones():
    figure = plots.skip_heatmap(effects())
    assert (list(figure.data[0].x), list(figure.data[0].y)) == (["1", "2", "3"], ["0", "1"])
    assert [list(row) for row in figure.data[0].z] == [[0.1] * 3, [None, 0.2, 0.2]]
    assert "layer 1 changed, layer 2's write moves by 0.2" in figure.data[0].text[1][1]
    assert figure.layout.yaxis.autorange == "reversed"
    assert "No later layer" in plots.skip_heatmap(effects(changed=(3,))).layout.annotations[0].text
    with pytest.raises(UserError, match="unknown statistic 'sum' over tokens; allowed: max, mean"):
        plots.skip_heatmap(effects(), "sum")


def test_outputs_are_drawn_with_their_intervals():
    figure = plots.skip_outputs({"model": effects(), "untrained": effects()}, "mean")
    assert [t.name for t in figure.data] == ["model", "untrained"]
    assert list(figure.data[0].x) == [0, 1, 3]
    assert [round(v, 9) for v in figure.data[0].error_y.array] == [0.01] * 3
    assert "mean over tokens" in figure.layout.yaxis.title.text
    both = plots.skip_outputs({"model": pd.concat([effects(), effects().assign(kind="erase")]), "untrained": effects()})
    assert [t.name for t in both.data] == ["model", "model", "untrained"]
    assert [t.showlegend for t in both.data] == [True, False, True]
    assert "state of one token erased, measured after" in [a.text for a in both.layout.annotations]
    assert "No effect was measured" in plots.skip_outputs({}).layout.annotations[0].text


def test_the_best_of_each_line_is_ringed():
    figure = plots.layer_grid(grid(), "deep", "shallow")
    assert figure.data[0].z[2][1] == 0.1
    assert list(zip(figure.data[1].y, figure.data[1].x, strict=True)) == [
        ("0", "0"),
        ("1", "0"),
        ("2", "1"),
        ("3", "1"),
    ]
    assert figure.layout.yaxis.title.text == "layer of deep"
    assert "No pair" in plots.layer_grid(grid().head(0)).layout.annotations[0].text


def test_names_of_others_are_text():
    lines = plots.depth_curves({EVIL: curves()}), plots.skip_outputs({EVIL: effects()})
    for figure in (*lines, plots.layer_grid(grid(), EVIL, EVIL), plots.skip_heatmap(effects(), title=EVIL)):
        assert "<script" not in figure.to_json().replace("\\u003c", "<")


def test_many_layers_have_few_ticks():
    assert len(plots.depth_curves({"a": curves(80)}, "write").layout.xaxis.tickvals) <= plots.TICKS + 1
    many = plots.skip_heatmap(effects(80, tuple(range(80))))
    assert len(many.layout.xaxis.tickvals) <= 2 * plots.TICKS
    assert many.data[0].texttemplate is None
    assert many.layout.height <= 900
