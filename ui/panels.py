"""A panel: a figure, the code that makes it in a notebook, its data as a file, and a line in the run's notes."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
import streamlit as st

from workbench.errors import UserError
from workbench.plots import on_dark

from . import text
from .picks import take

if TYPE_CHECKING:
    import pandas as pd

NOTES = "notes.txt"
CONFIG = {"displaylogo": False, "toImageButtonOptions": {"format": "png", "scale": 2}}


def is_dark() -> bool:
    """Whether the reader's theme is the dark one."""
    return st.context.theme.type == "dark"


def panel(
    figure: go.Figure,
    *,
    key: str,
    code: str,
    data: Callable[[], pd.DataFrame] | None = None,
    notes: Path | None = None,
    select: Sequence[str] = (),
    on_select: Callable[[], None] | None = None,
    remark: str = "",
) -> Any:
    """Draws a figure with what belongs to it; returns what is selected in it where `select` names how (box, lasso, points).

    Args:
        key: of this panel on its page; the name of the files that it exports.
        code: Python that runs as it stands in a notebook and ends with the same figure in `figure`.
        data: makes the table behind the figure, when it is asked for.
        notes: the run folder whose notes.txt a line can be added to.
        on_select: called once at each selection, before the page runs again; `picked_of` says what was clicked.
        remark: how much of the data is drawn, and how it was chosen.
    """
    drawn = on_dark(figure) if is_dark() else figure
    config = CONFIG | {"toImageButtonOptions": {**CONFIG["toImageButtonOptions"], "filename": key}}  # type: ignore[dict-item]
    options: dict[str, Any] = {"key": key, "theme": None, "config": config, "width": "stretch"}
    if select:
        options |= {"on_select": on_select or "rerun", "selection_mode": tuple(select)}
    found = st.plotly_chart(drawn, **options)
    if remark:
        text.remark(remark)
    below = st.container(horizontal=True)
    with below.popover("Code for this figure", icon=":material/code:"):
        st.code(code.strip() + "\n", language="python")
    with below.popover("Export", icon=":material/download:"):
        _export(key, code, data, notes)
    return found if select else None


def take_pair(
    key: str, names: tuple[str, str], made: Callable[[Any, Any], tuple[str, str]] = lambda a, b: (str(a), str(b))
) -> None:
    """Makes the clicked cell of a panel the pick of two selectboxes; made: their values of its customdata."""
    pair = picked_of(key)
    if pair is not None and len(pair) == 2:
        for name, value in zip(names, made(*pair), strict=True):
            take(name, value)


def lines(table: Any, key: str, *, wide: str = "") -> None:
    """A table of results: numbers with four digits, text as text; wide: the column that gets the room."""
    config: dict[str, Any] = {name: st.column_config.NumberColumn(format="%.4g") for name, kind in table.dtypes.items()
                              if kind.kind == "f"}  # fmt: skip
    if wide:
        config[wide] = st.column_config.TextColumn(width="large")
    st.dataframe(table, hide_index=True, width="stretch", key=key, column_config=config)


def picked_of(key: str) -> tuple[Any, ...] | None:
    """The customdata of the point that was clicked in the figure of a panel; None where there is none."""
    state = st.session_state.get(key) or {}
    points = state.get("selection", {}).get("points", [])
    data = points[0].get("customdata") if points else None
    return tuple(data) if isinstance(data, list | tuple) else None


def _export(key: str, code: str, data: Callable[[], pd.DataFrame] | None, notes: Path | None) -> None:
    st.caption("PNG: the camera above the figure.")
    if data is not None:
        st.download_button("CSV", lambda: data().to_csv(index=False).encode(), f"{key}.csv", "text/csv",
                           key=f"{key}-csv", on_click="ignore")  # fmt: skip
        st.download_button("Parquet", lambda: _parquet(data()), f"{key}.parquet", key=f"{key}-parquet",
                           on_click="ignore")  # fmt: skip
    if notes is not None:
        line = st.text_input("A line for the notes of this run", key=f"{key}-note", max_chars=2000)
        if st.button("Add to notes.txt", key=f"{key}-add", disabled=not line.strip()):
            try:
                add_note(notes, key, line)
                st.toast("The line was added to notes.txt")
            except UserError as err:
                text.problem(err)


def add_note(run: Path, about: str, line: str) -> None:
    """Appends one line to notes.txt of a run folder: when, about which figure, what. Raises UserError where it cannot."""
    words = " ".join(line.split())
    stamped = f"{time.strftime('%Y-%m-%d %H:%M')}\t{about}\t{words}\n"
    try:
        handle = os.open(run / NOTES, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as err:
        raise UserError(f"cannot write to {run / NOTES}: {err.strerror}") from err
    try:
        os.write(handle, stamped.encode())
    finally:
        os.close(handle)


def _parquet(table: pd.DataFrame) -> bytes:
    out = io.BytesIO()
    table.to_parquet(out, index=False)
    return out.getvalue()
