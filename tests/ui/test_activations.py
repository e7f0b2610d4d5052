"""The page of activations: every view and state, its picks in the address, and the text of others as text."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from streamlit.testing.v1 import AppTest

from probes import projection
from probes.probe import Probe
from tests.store.made import made_store, noise
from ui import held
from ui.pages.activations import tokens
from ui.pages.activations.tokens import selected, spread
from workbench.sites import Site
from workbench.store import Store

from .conftest import fine, plain_words
from .word_stores import TEXTS, N, word_store

Opener = Callable[..., AppTest]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("work")
    word_store(made / "a")
    word_store(made / "b", 1, "second-model", "other")
    return made


@pytest.fixture
def drawn(monkeypatch) -> list[dict[str, Any]]:
    """The panels that a page drew; `selection` of the list is what is selected in the next."""
    import ui.pages.activations.overview
    import ui.pages.activations.pairs
    import ui.pages.activations.projection

    found: Any = type("Panels", (list,), {"selection": []})()

    def panel(figure, **options):
        found.append({"figure": figure, **options})
        return (
            {"selection": {"points": [{"customdata": i} for i in found.selection]}} if options.get("select") else None
        )

    for module in (ui.pages.activations.overview, ui.pages.activations.pairs, ui.pages.activations.projection):
        monkeypatch.setattr(module, "panel", panel)
    return found


def test_a_damaged_store_is_one_line(open_page: Opener, folder, tmp_path):
    shutil.copytree(folder / "a", tmp_path / "a")
    (tmp_path / "a" / "shards" / "00000.safetensors").write_bytes(b"short")
    test = open_page("activations", tmp_path)
    assert not test.exception
    assert "This could not be done" in plain_words(test)
    assert "00000.safetensors has 5 bytes" in plain_words(test)
    assert "workbench stores verify" in plain_words(test)


def test_the_first_view_is_the_store_at_a_glance(open_page: Opener, folder):
    test = fine(open_page("activations", folder))
    assert [s.value for s in test.subheader] == [
        "Norms by layer", "Norms by position", "Outlier dimensions", "Massive activations"]  # fmt: skip
    facts = dict(test.dataframe[0].value.to_numpy().tolist())
    assert facts["model"] == "first-model (f, 2 layers)"
    assert facts["rows"] == f"{N} (tokens: all)"
    assert "none in the sample" in plain_words(test)


@pytest.mark.parametrize("view", ["overview", "projection", "two models"])
def test_every_snippet_gives_the_figure_that_the_page_drew(open_page: Opener, folder, drawn, view):
    fine(open_page("activations", folder, view=view))
    assert len(drawn) == {"overview": 3, "projection": 1, "two models": 1}[view]
    assert len({one["key"] for one in drawn}) == len(drawn)
    for one in drawn:
        names: dict[str, Any] = {}
        exec(compile(one["code"], one["key"], "exec"), names)
        assert names["figure"].to_json() == one["figure"].to_json()
        assert len(one["data"]()) > 0


def test_a_link_opens_the_same_picks(open_page: Opener, folder, drawn):
    asked = {"view": "projection", "store": "b", "site": "resid_post.0", "points": "2000", "by": "label",
             "colour": "meta.topic", "method": "pca", "first": "true"}  # fmt: skip
    test = fine(open_page("activations", folder, **asked))
    for key, value in asked.items():
        if key != "first":
            assert test.selectbox(key=key).value == value
    assert test.checkbox(key="first").value
    assert drawn[0]["figure"].layout.legend.title.text == "topic"
    assert "'resid_post.0'" in drawn[0]["code"]
    assert "by='label', first=None" in drawn[0]["code"]


@pytest.mark.parametrize(("key", "value"), [("site", "mlp_out.9"), ("colour", "nothing"), ("view", "<b>x</b>"),
                                            ("store", "../other"), ("points", "10")])  # fmt: skip
def test_what_a_link_asks_for_and_is_not_there_is_refused(open_page: Opener, folder, key, value):
    test = open_page("activations", folder, **{"view": "projection", key: value})
    assert not test.exception
    assert f"the link asks for {key} {value!r}" in plain_words(test)
    assert all(value not in str(one.value) for one in test.markdown)


def test_a_selection_is_shown_as_tokens_in_their_prompts(open_page: Opener, folder, drawn):
    drawn.selection = [3, 200, 99999, 17]
    test = fine(open_page("activations", folder, view="projection"))
    table = test.dataframe[0].value
    assert table["row"].tolist() == [3, 17, 200], "a row that was not drawn is none"
    whole = Store.open(folder / "a").rows()
    assert table["token"].tolist() == whole["text"].iloc[[3, 17, 200]].tolist()
    assert "3 of 3 selected rows" in plain_words(test)
    line = table.iloc[0]
    assert f"{line['before']}{line['token']}{line['after']}" in " ".join(TEXTS)


def test_a_row_has_neighbours_over_the_whole_store(open_page: Opener, folder, drawn):
    test = fine(
        open_page("activations", folder, view="projection", points="2000", row="77", k="5", site="resid_post.1")
    )
    table = test.dataframe[1].value
    x = Store.open(folder / "a").read(1).double()
    near = torch.nn.functional.cosine_similarity(x, x[77][None]).argsort(descending=True)[:6]
    assert table["row"].tolist() == near.tolist()
    assert f"the nearest of {N - 1} rows at resid_post.1" in plain_words(test)
    test.selectbox(key="metric").select("euclidean").run()
    test.checkbox(key="others").check().run()
    fine(test)
    assert "Euclidean distance" in plain_words(test)
    assert "other_prompts=True" in test.code[-1].value
    names: dict[str, Any] = {}
    exec(test.code[-1].value, names)
    assert names["table"]["row"].tolist() == test.dataframe[1].value["row"].tolist()[1:]


def test_without_umap_one_line_says_so(open_page: Opener, folder, monkeypatch):
    import ui.pages.activations.projection

    monkeypatch.setattr(ui.pages.activations.projection, "has_umap", lambda: False)
    test = fine(open_page("activations", folder, view="projection", method="umap"))
    assert "UMAP needs the package umap-learn, which is not installed." in plain_words(test)
    assert "pip install umap-learn" in plain_words(test)


def test_two_models_are_aligned_by_character(open_page: Opener, folder, drawn):
    drawn.selection = [4, 10**6]
    test = fine(open_page("activations", folder, view="two models", store="a", second="b", site2="resid_post.0"))
    figure = drawn[0]["figure"]
    assert "first-model" in figure.layout.annotations[0].text
    assert "second-model" in figure.layout.annotations[1].text
    table = test.dataframe[0].value
    assert table["token"].tolist() == table["token of the second"].tolist()
    assert len(table) == 1
    assert "1 of 1 selected pairs" in plain_words(test)


def test_of_many_pairs_some_are_drawn(open_page: Opener, folder, drawn, monkeypatch):
    import ui.pages.activations.pairs as pairs

    monkeypatch.setattr(pairs, "MOST_POINTS", 100)
    held.release()
    fine(open_page("activations", folder, view="two models", store="a", second="b"))
    assert f"90 of {N} pairs of tokens" in drawn[0]["remark"]
    names: dict[str, Any] = {}
    exec(drawn[0]["code"], names)
    assert len(names["rows_a"]) == len(names["rows_b"]) == 90 == sum(len(t.x) for t in drawn[0]["figure"].data) // 2
    assert names["figure"].to_json() == drawn[0]["figure"].to_json()
    held.release()


def test_a_store_alone_says_how_to_get_a_second(open_page: Opener, folder, tmp_path):
    shutil.copytree(folder / "a", tmp_path / "a")
    made_store(tmp_path / "c", {Site(0): noise(4, 3)}, ["other words", "two more"])
    test = fine(open_page("activations", tmp_path, view="two models", store="a"))
    assert "No other store of this folder holds the same prompts" in plain_words(test)
    assert "--tokens all" in plain_words(test)


def test_points_take_the_colour_of_a_probe_that_is_trained_here(open_page: Opener, folder, drawn):
    drawn.selection = [3, 17]
    test = fine(
        open_page("activations", folder, view="projection", colour="a probe's score", probe="trained here on label")
    )
    assert test.selectbox(key="class").options == ["odd", "even"]
    assert drawn[0]["figure"].layout.coloraxis.colorbar.title.text == "label: odd (log-odds, nats)"
    assert "Coloured by a logistic probe of label at resid_post.1; accuracy" in drawn[0]["remark"]
    assert list(test.dataframe[0].value.columns[:2]) == ["score", "row"]
    test.selectbox(key="class").set_value("even").run()
    names: dict[str, Any] = {}
    exec(drawn[-1]["code"], names)
    assert names["figure"].to_json() == drawn[-1]["figure"].to_json()
    odd, even = (one["data"]() for one in drawn)
    assert (odd["label: odd (log-odds, nats)"] == -even["label: even (log-odds, nats)"]).all()


def test_points_take_the_colour_of_a_saved_probe_of_the_site(open_page: Opener, folder, drawn, tmp_path):
    shutil.copytree(folder / "a", tmp_path / "a")
    store = Store.open(tmp_path / "a")
    base = dict(store.fingerprint)
    for layer in range(2):
        one = Probe(torch.ones(12, 1), torch.zeros(1), ("no", HOSTILE[0]), Site(layer), "label", base=base)
        one.save(tmp_path / "run" / "probes" / "all" / f"resid_post.{layer}")
    Probe(torch.ones(12, 1), torch.zeros(1), ("no", "yes"), Site(1), base={"tokenizer": "t", "name": "x"}).save(
        tmp_path / "p"
    )
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "probe.json").write_text("{")
    asked = {"view": "projection", "colour": "a probe's score", "probe": "run/probes/all (label)"}
    test = fine(open_page("activations", tmp_path, **asked))
    assert test.selectbox(key="probe").value == ("saved", "run/probes/all")
    assert "broken" not in " ".join(test.selectbox(key="probe").options)
    rows = drawn[0]["data"]()
    want = Store.open(tmp_path / "a").read(1, torch.tensor(rows["row"].to_numpy())).sum(1)
    torch.testing.assert_close(torch.tensor(rows.iloc[:, -1].to_numpy()), want)
    assert "&lt;script&gt;" in drawn[0]["figure"].layout.coloraxis.colorbar.title.text
    test.selectbox(key="site").set_value("resid_post.0").run()
    assert test.selectbox(key="probe").value == ("saved", "run/probes/all"), "another site takes that of the same run"
    assert "resid_post.0'" in drawn[-1]["code"]
    for one in (drawn[0], drawn[-1]):
        names: dict[str, Any] = {}
        exec(one["code"], names)
        assert names["figure"].to_json() == one["figure"].to_json()
    (tmp_path / "run" / "probes" / "all" / "resid_post.0" / "probe.safetensors").write_bytes(b"no")
    test.run()
    assert "probe.safetensors" in plain_words(test)


HOSTILE = ("<script>alert(1)</script>", "[x](javascript:1)", "**b**", "a\u202eb\u2066c", "y" * 10_000)


@pytest.mark.parametrize("view", ["overview", "projection", "two models"])
def test_text_of_others_is_shown_as_text(open_page: Opener, tmp_path, drawn, view):
    texts = [f"start {token} end" for token in HOSTILE] * 3
    x = noise(3 * len(texts), 6)
    x[4, 2] = 1e6  # so that a hostile token is massive too
    for name in ("a", "<b>x</b>"):
        made_store(tmp_path / name, {Site(0): x}, texts, labels=list(HOSTILE) * 3, model="<i>m</i>",
                   metas=[{"<u>k</u>": token} for token in HOSTILE] * 3)  # fmt: skip
    test = fine(open_page("activations", tmp_path, view=view, colour="label", row="1"))
    rendered = [
        str(one.value) for kind in ("markdown", "caption", "title", "subheader", "header") for one in test.get(kind)
    ]
    for one in rendered:
        for text in (*HOSTILE, "<i>", "<b>", "<u>", "\u202e"):
            assert text not in one
    for one in drawn:
        raw = one["figure"].to_json().replace("\\u003c", "<")
        for text in ("<script", "<i>", "<b>", "<u>", "\u202e", "\\u202e", "y" * 100):
            assert text not in raw
    for one in test.dataframe:
        cells = " ".join(map(str, one.value.to_numpy().ravel()))
        assert "\u202e" not in cells
        assert "y" * 500 not in cells


def test_rows_that_are_all_first_are_said_to_be(open_page: Opener, tmp_path):
    made_store(tmp_path / "s", {Site(0): noise(5, 4)}, ["one", "two", "three", "four", "five"])
    test = fine(open_page("activations", tmp_path, view="projection"))
    assert "No two rows are left to draw" in plain_words(test)
    assert fine(open_page("activations", tmp_path)).subheader


def test_a_large_selection_is_shown_in_part(open_page: Opener, folder, drawn):
    drawn.selection = list(range(N))
    test = fine(open_page("activations", folder, view="projection", first="true"))
    assert len(test.dataframe[0].value) == tokens.MOST
    assert f"100 of {N} selected rows" in plain_words(test)
    assert spread([1, 2]) == [1, 2]


def test_points_that_are_selected_are_told_by_their_customdata():
    points = [{"customdata": 4}, {"customdata": [2]}, {"customdata": 4}, {"customdata": "<b>"}, {}, {"customdata": []}]
    assert selected({"selection": {"points": points}}) == [2, 4]
    assert selected(None) == selected({}) == []


def test_nothing_is_read_whole(open_page: Opener, folder, monkeypatch):
    read = Store.read

    def counted(self, site, rows=None, **more):
        assert rows is not None, "a site was read whole"
        return read(self, site, rows, **more)

    monkeypatch.setattr(Store, "read", counted)
    monkeypatch.setattr(projection, "FITTED", 100)
    for view in ("overview", "projection", "two models"):
        fine(open_page("activations", folder, view=view))
