"""The page of converters: pairs of layers, matchings and adapters that are there and not there, under links."""

from __future__ import annotations

import json
import shutil

import pytest

from workbench.errors import UserError
from workbench.run_fits import fits_of_run, forecast_matching
from workbench.sites import Site

from ..metrics_example import EVIL, metrics
from .conftest import as_markup, charts, run_snippets, words
from .converter_runs import D_DONOR, LAYERS, converter_run

PANELS = ["layers", "spectrum", "against", "capture", "forecast"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("work")
    converter_run(made)
    return made


def test_a_finished_run_shows_every_panel_of_the_pair_that_was_pasted(open_page, folder):
    page = open_page("converters", folder)
    assert not page.exception
    assert [page.selectbox(key=key).value for key in ("donor", "recipient", "behaviour", "converter")] == [
        "resid_post.2", "resid_post.1", "reasoning", "ridge:0.1",
    ]  # fmt: skip
    assert run_snippets(page) == len(PANELS)
    assert (charts(page)[0]["data"][1]["x"], charts(page)[0]["data"][1]["y"]) == (
        ["1"],
        ["2"],
    )  # the forecast's pair, ringed
    said = words(page).replace("\\", "")
    assert "60 held-out rows x 12 dimensions" in said


@pytest.mark.parametrize("score", ["r2", "cka", "svcca"])
def test_layers_that_answer_to_one_another_are_matched(open_page, folder, score):
    page = open_page("converters", folder, score=score, match=score)
    assert not page.exception
    assert page.selectbox(key="score").value == score
    heat, path = charts(page)[0]["data"][:2]
    assert [row.index(max(row)) for row in heat["z"]] == list(range(LAYERS))
    assert path["x"] == path["y"] == [str(layer) for layer in range(LAYERS)]
    assert run_snippets(page) == len(PANELS)


@pytest.mark.parametrize("match", ["nearest", "floor", "ends", "none"])
def test_matchings_by_depth_and_none(open_page, folder, match):
    page = open_page("converters", folder, match=match)
    assert not page.exception
    assert page.selectbox(key="match").value == match
    assert len(charts(page)[0]["data"]) == (2 if match == "none" else 3)
    assert run_snippets(page) == len(PANELS)


def test_a_link_opens_the_same_pair_and_converter(open_page, folder):
    page = open_page("converters", folder, donor="resid_post.1", recipient="resid_post.1", converter="rrr:16",
                     way="to_recipient")  # fmt: skip
    assert not page.exception
    assert page.selectbox(key="converter").value == "rrr:16"
    assert page.dataframe[0].value["r2_weighted"].min() > 0.9
    said = words(page)
    assert "Site.parse('resid_post.1'), 'rrr:16')" in said
    assert "made.to_recipient, donor, recipient" in said
    assert "edits resid_post.2, not resid_post.1" in said  # the adapter is of another layer
    assert run_snippets(page) == len(PANELS) - 1


@pytest.mark.parametrize(
    "query", [{"donor": "resid_post.9"}, {"converter": "ridge:-1"}, {"match": "<i>"}, {"run": "../.."}]
)
def test_a_pick_in_a_link_that_is_not_there_is_refused(open_page, folder, query):
    page = open_page("converters", folder, **query)
    assert not page.exception
    ((key, value),) = query.items()
    assert f"the link asks for {key} {value!r}, which is not" in words(page)
    assert len(page.get("plotly_chart")) == len(PANELS)


def test_names_that_mean_harm_are_text(open_page, folder):
    page = open_page("converters", folder, behaviour=f"style {EVIL}")
    assert not page.exception
    assert page.selectbox(key="behaviour").value == f"style {EVIL}"
    assert not as_markup(page, EVIL, "<script>")
    assert "The run has no adapter of the donor for a behaviour" in words(page)


def test_work_of_minutes_is_done_when_it_is_asked_for(open_page, folder, monkeypatch):
    monkeypatch.setattr("ui.pages.converters.parts.WAITED", 0.0)
    page = open_page("converters", folder)
    assert not page.exception
    assert run_snippets(page) == 1  # what was forecast is read, not fitted
    assert "takes about 1 minutes of one core" in words(page).replace("\\", "")
    for key in ("score-all", "fit"):
        page.button(key=key).click().run()
    assert run_snippets(page) == len(PANELS)


def test_a_run_without_its_profiles_says_so(open_page, tmp_path):
    converter_run(tmp_path, profiles=False)
    page = open_page("converters", tmp_path)
    assert not page.exception
    assert "demo has no profile of the donor; the job makes it again:" in words(page)
    assert f"workbench run {tmp_path}/demo/job.toml" in words(page)


def test_a_profile_that_is_a_link_out_of_the_folder_is_not_followed(open_page, tmp_path):
    inside, outside = converter_run(tmp_path / "in"), converter_run(tmp_path / "out")
    shutil.rmtree(inside / "profiles" / "donor")
    (inside / "profiles" / "donor").symlink_to(outside / "profiles" / "donor")
    page = open_page("converters", tmp_path / "in")
    assert not page.exception
    assert "has no profile of the donor" in words(page)
    assert not page.get("plotly_chart")


def test_a_damaged_store_is_one_line(open_page, tmp_path):
    (converter_run(tmp_path) / "profiles" / "donor" / "manifest.json").write_text("{")
    page = open_page("converters", tmp_path)
    assert not page.exception
    assert "manifest.json" in words(page)
    assert not page.get("plotly_chart")


def test_a_damaged_adapter_costs_its_panel_alone(open_page, tmp_path):
    (converter_run(tmp_path) / "adapters" / "reasoning" / "donor" / "adapter.safetensors").write_bytes(b"no")
    page = open_page("converters", tmp_path)
    assert not page.exception
    assert "adapter.safetensors" in words(page)
    assert run_snippets(page) == len(PANELS) - 1


def test_metrics_without_a_forecast_leave_the_rest(open_page, tmp_path):
    (converter_run(tmp_path) / "metrics.json").write_text(json.dumps(metrics() | {"behaviours": {}}))
    page = open_page("converters", tmp_path)
    assert not page.exception
    assert page.selectbox(key="donor").value == "resid_post.0"
    assert "no candidates that were forecast" in words(page)
    assert "forecast" not in page.selectbox(key="match").options
    assert run_snippets(page) == 3


def test_the_fits_of_a_run_are_those_of_its_job(folder, tmp_path):
    fits = fits_of_run(folder / "demo")
    assert (len(fits.rows), len(fits.held), fits.pairing) == (240, 60, "last")
    made = fits.converter(Site(1), Site(1))
    assert made.to_donor.d_out == D_DONOR
    assert made.quality_to_donor is not None
    assert made.quality_to_donor.r2_weighted > 0.95
    with pytest.raises(UserError, match="has no profile of the donor; run its job"):
        fits_of_run(converter_run(tmp_path, profiles=False))


def test_the_matching_of_a_forecast_is_what_it_chose():
    assert forecast_matching(metrics(), "reasoning") == {2: 1}
    assert forecast_matching(metrics(), "no such") == {}
    assert forecast_matching({}, "reasoning") == {}
