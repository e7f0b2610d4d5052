"""What a model would predict if it stopped at each layer: a prompt through a lens, plain and with a paste."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from probes.lens import Lens, site_word
from probes.lens_scores import saved_scores
from probes.lens_table import LensTable, lens_table
from ui import text
from ui.held import held_model, open_store
from ui.opened import contents
from ui.panels import panel, picked_of
from ui.picks import choice
from ui.settings import settings
from workbench.adapters.adapter import Adapter
from workbench.catalogue import Entry
from workbench.fingerprint import difference_of
from workbench.lens_plots import (
    MOST_TOKENS,
    VALUES,
    lens_curves,
    lens_difference,
    lens_heatmap,
    lens_scores_curves,
    shared_range,
    token_bars,
)
from workbench.sites import Site

BUNDLED = ("bundled:recipient", "bundled:donor")
EXAMPLE = "i want to break the chair of the baker ?"
LOGIT, NOTHING, TYPED, BOTH = "logit lens", "none", "typed here", "pasted less plain"
FIT = "workbench lens {model} --fit --prompts FILE --out {folder}/lens"
MOST_PROMPTS, MOST_SIGNS, TOP, SIDE_BY_SIDE = 500, 20_000, 10, 12


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


def page() -> None:
    st.title("Lens")
    picks = _picks()
    if picks is None:
        return
    tables = _tables(picks)
    _overview(picks, tables)
    site, position = _cell(tables["plain"])
    left, right = st.columns(2)
    with left:
        _curves(picks, tables, position)
    with right:
        _likeliest(picks, tables, site, position)
    _curves(picks, tables, None)
    if picks.lens is not None:
        _worth(picks.lens)


def _picks() -> Picks | None:
    """The picks in the page's address; None, and a word on what is missing, where there is no prompt."""
    first, second, third, fourth = st.columns(4)
    with first:
        model = _among("Model", dict.fromkeys([*BUNDLED, *settings().models]), "model")
    mine = held_model(model).model.fingerprint
    with second:
        lens = _of_model("Lens", "lens", LOGIT, mine)
    with third:
        paste = _of_model("With an adapter or paste", "adapter", NOTHING, mine)
    with fourth:
        value = choice("Colour", VALUES, "colour")
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


def _among(label: str, names: Iterable[str], key: str) -> str:
    """A pick among names."""
    return str(choice(label, {name: name for name in names}, key))


def _of_model(label: str, kind: str, none: str, fingerprint: dict[str, str]) -> Entry | None:
    """A lens or an adapter of the opened folder that belongs to the model; None for the first option."""
    found = contents().of(kind)
    for entry in found:
        if entry.state == "damaged":
            text.problem(f"{entry.name}: {entry.note}")
    bases = {e.name: e.facts.get("base") or e.facts.get("about", {}).get("base") or {} for e in found}
    bases = {name: {str(key): str(value) for key, value in base.items()} for name, base in bases.items()}
    fit = {e.name: e for e in found if bases[e.name] and difference_of(bases[e.name], fingerprint) is None}
    picked = _among(label, [none, *fit], kind)
    if not fit:
        text.remark(f"No {kind} in the opened folder belongs to this model.")
    return fit.get(picked)


def _prompt(model: str) -> str | None:
    """What is read: typed, or one of a store's prompts; as JSON."""
    stores = [entry for entry in contents().of("store") if entry.state != "damaged"]
    source = _among("Prompt", [TYPED, *(entry.name for entry in stores)], "from")
    if source != TYPED:
        rows = _prompts(next(str(entry.path) for entry in stores if entry.name == source))
        number = int(_among(f"Prompt of the store (the first {len(rows)})", map(str, range(len(rows))), "prompt"))
        text.write(rows[number], 2000)
        return rows[number]
    left, right = st.columns([5, 1])
    typed = left.text_area("Text", EXAMPLE if model in BUNDLED else "", key="text", bind="query-params", height=80,
                           max_chars=MOST_SIGNS)  # fmt: skip
    plain = right.toggle("as it stands", key="plain", bind="query-params", help="Without the model's chat template.")
    if not typed.strip():
        text.missing("No prompt: type one above, or pick one of a store's.", f'workbench lens {model} --text "..."')
        return None
    return json.dumps({"text" if plain else "prompt": typed}, ensure_ascii=False)


@st.cache_data(max_entries=4, show_spinner=False)
def _prompts(store: str) -> list[str]:
    """The first prompts of a store, as rows of JSON."""
    read = open_store(store).prompt_set()[:MOST_PROMPTS]
    return [json.dumps({"text" if p.messages is None else "messages": p.content}, ensure_ascii=False) for p in read]


def _stamp(folder: Path | None) -> int:
    """Changes where an artefact was replaced."""
    return 0 if folder is None else max((p.stat().st_mtime_ns for p in folder.iterdir()), default=0)


def _tables(picks: Picks) -> dict[str, LensTable]:
    """The plain model's and, with a paste, the pasted model's; ranks in both are then of the pasted model's answers."""
    return _read(
        picks.model, picks.prompt, picks.lens, _stamp(picks.lens), picks.paste, _stamp(picks.paste), picks.strength
    )


@st.cache_data(max_entries=16, show_spinner="Reading every layer …")
def _read(
    name: str, prompt: str, lens: Path | None, _lens: int, paste: Path | None, _paste: int, strength: float
) -> dict[str, LensTable]:
    options: dict[str, Any] = {"last": MOST_TOKENS, "top": TOP}
    used = Lens() if lens is None else Lens.load(lens)
    with held_model(name).alone() as model:
        if paste is None:
            return {"plain": lens_table(model, json.loads(prompt), used, **options)}
        pasted = lens_table(model, json.loads(prompt), used, adapter=Adapter.load(paste) * strength, **options)
        plain = lens_table(model, json.loads(prompt), used, answers=pasted.answers, **options)
    return {"plain": plain, "pasted": pasted}


def _take(key: str) -> None:
    """Makes the cell of a table that was clicked the picked one."""
    cell = picked_of(key)
    if cell is not None:
        st.session_state["layer"], st.session_state["at"] = site_word(Site.parse(str(cell[0]))), str(cell[1])


def _overview(picks: Picks, tables: dict[str, LensTable]) -> None:
    """Layers and tokens, coloured; before and after a paste and their difference."""
    frames = {name: table.frame() for name, table in tables.items()}
    low, high = shared_range(list(frames.values()), picks.value)
    ends = f"lens_plots.shared_range([{', '.join(f'{name}.frame()' for name in frames)}], {picks.value!r})"
    of = tables["plain"]
    said = "" if len(of) < MOST_TOKENS else f"The last {len(of)} tokens. "
    said += "A cell shows the likeliest next token after that layer; click it for the others."
    wide = len(of) <= SIDE_BY_SIDE and len(frames) > 1
    places = st.columns(len(frames)) if wide else [st.container() for _ in frames]
    for place, (name, frame) in zip(places, frames.items(), strict=True):
        with place:
            code = (f"{picks.code}low, high = {ends}\nfigure = lens_plots.lens_heatmap({name}.frame(), {picks.value!r}, "
                    f"title={name!r}, low=low, high=high)")  # fmt: skip
            panel(lens_heatmap(frame, picks.value, title=name, low=low, high=high), key=f"{name}-table", code=code,
                  data=lambda frame=frame: frame, select=("points",), on_select=partial(_take, f"{name}-table"),
                  remark=said)  # fmt: skip
    if "pasted" in frames:
        made = f"lens_plots.lens_difference(plain.frame(), pasted.frame(), {picks.value!r}, title={BOTH!r})"
        code = f"{picks.code}figure = {made}"
        panel(lens_difference(frames["plain"], frames["pasted"], picks.value, title=BOTH),
              key="difference-table", code=code, data=lambda: _both(frames), select=("points",),
              on_select=partial(_take, "difference-table"),
              remark="Answers, of which ranks and probabilities are, are the pasted model's own in both.")  # fmt: skip


def _both(frames: dict[str, pd.DataFrame]) -> pd.DataFrame:
    return pd.concat([frame.assign(model=name) for name, frame in frames.items()], ignore_index=True)


def _cell(table: LensTable) -> tuple[str, int]:
    """The picked cell: its site and its token's place."""
    words = {site_word(site): str(site) for site in table.sites}
    left, middle, right = st.columns(3)
    with left:
        layer = _among("After layer", reversed(words), "layer")
    with middle:
        at = int(_among("Token, by its place", map(str, reversed(table.positions.tolist())), "at"))
    with right:
        st.caption("The token")
        text.write(table.texts[int(table.ids[table.positions.tolist().index(at)])], 100)
    return words[layer], at


def _curves(picks: Picks, tables: dict[str, LensTable], position: int | None) -> None:
    """By layer: of one token, or of all."""
    frames = {name: table.frame() for name, table in tables.items()}
    named = "{" + ", ".join(f"{name!r}: {name}.frame()" for name in frames) + "}"
    values = ("entropy", "answer_rank") if position is not None else ("entropy", "kl", "answer_rank")
    st.subheader("By layer, at this token" if position is not None else "By layer, over all tokens shown")
    made = f"lens_plots.lens_curves({named}, {values!r}, position={position})"
    panel(lens_curves(frames, values, position=position), key="over-tokens" if position is None else "at-token",
          code=f"{picks.code}figure = {made}", data=lambda: _both(frames),
          remark="" if position is not None else
          "Lines: the mean, and of the rank the median. Bands: the middle half of the tokens.")  # fmt: skip


def _likeliest(picks: Picks, tables: dict[str, LensTable], site: str, position: int) -> None:
    st.subheader("Likeliest next, in this cell")
    tops = {name: table.top(site, position) for name, table in tables.items()}
    named = "{" + ", ".join(f"{name!r}: {name}.top({site!r}, {position})" for name in tables) + "}"
    panel(token_bars(tops), key="tokens", code=f"{picks.code}figure = lens_plots.token_bars({named})",
          data=lambda: _both(tops))  # fmt: skip


def _worth(folder: Path) -> None:
    """How near the picked lens comes to the model, as it was measured when it was fitted."""
    found = saved_scores(Lens.load(folder))
    if found.empty:
        return text.remark("This lens was saved without figures of its own.")
    st.subheader("What the tuned lens is worth")
    code = (f"from probes.lens import Lens\nfrom probes.lens_scores import saved_scores\nfrom workbench import lens_plots\n\n"
            f"figure = lens_plots.lens_scores_curves(saved_scores(Lens.load({str(folder)!r})))")  # fmt: skip
    panel(lens_scores_curves(found), key="worth", code=code, data=lambda: found,
          remark="start: the closed form, before the fit. Bars: 95 % intervals over prompts that neither fit nor stopping "
                 "saw.")  # fmt: skip
