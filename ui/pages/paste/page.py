"""A finished paste, tried: on a prompt of one's own, at another strength, at some layers, at other positions."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamlit as st

from ui import text
from ui.held import may_load
from ui.opened import pick_run
from ui.pages.paste import alone, answers, figures
from ui.picks import choice
from ui.settings import settings as started
from ui.stamps import Stamp, stamp
from workbench.adapters import Adapter
from workbench.catalogue import Entry
from workbench.errors import UserError
from workbench.evaluate.answer_files import Answers, read_answers
from workbench.generation import Decoding
from workbench.job_start import write_job
from workbench.jobs import BehaviourTable, Job
from workbench.paste_settings import PasteSettings, job_of_settings
from workbench.summary import arms_of, load_metrics

DEMO = "workbench demo --out {folder}"
OWN, TYPED = "as it is", "type one"
STRONGEST, MOST_TOKENS, LONGEST_PROMPT, MOST_PROMPTS = 3.0, 512, 20_000, 400


@dataclass(frozen=True)
class Tried:
    """One behaviour of a run, and how it is tried."""

    run: Path
    job: Job
    table: BehaviourTable
    metrics: Mapping[str, Any]
    stored: Answers | None
    """the answers of the run, where it has come so far"""
    prompt: str
    settings: PasteSettings
    decoding: Decoding

    def adapter(self, arm: str) -> Path:
        """The folder of an arm's adapter."""
        return adapter_folder(self.run, self.table.name, arm)

    def model(self, side: str) -> str:
        """The name of the donor or the recipient."""
        return str(getattr(self.job, side).model)


def page() -> None:
    st.title("Paste")
    command = DEMO.format(folder=shlex.quote(str(started().folder)))
    if choice("What is tried", alone.TRIED, "what") == "adapter":
        return alone.show()
    left, right = st.columns([2, 3])
    with left:
        entry = pick_run("run", command, "No transfer run in the opened folder. The demo takes some minutes.")
    if entry is None:
        return
    job = Job.parse(entry.facts.get("job") or {}, str(entry.path / "job.toml"))
    metrics = _metrics(entry)
    with right:
        name = choice("Behaviour", [table.name for table in job.behaviours], "behaviour")
    table = next(one for one in job.behaviours if one.name == name)
    stored = _stored(entry.path, name, metrics)
    prompt = _prompt(stored)
    adapter = _adapter(entry.path, name)
    with st.container(border=True):
        settings = _settings(adapter, name)
        decoding = _decoding(job)
    tried = Tried(entry.path, job, table, metrics, stored, prompt, settings, decoding)
    can_run = _may_run(tried) and adapter is not None
    said = answers.show(tried, can_run)
    if can_run:
        figures.strip(tried, said)
    figures.dose(tried, can_run)
    _send(tried)


def adapter_folder(run: Path, behaviour: str, arm: str) -> Path:
    """Where a run keeps an adapter; UserError where that leads out of the opened folder."""
    folder = run / "adapters" / behaviour / arm
    if not folder.resolve().is_relative_to(started().folder):
        raise UserError(f"{folder} leads out of the opened folder; it is not read")
    return folder


def _metrics(entry: Entry) -> dict[str, Any]:
    try:
        return _read_metrics(str(entry.path), stamp(entry.path / "metrics.json"))
    except UserError as err:
        text.problem(err)
        return {}


@st.cache_data(max_entries=8, show_spinner=False)
def _read_metrics(run: str, stamp: Stamp) -> dict[str, Any]:
    return load_metrics(run)


def _stored(run: Path, behaviour: str, metrics: Mapping[str, Any]) -> Answers | None:
    """The answers that a run keeps; None, and a line where they are damaged, where there are none."""
    file = run / "answers" / f"{behaviour}.jsonl"
    arms = [arm for arm in arms_of((metrics.get("behaviours") or {}).get(behaviour) or {})]
    wanted = tuple(arm for arm in answers.ARMS if arm in arms)
    if not wanted or not file.is_file() or not file.resolve().is_relative_to(started().folder):
        return None
    try:
        return _read_stored(str(file), wanted, stamp(file))
    except UserError as err:
        text.problem(err)
        return None


@st.cache_resource(max_entries=8, show_spinner=False)
def _read_stored(file: str, arms: tuple[str, ...], stamp: Stamp) -> Answers:
    return read_answers(file, arms)


def _adapter(run: Path, behaviour: str) -> Adapter | None:
    """The paste; None, and a line on why, where it cannot be read."""
    try:
        folder = adapter_folder(run, behaviour, "paste")
        if not folder.exists():
            text.missing("This run has no paste yet.", f"workbench run {shlex.quote(str(run / 'job.toml'))}")
            return None
        return Adapter.load(folder)
    except UserError as err:
        text.problem(err, fix=f"workbench run {shlex.quote(str(run / 'job.toml'))}")
        return None


def _prompt(stored: Answers | None) -> str:
    """A prompt that was typed, or one of those that the run evaluated on."""
    left, right = st.columns([2, 3])
    asked = stored.prompts[:MOST_PROMPTS] if stored else ()
    options = {-1: TYPED} | {i: f"{i}: {prompt.user}" for i, prompt in enumerate(asked)}
    with left:
        i = choice("Prompt", options, "ask", 0)
        if stored and len(stored.prompts) > MOST_PROMPTS:
            text.remark(f"the first {MOST_PROMPTS} of {len(stored.prompts)} evaluation prompts")
    with right:
        if i < 0:
            return st.text_area("Prompt text", key="say", bind="query-params", max_chars=LONGEST_PROMPT, height=90)
        text.block(asked[i].user)
        return asked[i].user


def _settings(adapter: Adapter | None, behaviour: str) -> PasteSettings:
    """How the paste is tried; what cannot be is one line, and the paste as it is."""
    places = [] if adapter is None else adapter.layers
    own = "last" if adapter is None else adapter.positions
    a, b, c, d = st.columns([3, 2, 2, 2])
    strength = a.slider("Strength (× the paste's own)", 0.0, STRONGEST, 1.0, 0.05, key="strength", bind="query-params")
    layers = b.multiselect("Layers that are edited", places, places, key=f"layers-{behaviour}", bind="query-params")
    named = [OWN, "last", "prompt", "generated", "all", "first:1", "last:4"]
    with c:
        words = {name: f"{OWN} ({own})" if name == OWN else name for name in named}
        positions = choice("Positions", words, "positions", disabled=adapter is not None and bool(adapter.terms))
    with d:
        schedule = choice("Over generated tokens", ("constant", "linear", "first"), "schedule",
                          help="linear: falls to nothing over n generated tokens; first: ends after n")  # fmt: skip
    if schedule != "constant":
        schedule = f"{schedule}:{d.number_input('n tokens', 1, MOST_TOKENS, 16, key='n', bind='query-params')}"
    made = PasteSettings(
        strength if layers or not places else 0.0,
        None if not layers or layers == places else tuple(sorted(layers)),
        None if positions in (OWN, own) else positions,
        schedule,
    )
    try:
        if adapter is not None:
            made.of(adapter)
        return made
    except UserError as err:
        text.problem(err)
        return PasteSettings()


def _decoding(job: Job) -> Decoding:
    """How the answers' tokens are chosen."""
    with st.expander("How answers are made"):
        a, b, c, d, e = st.columns(5)
        most = a.number_input("New tokens, at most", 1, MOST_TOKENS, min(job.evaluate.max_new_tokens, MOST_TOKENS),
                              key="tokens", bind="query-params")  # fmt: skip
        if not b.toggle("Sample", key="sample", bind="query-params"):
            text.remark("greedy: the likeliest token at each step")
            return Decoding(int(most))
        temperature = c.number_input("Temperature", 0.05, 5.0, 1.0, 0.05, key="temperature", bind="query-params")
        share = d.number_input("Top p", 0.01, 1.0, 1.0, 0.01, key="p", bind="query-params")
        seed = e.number_input("Seed", 0, 2**31 - 1, 0, key="seed", bind="query-params")
        return Decoding(int(most), sample=True, temperature=temperature, top_p=share, seed=int(seed))


def _may_run(tried: Tried) -> bool:
    """Whether the recipient may be loaded; says how to start the explorer where it may not."""
    closed = [name for name in dict.fromkeys((tried.model("recipient"), tried.model("donor"))) if not may_load(name)]
    if closed:
        words = ["workbench", "ui", str(started().folder), *(w for name in closed for w in ("--model", name))]
        text.missing(f"The explorer was not started with {', '.join(closed)}. What the run keeps is shown all the same.",
                     shlex.join(words))  # fmt: skip
    return tried.model("recipient") not in closed


def _send(tried: Tried) -> None:
    """The job file of these settings, and a button that writes it."""
    st.subheader("Send these settings to a job")
    name = st.text_input("Name of the run", f"{tried.job.name[:60]}-{tried.table.name[:30]}", max_chars=100,
                         key=f"job-{tried.table.name}")  # fmt: skip
    folder = started().folder
    try:
        job = job_of_settings(tried.job, tried.metrics, tried.table.name, tried.settings, name=name, out=folder,
                              max_new_tokens=tried.decoding.max_new_tokens)  # fmt: skip
    except UserError as err:
        return text.problem(err)
    for line in tried.settings.not_in_a_job:
        text.remark(f"left out: {line}")
    if tried.decoding.sampled:
        text.remark("left out: the sampling: a job answers greedily")
    with st.expander("The job file"):
        st.code(job.text, language="toml")
    st.caption("It would be written to")
    text.write(folder / f"{job.name}.toml", 1000)
    if st.button("Write the job file", key="write"):
        made = write_job(job, folder)
        st.success("Written. This runs it:")
        st.code(f"workbench run {shlex.quote(str(made))}", language="bash")
