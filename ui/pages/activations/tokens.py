"""Rows as tokens in their prompts, in a table whose lines can be clicked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import streamlit as st

from ui import text
from ui.picks import take
from workbench.store import Store
from workbench.store.context import rows_in_context

if TYPE_CHECKING:
    import pandas as pd

MOST = 100
"""lines of a table of tokens: of more, some that are spread evenly over them"""
TEXTS = ("id", "label", "before", "token", "after")
CONFIG: dict[str, Any] = {
    "row": st.column_config.NumberColumn(width=70, format="%d"), "id": st.column_config.TextColumn(width=90),
    "label": st.column_config.TextColumn(width=90), "position": st.column_config.NumberColumn(width=70),
    "before": st.column_config.TextColumn("… before", width=300, alignment="right"),
    "token": st.column_config.TextColumn("token", width=110),
    "after": st.column_config.TextColumn("after …", width=260),
}  # fmt: skip


def spread(rows: Sequence[int]) -> list[int]:
    """At most a hundred of them, evenly spread."""
    n = len(rows)
    return list(rows) if n <= MOST else [rows[i * n // MOST] for i in range(MOST)]


def token_table(
    store: Store, rows: Sequence[int], more: dict[str, Sequence[Any]] | None = None, known: pd.DataFrame | None = None
) -> pd.DataFrame:
    """`rows_in_context`, every text as it is shown; `more` are columns in front."""
    table = rows_in_context(store, list(rows), known=known)
    for name in TEXTS:
        table[name] = ["" if value is None or value != value else text.shown(value, 120) for value in table[name]]
    for i, (name, values) in enumerate((more or {}).items()):
        table.insert(i, name, list(values))
    return table


def pick_line(table: pd.DataFrame, key: str, target: str, column: str = "row", *, height: int = 320) -> None:
    """Shows a table of tokens; a click on a line puts its `column` into the widget with the key `target`."""

    def taken() -> None:
        lines = st.session_state[key].selection.rows
        if lines and lines[0] < len(table):
            take(target, int(table[column].iloc[lines[0]]))

    st.dataframe(table, key=key, hide_index=True, width="stretch", height=height, column_config=CONFIG, on_select=taken,
                 selection_mode="single-row")  # fmt: skip


def selected(event: Any) -> list[int]:
    """The `customdata` of the points of a figure that are selected, ascending, each once."""
    found = set()
    for point in (event or {}).get("selection", {}).get("points", []):
        value = point.get("customdata")
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int):
            found.add(value)
    return sorted(found)
