"""The runs of the opened folder: what they found, side by side; one that is going on; and a new one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from probes.probe_report import probe_headlines, render_probe_run
from probes.transport_report import render_transport, run_headlines
from ui import text
from ui.held import may_load
from ui.opened import contents
from ui.panels import panel
from ui.picks import choice
from ui.settings import settings
from ui.stamps import Stamp, stamp
from workbench.catalogue import Entry
from workbench.errors import UserError
from workbench.job_options import open_job
from workbench.job_start import start_job
from workbench.report import render
from workbench.run_comparison import compare_runs
from workbench.run_plots import VALUES, runs_compared
from workbench.run_progress import run_progress
from workbench.small_files import read_from
from workbench.summary import headline, load_metrics

DEMO = "workbench demo --out {folder}"
TOLD = {"run": "transfer", "transport": "transport", "probe": "probe"}
"""runs whose numbers and report are shown here"""
KINDS = {**TOLD, "similarity": "similarity", "depth": "depth", "geometry": "geometry"}


def page() -> None:
    st.title("Runs")
    found = contents()
    runs = found.of(*KINDS)
    if not runs:
        text.missing("No run in the opened folder. The demo takes some minutes.", DEMO.format(folder=found.folder))
    else:
        listing(runs)
        _going_on()
        done = [run for run in runs if run.state == "done"]
        headlines([run for run in done if run.kind in TOLD])
        text.told(compare)([run for run in runs if run.kind == "run" and run.state in ("done", "running")])
        text.told(report)([run for run in done if run.kind in TOLD])
        if any(run.kind not in TOLD for run in done):
            text.remark("Runs of similarity, depth and geometry are told by the report.html in their folders.")
    start()


def listing(runs: Sequence[Entry]) -> None:
    """Every run with its state and age."""
    table = pd.DataFrame(
        {
            "run": [text.shown(r.name, 120) for r in runs],
            "kind": [KINDS[r.kind] for r in runs],
            "state": [r.state for r in runs],
            "age": [age(r.age) for r in runs],
            "models": [text.shown(_models(r), 120) for r in runs],
            "note": [text.shown(r.note, 200) for r in runs],
        }
    )
    st.dataframe(table, hide_index=True, width="stretch")


def _models(run: Entry) -> str:
    job = run.facts.get("job", {})
    sides = [job[side].get("model", "") for side in ("donor", "recipient") if isinstance(job.get(side), dict)]
    return " to ".join(map(str, sides)) or str(job.get("model", job.get("store", "")))


def age(seconds: float) -> str:
    """
    >>> age(30), age(7200), age(200_000)
    ('30 s', '2 h', '2 days')
    """
    for size, word in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {word if count > 1 else word.removesuffix('s')}"
    return f"{int(seconds)} s"


@st.cache_data(max_entries=64, show_spinner=False)
def _headlines(kind: str, folder: str, stamp: Stamp) -> list[str]:
    with read_from(Path(folder) / "metrics.json"):
        if kind == "probe":
            return probe_headlines(folder)
        if kind == "transport":
            return run_headlines(folder)
        behaviours = load_metrics(folder).get("behaviours") or {}
        return [headline(name, behaviour) for name, behaviour in behaviours.items()]


def headlines(runs: Sequence[Entry]) -> None:
    """The numbers of each finished run in words."""
    if not runs:
        return
    st.subheader("What they found")
    for i, run in enumerate(runs):
        with st.container(border=True):
            st.code(text.shown(run.name, 120), language=None)
            try:
                for line in _headlines(run.kind, str(run.path), stamp(run.path / "metrics.json")):
                    text.write(line, 1200)
            except UserError as err:
                text.problem(err)
        if i == 11 and len(runs) > 12:
            text.remark(f"the first 12 of {len(runs)} finished runs")
            break


def compare(runs: Sequence[Entry]) -> None:
    """Arms of several transfer runs beside one another."""
    names = [run.name for run in runs]
    if not names:
        return
    st.subheader("Side by side")
    left, right = st.columns([3, 1])
    chosen = left.multiselect("Transfer runs", names, default=names[:2], key="runs", bind="query-params",
                              format_func=lambda n: text.shown(n, 80))  # fmt: skip
    with right:
        value = choice("Value", {name: words for name, (words, *_) in VALUES.items()}, "value")
    paths = {run.name: str(run.path) for run in runs if run.name in chosen}
    if not paths:
        return text.remark("choose at least one run")
    tables = []
    for name, path in paths.items():
        with read_from(Path(path) / "metrics.json"):
            tables.append(compare_runs({name: path}))
    table = pd.concat(tables, ignore_index=True)
    code = f"""
from workbench.run_comparison import compare_runs
from workbench.run_plots import runs_compared

table = compare_runs({paths!r})
figure = runs_compared(table, {value!r})
"""
    panel(runs_compared(table, value), key="compared", code=code, data=lambda: table,
          notes=Path(paths[chosen[0]]) if len(paths) == 1 else None)  # fmt: skip


def report(runs: Sequence[Entry]) -> None:
    """The report of a run, written anew from its numbers, so that no page of somebody else's is shown."""
    names = [run.name for run in runs]
    if not names:
        return
    st.subheader("Report")
    name = choice("Of the run", names, "report")
    run = next(r for r in runs if r.name == name)
    shown = st.toggle("Show it here", key="open", bind="query-params")
    html = _report(run.kind, str(run.path), stamp(run.path / "metrics.json")) if shown else ""
    if shown:
        st.iframe(html, height=900)
        st.download_button("Download", html.encode(), "report.html", "text/html", on_click="ignore")


@st.cache_data(max_entries=2, show_spinner="Writing the report …")
def _report(kind: str, folder: str, stamp: Stamp) -> str:
    with read_from(Path(folder) / "metrics.json"):
        if kind == "probe":
            return render_probe_run(folder)
        return render(load_metrics(folder)) if kind == "run" else render_transport(Path(folder))


@st.fragment(run_every=2)
@text.told
def _going_on() -> None:
    """Runs that a process is writing, as far as they have come."""
    for run in contents().of(*KINDS):
        if run.state != "running":
            continue
        with st.container(border=True):
            st.code(text.shown(run.name, 120), language=None)
            told = run_progress(run.path, run.facts.get("job"))
            if told.share is not None:
                st.progress(told.share, text=f"{len(told.done):d} of {told.steps:d} steps")
            elif told.done:
                text.write(f"{len(told.done)} steps done")
            st.code("\n".join(text.shown(line, 300) for line in told.log) or "no log yet", language=None)


def start() -> None:
    """A form that writes the job file of the bundled job, changed, and runs it."""
    st.subheader("Start a job")
    known = [name for name in ("bundled:donor", "bundled:recipient", *settings().models) if may_load(name)]
    with st.form("job"):
        left, middle, right = st.columns(3)
        name = left.text_input("Name of the run", "my-run", max_chars=100)
        donor = middle.selectbox("Donor", known, index=0, format_func=lambda n: text.shown(n, 80))
        recipient = right.selectbox("Recipient", known, index=1, format_func=lambda n: text.shown(n, 80))
        behaviours = left.multiselect("Behaviours", ["reasoning", "refusal", "style"], default=["refusal"])
        seed = middle.number_input("Seed", 0, 2**31 - 1, 0)
        quick = right.checkbox("Quick: shows that it runs, the numbers mean little", value=True)
        show, run = st.columns([1, 1])
        wants_text = show.form_submit_button("Show the job file")
        wants_run = run.form_submit_button("Write it and run it", type="primary")
    if not (wants_text or wants_run):
        return
    job = open_job("bundled:demo", donor=donor, recipient=recipient, seed=int(seed), quick=quick)
    kept = [b for b in job.behaviours if b.name in behaviours]
    changed: dict[str, Any] = {"name": name, "behaviours": kept, "out": str(settings().folder)}
    job = type(job).parse(job.model_copy(update=changed).model_dump(exclude_none=True), "this form")
    st.code(job.text, language="toml")
    if wants_run:
        made = start_job(job, settings().folder)
        st.success("It runs, in a process of its own; its steps are shown above.")
        st.code(f"workbench run {made.file}", language="bash")
