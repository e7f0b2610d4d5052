"""The page of a transport run: each part there and not there, under links and thresholds, and nothing of others' is markup."""

from __future__ import annotations

import pytest

from probes.transport_results import load_transport
from ui.panels import take_pair
from workbench.errors import UserError

from .conftest import as_markup, charts, run_snippets, words
from .transport_runs import EVIL, transport_run

PANELS = ["grid", "dimensions", "efficiency", "size", "verdicts", "features", "causal", "shortcut"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("work")
    transport_run(made)
    return made


def test_a_finished_run_shows_every_panel_and_the_code_of_each_makes_it(open_page, folder):
    page = open_page("transport", folder)
    assert not page.exception
    assert run_snippets(page) == len(PANELS)
    assert [page.selectbox(key=key).value for key in ("source", "target", "metric")] == [
        "resid_post.0",
        "resid_post.2",
        "uniform",
    ]
    heat = charts(page)[0]
    assert heat["layout"]["shapes"][0]["name"] == "picked"
    assert page.dataframe[0].value["arm"].iloc[0] == "ridge"


def test_a_link_opens_the_same_picks(open_page, folder):
    page = open_page("transport", folder, source="resid_post.1", metric="whitened", bos="true", predicted="0.9")
    assert not page.exception
    assert page.selectbox(key="source").value == "resid_post.1"
    assert page.selectbox(key="target").value == "resid_post.2"
    assert page.toggle(key="bos").value
    assert "grid_heatmap(run.grid, 'whitened', bos=True, picked=('resid_post.1', 'resid_post.2'))" in words(page)


@pytest.mark.parametrize("query", [{"source": "resid_post.9"}, {"target": "../etc"}, {"metric": "<b>"}])
def test_a_pick_in_a_link_that_is_not_there_is_refused_in_so_many_words(open_page, folder, query):
    page = open_page("transport", folder, **query)
    assert not page.exception
    (key, value), *_ = query.items()
    assert f"the link asks for {key} {value!r}, which is not there; it was refused" in words(page)
    assert len(page.get("plotly_chart")) == len(PANELS)


def test_a_target_that_the_source_leaves_no_room_for_gives_way(open_page, folder):
    page = open_page("transport", folder, target="resid_post.1")
    page.selectbox(key="source").set_value("resid_post.1").run()
    assert page.selectbox(key="target").value == "resid_post.2"
    assert "refused" not in words(page)


def test_parts_that_are_not_of_the_pair_name_the_command_that_adds_them(open_page, folder):
    page = open_page("transport", folder, target="resid_post.1")
    assert not page.exception
    said = words(page)
    plain = f"workbench transport m --prompts 'my prompts.txt' --out {folder}/transport --folds 2 --shards 4"
    assert f"{plain}\n" in said
    assert f"{plain} --dictionary resid_post.1=FOLDER" in said
    assert f"{plain} --causal all" in said
    assert run_snippets(page) == 3  # the grid, R2 by dimension, the shortcuts of the run


def test_a_run_of_the_grid_alone_says_how_to_get_the_rest(open_page, tmp_path):
    transport_run(tmp_path, grid_only=True, note="no efficiency of resid_post.0 to resid_post.2: **few** rows")
    page = open_page("transport", tmp_path)
    assert not page.exception
    assert run_snippets(page) == 2
    assert "--grid-only" not in words(page)
    assert "**few** rows" in [one.value.split(": ")[-1] for one in page.text]


def test_thresholds_decide_the_verdicts_and_are_told_where_they_contradict(open_page, folder):
    page = open_page("transport", folder)
    table = page.dataframe[1].value
    strict = open_page("transport", folder, predicted="1.0", carried="0.9")
    count = {"transported": 0, "rotated": 0}
    for verdict in count:
        assert (table["verdict"] == verdict).sum() >= (strict.dataframe[1].value["verdict"] == verdict).sum()
    assert set(table["verdict"]) >= {"transported", "rotated", "synthesised", "rare"} - {"transported"}
    assert "unpredicted=0.9 must not exceed predicted=0.5" in words(open_page("transport", folder, unpredicted="0.9"))


def test_verdicts_can_be_picked(open_page, folder):
    page = open_page("transport", folder, verdict=["rare"])
    assert set(page.dataframe[1].value["verdict"]) == {"rare"}
    assert "of 40 features" in words(page).replace("\\", "")


def test_tokens_that_mean_harm_are_text(open_page, folder):
    page = open_page("transport", folder)
    names = "\n".join(page.dataframe[1].value["fires on"])
    assert EVIL[0] in names
    assert "\u202e" not in names
    assert "(10,000 characters)" in names
    assert not as_markup(page, *EVIL[:3], "<script>", "y" * 130)
    assert f"12 prompts of {EVIL[0]}, 345 predicted tokens" in [one.value for one in page.text]


def test_damaged_runs_are_one_line(open_page, tmp_path):
    said = {
        "causal.parquet": "causal.parquet cannot be read; run the transport again",
        "metrics.json": "its metrics.json cannot be read",
        "transport.toml": "transport: damaged; transport.toml cannot be read",
        "grid/grid.parquet": "its grid.parquet is missing or damaged; run the transport again",
    }
    for i, (file, line) in enumerate(said.items()):
        (transport_run(tmp_path / str(i)) / file).write_text("=")
        page = open_page("transport", tmp_path / str(i))
        assert not page.exception
        assert line in words(page)


def test_a_run_that_was_stopped_is_told(open_page, tmp_path):
    (transport_run(tmp_path) / "metrics.json").unlink()
    assert "transport: stopped; run the same job again to go on" in words(open_page("transport", tmp_path))


def test_results_say_what_they_lack(tmp_path):
    run = load_transport(transport_run(tmp_path))
    assert run.of_pair("causal", 0, 1) is None
    assert run.size_of(0, 1) is None
    assert list(run.of_pair("efficiency", 0, 2)["rank"]) == list(range(1, 9))
    assert run.size_of(0, 2)["wachter_count"] == 7
    assert [len(part) for part in run.shortcuts()] == [4, 3]
    with pytest.raises(UserError, match="has no grid of a transport yet"):
        load_transport(tmp_path)


def test_a_clicked_cell_is_the_pick_of_its_selectboxes(monkeypatch):
    state = {"grid": {"selection": {"points": [{"customdata": ["resid_post.0", "resid_post.1"]}]}}, "other": {}}
    monkeypatch.setattr("ui.panels.st.session_state", state)
    take_pair("grid", ("source", "target"))
    assert (state["source"], state["target"]) == ("resid_post.0", "resid_post.1")
    take_pair("other", ("source", "target"))
    take_pair("nothing", ("source", "target"))
    assert state["source"] == "resid_post.0"
