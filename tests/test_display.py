"""What a notebook shows of a store or a run in one call."""

from __future__ import annotations

import json
import shutil

import plotly.graph_objects as go
import pytest

import workbench
from workbench import UserError
from workbench.display import Display
from workbench.sites import Site

from .metrics_example import metrics
from .store.made import made_store, noise


@pytest.fixture
def store(tmp_path):
    return made_store(tmp_path / "<b>s", {Site(0): noise(12, 8)}, ["one two <i>three</i>"] * 4)


def test_a_store_is_shown_by_its_overview(store):
    shown = workbench.show(store, rows=6, seed=2)
    assert shown.overview is not None
    assert (shown.overview.sampled, shown.overview.seed) == (6, 2)
    assert [type(figure) for figure in shown.figures] == [go.Figure] * 3
    assert shown._repr_html_().startswith("<h4>Store &lt;b&gt;s</h4>")
    assert shown.overview._repr_html_() in shown._repr_html_()
    assert workbench.show(str(store.path)).overview.sampled == 12


def test_jupyter_displays_the_tables_and_then_every_figure(store, monkeypatch):
    import IPython.display

    found: list[object] = []
    monkeypatch.setattr(IPython.display, "display", lambda *parts: found.extend(parts))
    shown = workbench.show(store)
    shown._ipython_display_()
    assert found[0].data == shown._repr_html_()
    assert tuple(found[1:]) == shown.figures


def test_the_function_stays_one_after_its_module_was_imported():
    assert isinstance(workbench.show, type(lambda: None))
    assert workbench.display is not workbench.show if hasattr(workbench, "display") else Display


def test_a_run_is_shown_by_its_results(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(metrics()))
    shown = workbench.show(tmp_path)
    assert shown.overview is None
    assert "<table" in shown.html
    assert "<script>" not in shown.html
    assert len(shown.figures) == 2


def test_what_is_neither_is_refused(tmp_path, store):
    with pytest.raises(UserError, match="no such folder"):
        workbench.show(tmp_path / "nothing")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "job.toml").write_text("")
    with pytest.raises(UserError, match="is a run without results yet: run its job to the end"):
        workbench.show(tmp_path / "run")
    (tmp_path / "run" / "metrics.json").write_text("{}")
    before = tmp_path / "run" / "job.toml"
    for verb in ("transport", "probe", "depth"):
        before = shutil.move(before, tmp_path / "run" / f"{verb}.toml")
        with pytest.raises(UserError, match=rf"is a run of `workbench {verb}`: its report.html shows its results"):
            workbench.show(tmp_path / "run")
