"""What a trained probe says of a text, and its direction as a steering vector that is saved when asked."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING

import streamlit as st

from probes.probe import Probe
from probes.probe_curve import ProbeCurve, ProbeLine
from probes.token_scores import LONGEST, TokenScores, score_text
from ui import text
from ui.held import held_model, may_load
from ui.opened import look_again
from ui.pages.paste import alone
from ui.panels import panel
from ui.picks import choice
from ui.settings import settings
from workbench.errors import UserError
from workbench.probe_plots import MOST_CELLS, token_strip
from workbench.store import Store

if TYPE_CHECKING:
    import pandas as pd

    from ui.pages.probes.page import Asked

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
STEERED = {
    "all": "every token",
    "last": "the last token of the prompt",
    "prompt": "the prompt",
    "generated": "what it writes",
}


def strip(store: Store, line: ProbeLine, asked: Asked) -> None:
    """The probe's score at every token of a text that is typed, where the store's model may be loaded."""
    st.subheader("Scores over the tokens of a text")
    if not may_load(store.name):
        text.missing(f"The store is of {store.name}, which the explorer was not told to load.",
                     f"workbench ui {settings().folder} --model {store.name}")  # fmt: skip
        return
    st.fragment(text.told(partial(_strip, store, line, asked)))()


def _strip(store: Store, line: ProbeLine, asked: Asked) -> None:
    own, chat = _first_prompt(store)
    left, right = st.columns([4, 1])
    said = left.text_area("Text", own, key="say", bind="query-params", max_chars=LONGEST, height=90)
    with right:
        as_chat = st.toggle("As a user's turn", chat, key="chat", bind="query-params")
        target = _target(line.probe, "Class", "class")
    if not said.strip():
        text.remark("Type a text; every token gets the probe's score.")
        return
    scores = _scored(store.name, asked, line.probe, said, target, as_chat)
    device = f", device={settings().device!r}" if settings().device else ""
    unit = "log-odds, nats" if target else asked.label
    code = asked.code("from probes.token_scores import score_text", "from workbench.probe_plots import token_strip")
    code += (f"model = workbench.load({store.name!r}{device})\nprobe = curve.at({str(line.site)!r}).probe\n"
             f"scores = score_text(model, probe, {said!r}, target={target!r}, chat={as_chat})\n"
             f"figure = token_strip(scores.frame(), scores.name, {unit!r})")  # fmt: skip
    cut = "" if len(scores.tokens) <= MOST_CELLS else f"; the first {MOST_CELLS} of {len(scores.tokens):,} tokens"
    panel(token_strip(scores.frame(), scores.name, unit), key="tokens-strip", code=code, data=scores.frame,
          remark=f"the score of each token at {line.site}, special tokens too{cut}")  # fmt: skip


def _target(probe: Probe, label: str, key: str) -> str | None:
    if not probe.classes:
        return None
    return str(choice(label, reversed(probe.classes), key))


def _first_prompt(store: Store) -> tuple[str, bool]:
    """A prompt of the store to begin with, and whether it is a chat."""
    try:
        first = next(iter(store.tables.prompts()))
    except (UserError, StopIteration):
        return "", False
    return first.user[:LONGEST], first.messages is not None


@st.cache_resource(max_entries=32, show_spinner="Running the text …", hash_funcs={Probe: lambda probe: repr(probe)})
def _scored(name: str, asked: Asked, probe: Probe, said: str, target: str | None, chat: bool) -> TokenScores:
    with held_model(name).alone() as model:
        return score_text(model, probe, said, target=target, chat=chat)


def steering(curve: ProbeCurve, line: ProbeLine, asked: Asked) -> None:
    """The probe's direction as a steering vector: how long it is, and a new adapter folder when asked."""
    if not curve.classes:
        return
    st.subheader("Its direction as a steering vector")
    a, b, c = st.columns(3)
    with a:
        target = _target(line.probe, "Towards", "towards")
    factor = b.slider("Length (× the gap between the classes)", 0.1, 4.0, 1.0, 0.1, key="length", bind="query-params")
    with c:
        positions = choice("Added at", STEERED, "where")
    gap = abs(line.probe.gap(target))
    adapter = line.probe.steering(target, length=factor * gap, positions=positions)
    text.write(
        f"a vector of length {factor * gap:.3g} at {line.site}; the means of the classes lie {gap:.3g} apart along it"
    )
    where = f"({target!r}, length={factor!r} * abs(probe.gap({target!r})), positions={positions!r})"
    with st.expander("Code for this adapter"):
        st.code(
            asked.code() + f"probe = curve.at({str(line.site)!r}).probe\nadapter = probe.steering{where}\n",
            language="python",
        )
    with st.form("save", border=True):
        name = st.text_input(
            "Save it as a new adapter in the opened folder, named", f"steering-{line.site.layer}", max_chars=64
        )
        sent = st.form_submit_button("Save")
    if sent:
        try:
            folder = settings().folder / checked_name(name)
            adapter.save(folder)
            look_again()
        except UserError as err:
            text.problem(err)
            return
        st.session_state["saved-adapter"] = name.strip()
    saved = st.session_state.get("saved-adapter")
    if saved:
        text.write(f"saved: {settings().folder / saved}")
        st.link_button("Try it on the Paste page", alone.link(saved), icon=":material/content_paste:")


def checked_name(name: str) -> str:
    """A name that is no path and hides nothing; UserError for any other.

    >>> checked_name(" steering-3 ")
    'steering-3'
    """
    if not NAME.fullmatch(name.strip()):
        raise UserError(f"{name[:40]!r} is no name for a folder here; use letters, digits, - and _, at most 64")
    return name.strip()


def confusion_frame(curve: ProbeCurve, line: ProbeLine) -> pd.DataFrame:
    """The confusion matrix with the names of its classes: true down, predicted across."""
    import pandas as pd

    return pd.DataFrame(line.score.confusion, columns=list(curve.classes)).assign(true=list(curve.classes))
