"""Figures of what a paste does: every number is that of the result, and text stays text."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from workbench import paste_plots
from workbench.adapters.adapter import vector
from workbench.evaluate.dose import PromptDose, prompt_dose
from workbench.evaluate.token_changes import TokenChanges, token_changes
from workbench.paste_plots import kl_strip, prompt_dose_curve, shown_token, top_bars
from workbench.plots import on_dark
from workbench.sites import Site

from .conftest import make_model

EVIL = ("<script>alert(1)</script>", "[x](javascript:1)", "**b**", "a\u202eb\u2066c", "x" * 10_000, "\n", " ", "")


@pytest.fixture(scope="module")
def changes() -> TokenChanges:
    model = make_model("llama")
    adapter = vector(Site(1), 3 * torch.randn(model.width, generator=torch.Generator().manual_seed(0)))
    return token_changes(model, (" ".join(f"w{i}" for i in range(20)), "w50 w51"), adapter)


def test_a_strip_has_a_cell_for_each_token_with_its_kl(changes):
    figure = kl_strip(changes, columns=8)
    bars = figure.data[0]
    assert list(bars.customdata) == list(range(len(changes)))
    assert list(bars.marker.color) == changes.kl.tolist()
    assert bars.text[changes.prompt_length] == "w50"
    # in reading order, eight to a row
    assert [(x, round(-(b + 0.43))) for x, b in zip(bars.x, bars.base, strict=True)][:9][-1] == (0, 1)
    assert "nats" in bars.marker.colorbar.title.text
    assert len(figure.layout.shapes) == 1  # the last prompt token is framed
    frame = figure.layout.shapes[0]
    assert (frame.x0 + frame.x1) / 2 == (changes.prompt_length - 1) % 8


def test_of_a_long_text_the_end_is_drawn(changes):
    figure = kl_strip(changes, most=5)
    n = len(changes)
    assert list(figure.data[0].customdata) == list(range(n - 5, n))
    assert paste_plots.drawn_positions(changes, 5) == range(n - 5, n)


def test_where_nothing_changed_the_strip_says_so(changes):
    still = dataclasses.replace(changes, kl=torch.zeros_like(changes.kl))
    assert "exactly 0" in kl_strip(still).layout.annotations[0].text
    assert not kl_strip(changes).layout.annotations


def test_bars_are_the_table_of_the_position(changes):
    at = changes.largest
    figure, table = top_bars(changes, at), changes.at(at)
    assert list(figure.data[0].x) == table["before"].tolist()
    assert list(figure.data[1].x) == table["after"].tolist()
    assert list(figure.layout.yaxis.ticktext) == table["token"].tolist()
    assert "probability" in figure.layout.xaxis.title.text


def test_a_dose_is_drawn_with_and_without_log_odds():
    model = make_model("llama")
    adapter = vector(Site(1), torch.ones(model.width))
    dose = prompt_dose(model, "w1 w2", adapter, (1.0, 2.0), openers=("w3",))
    with_odds, alone = prompt_dose_curve(dose), prompt_dose_curve(dataclasses.replace(dose, log_odds=None))
    assert [list(t.y) for t in with_odds.data] == [dose.log_odds.tolist(), dose.kl.tolist()]
    assert [list(t.y) for t in alone.data] == [dose.kl.tolist()]
    for figure in (with_odds, alone):
        titles = [axis.title.text for axis in (*figure.select_xaxes(), *figure.select_yaxes()) if axis.title.text]
        assert any("strength" in t for t in titles)
        assert all("nats" in axis.title.text for axis in figure.select_yaxes())
    single = PromptDose((0.0,), torch.zeros(1), None, ("a",), torch.ones(1))
    assert "give several" in prompt_dose_curve(single).layout.annotations[0].text


@pytest.mark.parametrize("evil", EVIL)
def test_tokens_are_text_in_every_figure(changes, evil):
    n = len(changes)
    names = dict.fromkeys(changes.names, evil)
    made = dataclasses.replace(changes, tokens=(evil,) * n, names=names)
    dose = PromptDose((0.0, 1.0), torch.zeros(2), None, (evil, evil), torch.ones(2))
    for figure in (kl_strip(made), top_bars(made, 0), prompt_dose_curve(dose)):
        for drawn in (figure, on_dark(figure)):
            text = drawn.to_json()
            assert "<script" not in text
            assert "\\u202e" not in text
            assert "\u202e" not in text
            assert "x" * 100 not in text


def test_labels_show_what_cannot_be_seen():
    assert [shown_token(t) for t in ("a b", "a\u202e", "", "\u00a0", "<")] == [
        "a·b",
        "a⟨U+202E⟩",
        "∅",
        "⟨U+00A0⟩",
        "&lt;",
    ]
