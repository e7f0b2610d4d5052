"""The page of runs: nothing there, finished, going on, damaged; side by side; and a job started from its form."""

from __future__ import annotations

import fcntl
import json

import pytest

from ui.pages.runs import page as runs
from workbench.catalogue import catalogue
from workbench.errors import UserError
from workbench.job_options import open_job
from workbench.job_start import start_job, write_job
from workbench.run_comparison import compare_runs
from workbench.run_plots import runs_compared
from workbench.run_progress import run_progress

from ..metrics_example import EVIL
from .conftest import as_markup, run_snippets, words
from .job_runs import job_run


def test_finished_runs_are_told_and_compared_and_nothing_of_theirs_is_markup(open_page, tmp_path):
    for name in ("first", "second"):
        job_run(tmp_path, name, recipient=EVIL)
    page = open_page("runs", tmp_path, open="true")
    assert not page.exception
    assert list(page.dataframe[0].value["state"]) == ["done", "done"]
    assert EVIL in next(iter(page.dataframe[0].value["models"]))
    assert "reasoning: the paste reached" in words(page)
    assert not as_markup(page, EVIL)
    run_snippets(page)


def test_a_link_opens_the_same_comparison(open_page, tmp_path):
    for name in ("first", "second", "third"):
        job_run(tmp_path, name)
    page = open_page("runs", tmp_path, runs=["third"], value="log-odds (nats)")
    assert page.multiselect(key="runs").value == ["third"]
    assert page.selectbox(key="value").value == "log_odds"


def test_a_run_that_goes_on_shows_its_steps_and_its_log(open_page, tmp_path):
    run = job_run(tmp_path, done=False)
    with (run / "lock").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        page = open_page("runs", tmp_path)
    assert not page.exception
    assert list(page.dataframe[0].value["state"]) == ["running"]
    assert "step profile-donor" in words(page)


def test_a_damaged_run_is_a_line_and_the_others_are_shown(open_page, tmp_path):
    job_run(tmp_path)
    (job_run(tmp_path, "broken") / "metrics.json").write_text("{")
    (job_run(tmp_path, "torn") / "job.toml").write_text("[")
    page = open_page("runs", tmp_path)
    assert not page.exception
    assert "is not whole JSON" in words(page)
    assert "damaged" in list(page.dataframe[0].value["state"])


def test_progress_counts_the_steps_that_a_job_tells(tmp_path):
    run = job_run(tmp_path, done=False)
    told = run_progress(run, catalogue(tmp_path).get("first").facts["job"])
    assert (dict(told.done), len(told.to_come)) == ({"profile-donor": 1.5}, 6)
    assert told.share == pytest.approx(1 / 7)
    assert run_progress(tmp_path / "none").share is None


def test_progress_of_a_run_whose_steps_nobody_tells_is_not_known(tmp_path):
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "grid.json").write_text(json.dumps({"seconds": 2.0}))
    told = run_progress(tmp_path, {"model": "m", "prompts": "p"})
    assert dict(told.done) == {"grid": 2.0}
    assert (told.to_come, told.steps, told.share) == (None, None, None)
    for damaged in ({"behaviours": 3}, {"behaviours": [3]}, {}):
        assert run_progress(tmp_path, damaged).share is None


def test_a_comparison_holds_every_run_and_arm(tmp_path):
    table = compare_runs({"one": job_run(tmp_path), "two": job_run(tmp_path, "second")})
    assert sorted(set(table["run"])) == ["one", "two"]
    figure = runs_compared(table, "share_log_odds")
    assert {trace.name for trace in figure.data} >= {"paste", "control: mean delta"}
    assert EVIL not in figure.to_json()


def test_a_job_from_the_form_is_a_new_file_and_runs_by_itself(open_page, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("workbench.job_start.subprocess.Popen", lambda line, **_: started.append(line) or Process())
    page = open_page("runs", tmp_path)
    page.text_input[0].input("mine")
    next(b for b in page.button if b.label == "Write it and run it").click().run()
    assert not page.exception
    assert started[0][-2:] == ["run", str(tmp_path / "mine.toml")]
    assert 'name = "mine"' in (tmp_path / "mine.toml").read_text()
    next(b for b in page.button if b.label == "Write it and run it").click().run()
    assert "is there already; give the job another name" in words(page)
    page.text_input[0].input("../out")
    next(b for b in page.button if b.label == "Write it and run it").click().run()
    assert "this form: name" in words(page)
    assert len(started) == 1
    assert not (tmp_path.parent / "out.toml").exists()


class Process:
    pid = 1


def test_nothing_is_overwritten_by_a_job_that_is_started(tmp_path):
    job = open_job("bundled:demo", out=tmp_path)
    write_job(job, tmp_path)
    with pytest.raises(UserError, match="is there already"):
        write_job(job, tmp_path)
    (tmp_path / "demo").mkdir()
    with pytest.raises(UserError, match="is there already"):
        start_job(job, tmp_path)


@pytest.mark.parametrize(("seconds", "said"), [(5, "5 s"), (61, "1 min"), (90_000, "1 day")])
def test_ages_are_told_in_their_largest_unit(seconds, said):
    assert runs.age(seconds) == said


def test_runs_that_are_told_by_their_own_reports_are_listed(open_page, tmp_path):
    for kind in ("similarity", "depth", "geometry"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / f"{kind}.toml").write_text("")
        (tmp_path / kind / "metrics.json").write_text("{}")
    page = open_page("runs", tmp_path)
    assert not page.exception
    assert set(page.dataframe[0].value["kind"]) == {"similarity", "depth", "geometry"}
    assert "are told by the report" in words(page)
