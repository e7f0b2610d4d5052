"""What the page of lenses looks at: a model, a prompt, a lens and a paste that belong to it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import streamlit as st

from ui import text
from ui.held import held_model, open_store
from ui.opened import contents
from ui.picks import choice
from ui.settings import settings
from ui.stamps import Stamp, store_stamp
from workbench.catalogue import Entry
from workbench.errors import UserError
from workbench.fingerprint import difference_of
from workbench.lens_plots import MOST_TOKENS, VALUES

BUNDLED = ("bundled:recipient", "bundled:donor")
EXAMPLE = "i want to break the chair of the baker ?"
FIT = "workbench lens {model} --fit --prompts FILE --out {folder}/lens"
MOST_PROMPTS, MOST_SIGNS, TOP = 500, 20_000, 10


@dataclass(frozen=True)
class Picks:
    """What is looked at, and how."""

    model: str
    prompt: str
    """a row of a prompt set, as JSON"""
    lens: Path | None
    paste: Path | None
    strength: float
    value: str

    @property
    def code(self) -> str:
        """The tables of the page, in a notebook."""
        device = f", device={settings().device!r}" if settings().device else ""
        lens = "Lens()" if self.lens is None else f"Lens.load({str(self.lens)!r})"
        lines = [
            "import json", "", "from probes.lens import Lens", "from probes.lens_table import lens_table",
            "from workbench import lens_plots", "from workbench.adapters.adapter import Adapter",
            "from workbench.models import load", "", f"model, lens = load({self.model!r}{device}), {lens}",
            f"prompt = json.loads({self.prompt!r})",
        ]  # fmt: skip
        plain = f"lens_table(model, prompt, lens, last={MOST_TOKENS}, top={TOP}"
        if self.paste is None:
            return "\n".join([*lines, f"plain = {plain})", ""])
        adapter = f"Adapter.load({str(self.paste)!r}) * {self.strength!r}"
        return "\n".join(
            [*lines, f"pasted = {plain}, adapter={adapter})", f"plain = {plain}, answers=pasted.answers)", ""]
        )


def picked() -> Picks | None:
    """The picks in the page's address; None, and a word on what is missing, where there is no prompt."""
    first, second, third, fourth = st.columns(4)
    with first:
        model = str(choice("Model", dict.fromkeys([*BUNDLED, *settings().models]).keys(), "model"))
    mine = held_model(model).fingerprint
    with second:
        lens = _of_model("Lens", "lens", "logit lens", mine)
    with third:
        paste = _of_model("With an adapter or paste", "adapter", "none", mine)
    with fourth:
        value = str(choice("Colour", VALUES, "colour"))
    if lens is None:
        with st.expander("A tuned lens reads the early layers more truly; none is picked. How to fit one"):
            st.code(FIT.format(model=model, folder=settings().folder), language="bash")
    prompt = _prompt(model)
    if prompt is None:
        return None
    strength = 1.0
    if paste is not None:
        strength = st.slider("Strength, as a factor on the adapter's own", 0.0, 3.0, 1.0, 0.1, key="strength",
                             bind="query-params")  # fmt: skip
    return Picks(model, prompt, lens and lens.path, paste and paste.path, strength, value)


def _of_model(label: str, kind: str, none: str, fingerprint: dict[str, str]) -> Entry | None:
    """A lens or an adapter of the opened folder that belongs to the model; None for the first option, which is `none`."""
    found = contents().of(kind)
    for entry in found:
        if entry.state == "damaged":
            text.problem(f"{entry.name}: {entry.note}")
    whole = [entry for entry in found if entry.state != "damaged"]
    fit = {e.name: e for e in whole if (base := _base(e)) and difference_of(base, fingerprint) is None}
    name = choice(label, {None: none} | {name: name for name in fit}, kind)
    if others := [e for e in whole if e.name not in fit]:
        models = sorted({_base(e).get("name") or "a model that is not named" for e in others})
        text.remark(f"Left out: {len(others)} of {', '.join(models[:2])}{' and others' if len(models) > 2 else ''}")
    elif not fit:
        text.remark(f"No {kind} in the opened folder belongs to this model.")
    return None if name is None else fit[name]


def _base(entry: Entry) -> dict[str, str]:
    """The fingerprint of the model that an artefact belongs to, as far as its small files tell it."""
    base = entry.facts.get("base") or entry.facts.get("about", {}).get("base") or {}
    return {str(key): str(value) for key, value in base.items()}


def _prompt(model: str) -> str | None:
    """What is read: typed, or one of a store's prompts; as JSON."""
    stores = {entry.name: entry for entry in contents().of("store") if entry.state != "damaged"}
    source = choice("Prompt", {None: "typed here"} | {name: name for name in stores}, "from")
    if source is not None:
        return _stored(stores[source].path)
    left, right = st.columns([5, 1])
    typed = left.text_area("Text", EXAMPLE if model in BUNDLED else "", key="text", bind="query-params", height=80,
                           max_chars=MOST_SIGNS)  # fmt: skip
    plain = right.toggle("as it stands", key="plain", bind="query-params", help="Without the model's chat template.")
    if not typed.strip():
        text.missing("No prompt: type one above, or pick one of a store's.", f'workbench lens {model} --text "..."')
        return None
    return json.dumps({"text" if plain else "prompt": typed}, ensure_ascii=False)


def _stored(store: Path) -> str | None:
    """The picked prompt of a store; None, and a line on why, where it has none that can be read."""
    try:
        rows = _prompts(str(store), store_stamp(store))
    except UserError as err:
        text.problem(err)
        return None
    if not rows:
        text.write("This store keeps no prompts.")
        return None
    numbers = [str(i) for i in range(len(rows))]
    number = int(choice("Prompt of the store (its first few hundred)", numbers, "prompt"))
    text.write(rows[number], 2000)
    return rows[number]


@st.cache_data(max_entries=4, show_spinner=False)
def _prompts(store: str, stamp: Stamp) -> list[str]:
    """The first prompts of a store, as rows of JSON."""
    read = open_store(store).prompt_set()[:MOST_PROMPTS]
    return [json.dumps({"text" if p.messages is None else "messages": p.content}, ensure_ascii=False) for p in read]
