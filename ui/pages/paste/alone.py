"""An adapter of the opened folder, tried on a prompt of one's own: a steering vector that was saved, a paste, any."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlencode

import streamlit as st

from ui import text
from ui.held import held_model, may_load
from ui.opened import contents, pick
from ui.panels import panel
from ui.settings import settings
from ui.stamps import Stamp, adapter_stamp
from workbench.adapters import Adapter
from workbench.errors import UserError
from workbench.evaluate.token_changes import TokenChanges, token_changes
from workbench.paste_plots import drawn_positions, kl_strip

TRIED = {"run": "the paste of a run", "adapter": "an adapter of the folder"}
STRONGEST, MOST_TOKENS, LONGEST_PROMPT = 4.0, 48, 20_000


def link(name: str) -> str:
    """The address of this page with an adapter of the opened folder picked.

    >>> link("mine")
    '/paste?what=an+adapter+of+the+folder&adapter=mine'
    """
    return "/paste?" + urlencode({"what": TRIED["adapter"], "adapter": name})


def show() -> None:
    """The pick of an adapter, and what it does to a prompt."""
    entry = pick("Adapter", contents().of("adapter"), "adapter")
    if entry is None:
        text.missing("No adapter in the opened folder; the Probes page saves one.", f"workbench ui {settings().folder}")
        return
    try:
        adapter = Adapter.load(entry.path)
    except UserError as err:
        text.problem(err)
        return
    model = str(adapter.base.get("name", ""))
    text.write(adapter)
    if not model or not may_load(model):
        text.missing(f"It belongs to {model or 'a model that it does not name'}, which the explorer was not told to load.",
                     f"workbench ui {settings().folder} --model {model or 'MODEL'}")  # fmt: skip
        return
    left, right = st.columns([3, 1])
    prompt = left.text_area("Prompt text", key="say", bind="query-params", max_chars=LONGEST_PROMPT, height=90)
    strength = right.slider("Strength (× its own)", -STRONGEST, STRONGEST, 1.0, 0.1, key="dose", bind="query-params")
    if not prompt.strip():
        text.remark("Type a prompt.")
        return
    _strip(entry.path, model, strength, prompt)
    if st.button("Answer", type="primary"):
        said = _answers(model, entry.path, adapter_stamp(entry.path), strength, prompt)
        for place, title, answer in zip(st.columns(2), ("without it", "with it"), said, strict=True):
            with place:
                text.remark(title)
                text.block(answer)


def _strip(folder: Path, model: str, strength: float, prompt: str) -> None:
    changes = _changes(model, folder, adapter_stamp(folder), strength, prompt)
    device = f", device={settings().device!r}" if settings().device else ""
    code = "\n".join([
        "import workbench", "from workbench.evaluate.token_changes import token_changes",
        "from workbench.paste_plots import kl_strip", "", f"model = workbench.load({model!r}{device})",
        f"adapter = {strength!r} * workbench.Adapter.load({str(folder)!r})",
        f"changes = token_changes(model, {prompt!r}, adapter)", "figure = kl_strip(changes)",
    ])  # fmt: skip
    drawn = drawn_positions(changes)
    cut = "" if len(drawn) == len(changes) else f"; the last {len(drawn)} of {len(changes)} tokens are drawn"
    panel(kl_strip(changes), key="adapter-strip", data=changes.frame, code=code,
          remark=f"the colour of a token says how far the distribution of the token after it moves{cut}")  # fmt: skip


@st.cache_resource(max_entries=16, show_spinner="Running the prompt without and with it …")
def _changes(name: str, folder: Path, stamp: Stamp, strength: float, prompt: str) -> TokenChanges:
    adapter = strength * Adapter.load(folder)
    with held_model(name).alone() as model:
        return token_changes(model, prompt, adapter)


@st.cache_data(max_entries=32, show_spinner="Answering …")
def _answers(name: str, folder: Path, stamp: Stamp, strength: float, prompt: str) -> tuple[str, str]:
    adapter = strength * Adapter.load(folder)
    with held_model(name).alone() as model:
        plain, edited = (
            model.generate([prompt], max_new_tokens=MOST_TOKENS, adapter=one)[0] for one in (None, adapter)
        )
    return plain, edited
