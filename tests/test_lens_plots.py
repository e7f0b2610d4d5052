"""Figures of lenses show the numbers of their tables, as text and never as markup."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from workbench import lens_plots as plots
from workbench.errors import UserError

EVIL = "<script>alert(1)</script>"


def table(tokens: int = 3, *, token: str = " a", shift: float = 0.0) -> pd.DataFrame:
    lines = []
    for i, layer in enumerate(("embeddings", "0", "1")):
        site = "resid_pre.0" if i == 0 else f"resid_post.{layer}"
        for t in range(tokens):
            lines.append({"site": site, "layer": layer, "position": t, "token": token, "entropy": i + t / 10 + shift,
                          "kl": 2.0 - i,
                          "answer": token, "answer_probability": 0.1 * i, "answer_rank": 10.0 ** (2 - i), "top": token,
                          "top_probability": 0.5})  # fmt: skip
    return pd.DataFrame(lines)


def test_the_heatmap_has_layers_upwards_tokens_across_and_points_to_click():
    figure = plots.lens_heatmap(table(), "entropy", title="plain")
    heat, points = figure.data
    assert [list(line) for line in heat.z] == [[0, 0.1, 0.2], [1, 1.1, 1.2], [2, 2.1, 2.2]]
    assert list(heat.y) == ["embeddings", "0", "1"]
    assert heat.text[0][0] == "·a"
    assert [list(one) for one in points.customdata[:4]] == [["resid_pre.0", 0], ["resid_pre.0", 1], ["resid_pre.0", 2],
                                                           ["resid_post.0", 0]]  # fmt: skip
    assert "entropy 1.100, KL 1.000 nats" in points.text[4]
    assert "nats" in heat.colorbar.title.text
    assert figure.layout.title.text == "plain"


def test_ranks_are_shaded_by_powers_of_ten_and_tables_may_share_their_colours():
    heat = plots.lens_heatmap(table(), "answer_rank").data[0]
    assert [line[0] for line in heat.z] == [2, 1, 0]
    assert list(heat.colorbar.ticktext) == ["1", "10", "100"]
    assert plots.shared_range([table(), table(shift=3)], "entropy") == (0, pytest.approx(5.2))
    assert plots.shared_range([table()], "answer_rank") == (0, 2)
    assert plots.shared_range([table()], "top_probability") == (0, 1)
    shared = plots.lens_heatmap(table(), "answer_probability", low=0.0, high=0.5).data[0]
    assert (shared.zmin, shared.zmax) == (0, 0.5)
    none = table()
    none.loc[0, "answer_rank"] = math.nan
    assert plots.lens_heatmap(none, "answer_rank").data[0].z[0][0] is None


def test_of_a_long_prompt_the_last_tokens_are_drawn_and_the_figure_says_so():
    figure = plots.lens_heatmap(table(plots.MOST_TOKENS + 5))
    assert min(figure.data[0].x) == 5
    assert figure.layout.title.text == f"the last {plots.MOST_TOKENS} of {plots.MOST_TOKENS + 5} tokens"
    assert figure.data[0].texttemplate is None, "hundreds of tokens across are too narrow for words"
    assert len(figure.layout.xaxis.tickvals) <= plots.NAMED_TOKENS


def test_the_difference_is_after_less_before():
    heat = plots.lens_difference(table(), table(shift=0.5), "entropy").data[0]
    assert [v for line in heat.z for v in line] == pytest.approx([0.5] * 9)
    assert (heat.zmin, heat.zmax) == (pytest.approx(-0.5), pytest.approx(0.5))
    with pytest.raises(UserError, match="give tables of one prompt and one model"):
        plots.lens_difference(table(2), table(3))


def test_curves_are_means_and_of_ranks_medians_or_one_tokens_values():
    figure = plots.lens_curves({"plain": table(), "pasted": table(shift=1)}, ("entropy", "answer_rank"))
    lines = [t for t in figure.data if t.mode == "lines+markers"]
    assert [t.name for t in lines] == ["plain", "plain", "pasted", "pasted"]
    assert list(lines[0].y) == pytest.approx([0.1, 1.1, 2.1])
    assert list(lines[1].y) == [100, 10, 1]
    assert figure.layout.yaxis2.type == "log"
    one = plots.lens_curves({"plain": table()}, ("entropy",), position=2)
    assert [list(t.y) for t in one.data] == [[0.2, 1.2, 2.2]]


def test_scores_have_their_intervals():
    lines = [{"lens": lens, "layer": "0", "kl": 1.0, "kl_low": 0.9, "kl_high": 1.2} for lens in ("logit", "tuned")]
    figure = plots.lens_scores_curves(pd.DataFrame(lines))
    assert [t.name for t in figure.data] == ["logit", "tuned"]
    assert figure.data[0].error_y.array[0] == pytest.approx(0.2)
    assert "nats per token" in figure.layout.yaxis.title.text


def test_a_cells_tokens_are_told_apart_by_their_number():
    tops = pd.DataFrame({"token": ["a", "a"], "id": [7, 9], "probability": [0.6, 0.2]})
    figure = plots.token_bars({"plain": tops, "pasted": tops.iloc[:1]}, "cell")
    assert list(figure.data[0].y) == ["7", "9"]
    assert list(figure.data[1].x) == [0.6, None]
    assert list(figure.layout.yaxis.ticktext) == ["a", "a"]


@pytest.mark.parametrize("token", [EVIL, "\u202eolleh", "x" * 10_000, "<b>bold</b>"])
def test_text_of_others_is_escaped_and_cut(token):
    tops = pd.DataFrame({"token": [token], "id": [1], "probability": [0.5]})
    frames = {token: table(token=token)}
    figures = [plots.lens_heatmap(table(token=token), title=token[:50]), plots.lens_difference(*[table(token=token)] * 2),
               plots.lens_curves(frames), plots.token_bars({token: tops}, token)]  # fmt: skip
    for figure in figures:
        text = figure.to_json()
        for word in ("<script", "<b>bold", "\u202e", "\\u202e"):
            assert word not in text
    assert len(figures[0].to_json()) < 60_000


def test_what_is_not_there_is_told():
    empty = table().iloc[:0]
    for figure in (plots.lens_heatmap(empty), plots.lens_difference(empty, empty), plots.lens_curves({"x": empty}),
                   plots.lens_scores_curves(empty), plots.token_bars({})):  # fmt: skip
        assert figure.layout.annotations[0].text
        assert not figure.data
    with pytest.raises(UserError, match="unknown value 'x' of a lens table; allowed: entropy"):
        plots.lens_heatmap(table(), "x")
