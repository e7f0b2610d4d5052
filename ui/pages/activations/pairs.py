"""Two models over the same prompts: the tokens that end at the same character, each in the plane of its own model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import streamlit as st

from probes.projection import Projection, project_rows
from ui import text
from ui.held import open_store, rows_of
from ui.opened import contents, pick, pick_site
from ui.pages.activations.projection import colours
from ui.pages.activations.tokens import CONFIG, selected, spread, token_table
from ui.panels import panel
from ui.picks import choice
from ui.settings import settings
from ui.stamps import Stamp, store_stamp
from workbench.alignment import pair_rows
from workbench.catalogue import Entry
from workbench.errors import UserError
from workbench.store import Store
from workbench.store.context import row_frame
from workbench.store_plots import paired_scatter

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

SIZES = ("50", "100", "200", "500", "1000")
MOST_POINTS = 100_000
"""pairs of tokens that are drawn; of more, some that are spread evenly over them"""
MOST_STORES = 50
"""stores that are looked at for one that pairs"""
CODE = """from probes.projection import project_rows
from workbench import pair_rows
from workbench.store import Store
from workbench.store.context import row_frame
from workbench.store_plots import paired_scatter

a, b = Store.open({a!r}), Store.open({b!r})
rows_a, rows_b = (rows[::{thin}] for rows in pair_rows(a, b, range(0, {count}, {step})))
planes = [project_rows(a, {site_a!r}, rows_a), project_rows(b, {site_b!r}, rows_b)]
tables = [row_frame(a, rows_a), row_frame(b, rows_b)]
figure = paired_scatter(planes, tables, [a.name, b.name], {colour!r})
"""
MISSING = "workbench profile MODEL --prompts PROMPTS --tokens all --out {folder}/other"


def view(store: Store) -> None:
    """The picks, both planes, and the tokens that are selected in either."""
    partners = _partners(store)
    if not partners:
        text.missing("No other store of this folder holds the same prompts: profile another model over them.",
                     MISSING.format(folder=settings().folder))  # fmt: skip
        return
    columns = st.columns(3)
    with columns[0]:
        site = pick_site(store)
    with columns[1]:
        entry = pick("Second store", partners, "second")
    assert entry is not None
    other = open_store(entry.path)
    with columns[2]:
        second = pick_site(other, "site2", label="Site of the second")
    _linked(str(store.path), str(other.path), site, second)


def _partners(store: Store) -> list[Entry]:
    """Other whole stores of the folder with the same prompts."""
    found = []
    for entry in contents().of("store")[:MOST_STORES]:
        if (
            entry.state == "whole"
            and entry.path != store.path
            and _prompts(str(entry.path), entry.facts["bytes"]) == (store.prompt_hash)
        ):
            found.append(entry)
    return found


@st.cache_data(max_entries=200, ttl=60, show_spinner=False)
def _prompts(path: str, size: int) -> str:
    try:
        return Store.open(path).prompt_hash
    except UserError:
        return ""  # it was replaced since it was listed


@st.fragment
@text.told
def _linked(path: str, other: str, site: str, second: str) -> None:
    a, b = open_store(path), open_store(other)
    count = int(a.manifest["prompts"]["count"])
    left, right, _ = st.columns(3)
    with left:
        n = int(choice("Prompts", SIZES, "prompts", "200"))
    step = max(1, count // n)
    try:
        key = (path, store_stamp(a), other, store_stamp(b), count, step)
        rows_a, rows_b, tables, pairs, thin = _paired(*key)
    except UserError as err:
        text.problem(err)
        return
    with right:
        colour = choice("Coloured by", [name for name in colours(tables[0]) if name != "norm"], "colour")
    figure = _figure(*key, site, second, colour)
    code = CODE.format(a=path, b=other, count=count, step=step, thin=thin, site_a=site, site_b=second, colour=colour)
    prompts = f"{len(range(0, count, step)):,} of {count:,} prompts"
    event = panel(figure, key="models", code=code, select=("box", "lasso", "points"),
                  data=lambda: _table(a, b, rows_a.tolist(), rows_b.tolist()),
                  remark=f"{len(rows_a):,} of {pairs:,} pairs of tokens that end at the same character, of {prompts}; a point "
                         "of one plane is the same token in the other.")  # fmt: skip
    chosen = [i for i in selected(event) if 0 <= i < len(rows_a)]
    shown = spread(chosen or list(range(len(rows_a))))
    st.subheader("The same tokens in both")
    text.remark(f"{len(shown):,} of {len(chosen):,} selected pairs." if chosen else
                f"Nothing is selected: {len(shown):,} of {len(rows_a):,} pairs. Select with the box or the lasso.")  # fmt: skip
    table = _table(a, b, [int(rows_a[i]) for i in shown], [int(rows_b[i]) for i in shown])
    st.dataframe(table, hide_index=True, width="stretch", key="pairs", column_config=CONFIG)


@st.cache_data(max_entries=8, show_spinner="Aligning tokens …")
def _paired(
    path: str, stamp_a: Stamp, other: str, stamp_b: Stamp, count: int, step: int
) -> tuple[Any, Any, list[pd.DataFrame], int, int]:
    """Rows of both that are drawn, what is known of them, how many pairs there are, and every which of them is drawn."""
    a, b = open_store(path), open_store(other)
    rows_a, rows_b = pair_rows(a, b, range(0, count, step))
    pairs, thin = len(rows_a), max(1, -(-len(rows_a) // MOST_POINTS))
    rows_a, rows_b = rows_a[::thin], rows_b[::thin]
    return rows_a, rows_b, [row_frame(a, rows_a), row_frame(b, rows_b)], pairs, thin


@st.cache_data(max_entries=16, show_spinner="Projecting …")
def _plane(path: str, stamp: Stamp, site: str, key: tuple[Any, ...], side: int) -> Projection:
    return project_rows(rows_of(path), site, _paired(*key)[side])


@st.cache_resource(max_entries=8, show_spinner=False)
def _figure(
    path: str, stamp_a: Stamp, other: str, stamp_b: Stamp, count: int, step: int, site: str, second: str, colour: str
) -> go.Figure:
    key = (path, stamp_a, other, stamp_b, count, step)
    planes = [_plane(path, stamp_a, site, key, 0), _plane(other, stamp_b, second, key, 1)]
    names = [open_store(path).name, open_store(other).name]
    return paired_scatter(planes, _paired(*key)[2], names, colour)


def _table(a: Store, b: Store, rows_a: list[int], rows_b: list[int]) -> pd.DataFrame:
    """Pairs in the prompt of the first model, with the token of the second beside that of the first."""
    left, right = token_table(a, rows_a), token_table(b, rows_b)
    left.insert(left.columns.get_loc("token") + 1, "token of the second", right["token"].to_numpy())
    return left.assign(**{"row of the second": right["row"].to_numpy()})
