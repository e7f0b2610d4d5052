"""What holds of every page: an empty folder, artefacts that are damaged in every way, stores that go while they are open."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from probes.probe_run import ProbeJob, run_probe
from workbench.catalogue import catalogue

from ..metrics_example import EVIL
from .conftest import as_markup, words
from .converter_runs import converter_run
from .job_runs import job_run
from .transport_runs import transport_run
from .word_stores import word_store

PAGES = ("runs", "activations", "transport", "converters", "paste", "probes", "lens")
COMMANDS = {"runs": "workbench demo --out {}", "activations": "workbench profile bundled:recipient --prompts bundled:profile",
            "transport": "workbench transport bundled:recipient", "converters": "workbench demo --out {}",
            "paste": "workbench demo --out {}", "probes": "workbench profile bundled:recipient",
            "lens": "workbench lens bundled:recipient --fit"}  # fmt: skip
DAMAGE = ("", "{", "[]", "3", "{}", '{"a": 1}', "\x00\xff")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Something of every kind, with names that mean harm."""
    made = tmp_path_factory.mktemp("work") / "all"
    name = f"{EVIL.replace('/', '')} [x](javascript:1) **b** \u202eabc {'n' * 100}"
    job_run(made, f"{name}r")
    converter_run(made)
    transport_run(made)
    word_store(made / f"{name}s")
    run_probe(ProbeJob(str(made / f"{name}s"), "label", max_rows=200, controls=False), made / f"{name}p")
    return made


@pytest.mark.parametrize("page", PAGES)
def test_an_empty_folder_says_what_to_run(open_page, tmp_path, page):
    test = open_page(page, tmp_path)
    assert not test.exception
    assert COMMANDS[page].format(tmp_path) in words(test)


@pytest.mark.parametrize("page", PAGES)
def test_names_that_mean_harm_are_text(open_page, folder, page):
    test = open_page(page, folder, **({"open": "true"} if page == "runs" else {}))
    assert not test.exception, [one.value for one in test.exception]
    assert not as_markup(test, "<script>", "](javascript:1)", "**b**", "\u202e")


@pytest.mark.parametrize("page", [page for page in PAGES if page != "lens"])
def test_small_files_that_are_damaged_are_lines(open_page, folder, tmp_path, page):
    """Each kind of damage, in every JSON and TOML file of a folder but what names an artefact."""
    for i, text in enumerate(DAMAGE):
        made = tmp_path / str(i)
        shutil.copytree(folder, made)
        for file in made.rglob("metrics.json"):
            file.write_text(text, encoding="latin-1")
        test = open_page(page, made)
        assert not test.exception, [text, *(one.value for one in test.exception)]


@pytest.mark.parametrize("page", ["runs", "converters", "paste", "transport"])
def test_figures_of_another_kind_are_lines(open_page, folder, tmp_path, page):
    """A metrics.json that is whole, of our schema, and holds other things than figures."""
    for i, change in enumerate(({"behaviours": 3}, {"behaviours": {"b": 3}}, {"behaviours": {"b": {"arms": [1]}}},
                                {"behaviours": {"b": {"forecast": {"chosen": {"method": "ridge"}}}}}, {"efficiency": 3},
                                {"causal": []}, {"warnings": 3}, {"best": 3})):  # fmt: skip
        made = tmp_path / str(i)
        shutil.copytree(folder, made)
        for file in made.rglob("metrics.json"):
            file.write_text(json.dumps(json.loads(file.read_text()) | change))
        test = open_page(page, made)
        assert not test.exception, [change, *(one.value for one in test.exception)]


@pytest.mark.parametrize("page", ["activations", "probes"])
def test_a_store_that_goes_while_it_is_open_is_a_line(open_page, folder, tmp_path, page):
    shutil.copytree(folder, tmp_path / "all")
    store = next(path.parent for path in (tmp_path / "all").glob("*s/manifest.json"))
    for view in ("overview", "projection") if page == "activations" else ("",):
        kept = tmp_path / f"kept{view}"
        test = open_page(page, tmp_path / "all", **({"view": view} if view else {}))
        assert not test.exception
        store.rename(kept)
        test.selectbox(key="site").set_value("resid_post.0").run()
        assert not test.exception, [one.value for one in test.exception]
        kept.rename(store)


def test_every_run_is_listed_with_what_it_found(open_page, folder):
    test = open_page("runs", folder)
    assert sorted(test.dataframe[0].value["kind"]) == ["probe", "transfer", "transfer", "transport"]
    said = words(test)
    assert "logistic probes of label: Best accuracy" in said
    assert "A linear map predicts the later layer" in said
    test.toggle(key="open").set_value(True)
    test.selectbox(key="report").set_value(catalogue(folder).of("probe")[0].name).run()
    assert not test.exception
    assert "probes of label" in test.get("iframe")[0].proto.srcdoc
