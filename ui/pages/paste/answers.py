"""The four answers of the paste page, side by side, as they come; and those that the run keeps."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from ui import text
from ui.held import drawing, held_model, may_load
from ui.stamps import adapter_stamp
from workbench.adapters import Adapter, Blend
from workbench.errors import UserError
from workbench.generation import Decoding, check_room
from workbench.paste_settings import PasteSettings

if TYPE_CHECKING:
    from ui.pages.paste.page import Tried

ARMS = {
    "base": "Recipient",
    "paste": "Recipient + paste",
    "donor_adapter": "Donor + adapter",
    "native": "Recipient + native",
}
SIDES = {"base": "recipient", "paste": "recipient", "donor_adapter": "donor", "native": "recipient"}
FOLDERS = {"paste": "paste", "donor_adapter": "donor", "native": "native"}
KEPT = "paste-answers"
"""where a session keeps its last answers"""
EVERY = 0.05
"""seconds from one look at an answer that comes to the next"""
LONGEST = 20_000


@dataclass(frozen=True)
class Said:
    """One answer, and what it is the answer to."""

    key: tuple[Any, ...]
    answer: str
    whole: bool = False
    problem: str = ""


def adapter_of(tried: Tried, arm: str) -> Adapter | Blend | None:
    """What an arm's model is run with; the settings are the paste's alone."""
    if arm not in FOLDERS:
        return None
    made = Adapter.load(tried.adapter(FOLDERS[arm]))
    return tried.settings.of(made) if arm == "paste" else made


def key_of(tried: Tried, arm: str) -> tuple[Any, ...]:
    """All that decides an answer."""
    folder = tried.adapter(FOLDERS[arm]) if arm in FOLDERS else tried.run
    settings = repr(tried.settings) if arm == "paste" else ""
    return (
        str(folder),
        adapter_stamp(folder),
        tried.model(SIDES[arm]),
        tried.prompt,
        settings,
        repr(tried.decoding),
    )


def show(tried: Tried, can_run: bool) -> dict[str, str]:
    """Four columns of answers; returns those that are there, by arm."""
    st.subheader("Answers")
    left, middle, _ = st.columns([1, 1, 4])
    asked = left.button("Answer", key="answer", type="primary", width="stretch",
                        disabled=not can_run or not tried.prompt.strip())  # fmt: skip
    # any click ends the run of the page that is going on, at the next word. A click that comes before that run has begun
    # arrives with it, and then both buttons were pressed: the later, which can only be this one, is what counts
    stopped = middle.button("Stop", key="stop", width="stretch", disabled=not can_run)
    if can_run and not tried.prompt.strip():
        text.remark("Type a prompt, or pick one of the run's.")
    kept: dict[str, Said] = st.session_state.setdefault(KEPT, {})
    there = [arm for arm in ARMS if arm not in FOLDERS or tried.adapter(FOLDERS[arm]).exists()]
    places = dict(zip(there, st.columns(len(there)), strict=True))
    boxes = {arm: _column(tried, arm, place, kept) for arm, place in places.items()}
    if asked and not stopped:
        for arm, box in boxes.items():
            if may_load(tried.model(SIDES[arm])):
                _answer(tried, arm, box, kept)
    return _known(tried, there, kept)


def _column(tried: Tried, arm: str, place: Any, kept: dict[str, Said]) -> Any:
    """Draws one column with what is known; returns the place where its answer is written."""
    with place:
        text.write(ARMS[arm])
        text.remark(text.shown(tried.model(SIDES[arm]), 60))
        box = st.empty()
    said, stored = kept.get(arm), _stored(tried, arm)
    with box.container():
        if said is not None and said.key == key_of(tried, arm):
            _draw(said)
        elif stored is not None:
            text.block(stored.strip(), LONGEST)
            text.remark("the run's own answer, greedy" + (", at strength 1" if arm == "paste" else ""))
        elif may_load(tried.model(SIDES[arm])):
            text.remark("not answered yet with these settings")
        else:
            text.remark("this model may not be loaded")
    return box


def _draw(said: Said) -> None:
    if said.answer or not said.problem:
        text.block(said.answer.strip(), LONGEST)
    if said.problem:
        text.problem(said.problem)
    elif not said.whole:
        text.remark("stopped here")


def _answer(tried: Tried, arm: str, box: Any, kept: dict[str, Said]) -> None:
    """Makes one answer, word by word; what is there when it is stopped is kept."""
    key, pieces, last = key_of(tried, arm), list[str](), [0.0]
    if (said := kept.get(arm)) is not None and said.key == key and said.whole:
        return

    def waiting() -> None:
        box.caption("waiting for another session …")

    def come(piece: str) -> None:
        pieces.append(piece)
        kept[arm] = Said(key, "".join(pieces))
        if time.monotonic() - last[0] > EVERY:
            last[0] = time.monotonic()
            box.code(text.lines("".join(pieces).strip(), LONGEST) + " ▌", language=None, wrap_lines=True)

    box.caption("…")
    try:
        answer = stream(tried.model(SIDES[arm]), tried.prompt, adapter_of(tried, arm), tried.decoding, come, waiting)
        kept[arm] = Said(key, answer, True)
    except UserError as err:
        kept[arm] = Said(key, "".join(pieces), True, str(err))
    with box.container():
        _draw(kept[arm])


def stream(
    name: str, prompt: str, adapter: Adapter | Blend | None, decoding: Decoding, on_text: Callable[[str], None],
    waiting: Callable[[], None] | None = None,
) -> str:  # fmt: skip
    """The answer of a held model, which no other session runs meanwhile."""
    with drawing(waiting) if decoding.sampled else nullcontext(), held_model(name).alone(waiting) as model:
        check_room(model, prompt, decoding.max_new_tokens)
        return model.generate([prompt], adapter=adapter, on_text=on_text, **decoding.options)[0]


def _stored(tried: Tried, arm: str) -> str | None:
    """The run's own answer to this prompt, where it was made under the same settings."""
    if tried.stored is None or arm not in tried.stored.arms or tried.decoding.sampled:
        return None
    if arm == "paste" and tried.settings != PasteSettings():
        return None
    index = next((i for i, prompt in enumerate(tried.stored.prompts) if prompt.user == tried.prompt), None)
    return None if index is None else tried.stored.arms[arm][index]


def _known(tried: Tried, arms: list[str], kept: dict[str, Said]) -> dict[str, str]:
    found = {}
    for arm in arms:
        said = kept.get(arm)
        answer = said.answer if said is not None and said.key == key_of(tried, arm) else _stored(tried, arm)
        if answer and answer.strip():
            found[arm] = answer
    return found


def path_of(tried: Tried, arm: str) -> Path:
    """The adapter folder of an arm that has one."""
    return tried.adapter(FOLDERS[arm])
