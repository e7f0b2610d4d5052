"""The figures of the paste page: where in a text it acts, what it changes there, and dose and response."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd
import streamlit as st

from ui import text
from ui.held import held_model, may_load
from ui.pages.paste.answers import ARMS, SIDES, path_of
from ui.panels import panel
from ui.picks import choice, take
from ui.settings import settings as started
from ui.stamps import Stamp, adapter_stamp
from workbench.adapters import Adapter
from workbench.evaluate.dose import PromptDose, prompt_dose
from workbench.evaluate.token_changes import TokenChanges, token_changes
from workbench.paste_plots import drawn_positions, kl_strip, prompt_dose_curve, shown_token, top_bars
from workbench.paste_settings import PasteSettings
from workbench.plots import dose_curves
from workbench.summary import get

if TYPE_CHECKING:
    from ui.pages.paste.page import Tried

STEPS = tuple(i / 4 for i in range(13))
"""the strengths of the curve at one prompt"""
ALONE = "the prompt alone"


def strip(tried: Tried, answers: dict[str, str]) -> None:
    """The text token by token, and behind a cell that is clicked the likeliest tokens before and after."""
    st.subheader("Where the next token changes")
    if not tried.prompt.strip():
        return text.remark("Type a prompt, or pick one of the run's.")
    st.fragment(text.told(partial(_strip, tried, answers)))()


def _strip(tried: Tried, answers: dict[str, str]) -> None:
    left, right = st.columns(2)
    whose = {arm: ARMS[arm] for arm in ("paste", "native", "donor_adapter")
             if path_of(tried, arm).exists() and may_load(tried.model(SIDES[arm]))}  # fmt: skip
    over = {"": ALONE} | {arm: f"the prompt and the answer of: {ARMS[arm]}" for arm in ARMS}
    with left:
        arm = choice("Without and with the adapter of", whose, "whose")
    with right:
        said = choice("Over", over, "over", "paste")
    answer = answers.get(said, "")
    if said and not answer:
        text.remark("there is no such answer yet: this is the prompt alone")
    settings = tried.settings if arm == "paste" else PasteSettings()
    folder, model = path_of(tried, arm), tried.model(SIDES[arm])
    changes = _changes(model, str(folder), adapter_stamp(folder), settings, tried.prompt, answer)
    code = _code(model, str(folder), settings, "from workbench.evaluate.token_changes import token_changes")
    what = repr((tried.prompt, answer)) if answer else repr(tried.prompt)
    code += f"changes = token_changes(model, {what}, adapter)\n"
    drawn = drawn_positions(changes)
    cut = "" if len(drawn) == len(changes) else f"; the last {len(drawn)} of {len(changes)} tokens are drawn"
    picked = panel(kl_strip(changes), key="strip", select=["points"], data=changes.frame, notes=tried.run,
                   code=f"from workbench.paste_plots import kl_strip\n{code}figure = kl_strip(changes)",
                   remark="the colour of a token says how far the distribution of the token after it moves; the frame is "
                          "the last token of the prompt; click a token for what it moves from and to" + cut)  # fmt: skip
    _bars(tried, changes, picked, code)


def _bars(tried: Tried, changes: TokenChanges, picked: Any, code: str) -> None:
    """What one position moves from and to: the clicked one, else that in the address, else the one that moves most."""
    drawn = drawn_positions(changes)
    options = {p: f"{p}: {changes.tokens[p]!r}" for p in drawn}
    clicked = _clicked(picked)
    if clicked in options and clicked != st.session_state.get("paste-clicked"):
        take("token", clicked)  # the click is the newer pick, once
    st.session_state["paste-clicked"] = clicked
    largest = max(drawn, key=lambda p: float(changes.kl[p]))
    position = choice("After the token at position", options, "token", largest)
    panel(top_bars(changes, position), key="likeliest", data=lambda: changes.at(position), notes=tried.run,
          code=f"from workbench.paste_plots import top_bars\n{code}figure = top_bars(changes, {position})")  # fmt: skip
    if position + 1 < len(changes):
        before, after = float(changes.log_prob_before[position]), float(changes.log_prob_after[position])
        text.write(f"The token that follows in the text, {shown_token(changes.tokens[position + 1])}: log-probability "
                   f"{before:.3f} without, {after:.3f} with (nats)")  # fmt: skip


def _clicked(picked: Any) -> int | None:
    points = ((picked or {}).get("selection") or {}).get("points") or []
    data = points[0].get("customdata") if points else None
    data = data[0] if isinstance(data, list | tuple) and data else data
    return int(data) if isinstance(data, int | float) else None


@st.cache_resource(max_entries=16, show_spinner="Running the text without and with the adapter …")
def _changes(name: str, folder: str, stamp: Stamp, settings: PasteSettings, prompt: str, answer: str) -> TokenChanges:
    adapter = settings.of(Adapter.load(folder))
    with held_model(name).alone() as model:
        return token_changes(model, (prompt, answer) if answer else prompt, adapter)


def _code(model: str, folder: str, settings: PasteSettings, first: str) -> str:
    """The lines of a snippet that load the model and the adapter as they are tried."""
    device = f", device={started().device!r}" if started().device else ""
    plain = settings == PasteSettings()
    tried = "workbench.Adapter.load({})" if plain else f"{settings!r}.of(workbench.Adapter.load({{}}))"
    lines = [
        "import workbench", first, *([] if plain else ["from workbench.paste_settings import PasteSettings"]), "",
        f"model = workbench.load({model!r}{device})", f"adapter = {tried.format(repr(folder))}",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def dose(tried: Tried, can_run: bool) -> None:
    """The curve that the run keeps, over its evaluation prompts, and that of the prompt on the page."""
    st.subheader("Dose and response")
    curve = get(tried.metrics, "behaviours", tried.table.name, "dose") or []
    if can_run and tried.prompt.strip():
        st.fragment(text.told(partial(_dose, tried, curve)))()
    elif curve:
        _stored_dose(tried, curve)
    else:
        text.remark("This run keeps no curve: give its job a list of strengths, evaluate.dose.")


def _dose(tried: Tried, curve: list[dict[str, Any]]) -> None:
    n = get(tried.metrics, "behaviours", tried.table.name, "n")
    kept = {"run": f"the run's {n or ''} evaluation prompts, with intervals"} if curve else {}
    if choice("Of", {"prompt": "the first token of the answer to this prompt"} | kept, "curve") == "run":
        return _stored_dose(tried, curve)
    folder, model = path_of(tried, "paste"), tried.model("recipient")
    base = PasteSettings(1.0, tried.settings.layers, tried.settings.positions, tried.settings.schedule)
    openers = tuple(tried.table.openers)
    found = _prompt_dose(model, str(folder), adapter_stamp(folder), base, tried.prompt, openers)
    code = _code(model, str(folder), base, "from workbench.evaluate.dose import prompt_dose")
    code += f"dose = prompt_dose(model, {tried.prompt!r}, adapter, {STEPS!r}, {openers!r})\nfigure = prompt_dose_curve(dose)"
    panel(prompt_dose_curve(found), key="dose", code=f"from workbench.paste_plots import prompt_dose_curve\n{code}",
          data=found.frame, notes=tried.run, remark="one prompt, so there is no interval; the strength of the slider does "
          "not matter here, the layers and positions do")  # fmt: skip


@st.cache_resource(max_entries=16, show_spinner="Running the prompt at several strengths …")
def _prompt_dose(
    name: str, folder: str, stamp: Stamp, settings: PasteSettings, prompt: str, openers: tuple[str, ...]
) -> PromptDose:
    adapter = settings.of(Adapter.load(folder))
    with held_model(name).alone() as model:
        return prompt_dose(model, prompt, adapter, STEPS, openers)


def _stored_dose(tried: Tried, curve: list[dict[str, Any]]) -> None:
    name = tried.table.name
    code = f"""
from workbench.plots import dose_curves
from workbench.summary import load_metrics

metrics = load_metrics({str(tried.run)!r})
figure = dose_curves({{{name!r}: metrics["behaviours"][{name!r}]["dose"]}})
"""
    panel(dose_curves({name: curve}), key="stored", code=code, data=lambda: pd.json_normalize(curve), notes=tried.run,
          remark="mean over the run's evaluation prompts with its 95 % interval; the strength is the adapter's, not a "
          "multiple of it")  # fmt: skip
