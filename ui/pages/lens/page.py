"""What a model would predict if it stopped at each layer: a prompt through a lens, plain and with a paste."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from probes.lens import Lens, site_word
from probes.lens_scores import saved_scores
from probes.lens_table import LensTable, lens_table
from ui import text
from ui.held import held_model
from ui.pages.lens.picked import TOP, Picks, picked
from ui.panels import panel, picked_of
from ui.picks import choice, take
from ui.stamps import Stamp, adapter_stamp, lens_stamp
from workbench.adapters.adapter import Adapter
from workbench.lens_plots import (
    MOST_TOKENS,
    lens_curves,
    lens_difference,
    lens_heatmap,
    lens_scores_curves,
    shared_range,
    token_bars,
)
from workbench.sites import Site

BOTH = "pasted less plain"
SIDE_BY_SIDE = 12
"""tokens up to which two tables stand beside one another"""


def page() -> None:
    st.title("Lens")
    picks = picked()
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


def _tables(picks: Picks) -> dict[str, LensTable]:
    """The plain model's and, with a paste, the pasted model's; ranks in both are then of the pasted model's answers."""
    stamps = (None if picks.lens is None else lens_stamp(picks.lens),
              None if picks.paste is None else adapter_stamp(picks.paste))  # fmt: skip
    return _read(picks.model, picks.prompt, picks.lens, picks.paste, picks.strength, stamps)


@st.cache_data(max_entries=16, show_spinner="Reading every layer …")
def _read(
    name: str, prompt: str, lens: Path | None, paste: Path | None, strength: float, stamps: tuple[Stamp | None, ...]
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
        take("layer", site_word(Site.parse(str(cell[0]))))
        take("at", str(cell[1]))


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
        layer = choice("After layer", reversed(words), "layer")
    with middle:
        at = int(choice("Token, by its place", map(str, reversed(table.positions.tolist())), "at"))
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
