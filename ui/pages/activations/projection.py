"""Rows of a site in a plane, linked to their tokens and to their nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import streamlit as st

from probes.neighbours import METRICS, Neighbours, nearest_rows
from probes.projection import METHODS, Projection, has_umap, project_rows, stratified_rows
from probes.row_scores import RowScores
from ui import text
from ui.held import open_store, rows_of
from ui.opened import pick_site
from ui.pages.activations import probe_scores
from ui.pages.activations.probe_scores import SCORE, Reader
from ui.pages.activations.tokens import CONFIG, pick_line, selected, spread, token_table
from ui.panels import panel
from ui.picks import choice
from ui.stamps import Stamp, store_stamp
from workbench.store import Store
from workbench.store.context import row_frame
from workbench.store_plots import projection_scatter

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

SIZES = ("2000", "5000", "20000", "50000", "100000")
STRATA = {"row": "evenly over all rows", "prompt": "as many of each prompt", "position": "as many of each position",
          "label": "as many of each label"}  # fmt: skip
COLOURS = ("label", "position", "token", "prompt", "id", "norm")
FIRST = "The first token of a prompt can have activations so large that all others lie in one spot."
CODE = """{imports}from probes.projection import project_rows, stratified_rows
from workbench.store import Store
from workbench.store.context import row_frame
from workbench.store_plots import projection_scatter

store = Store.open({path!r})
rows = stratified_rows(store, {n}, by={by!r}, first={first!r})
plane = project_rows(store, {site!r}, rows, {method!r})
table = row_frame(store, rows).assign(norm=plane.norms.numpy())
{scores}figure = projection_scatter(plane, table, {colour})
"""
NEAR = """from probes.neighbours import nearest_rows
from workbench.store import Store
from workbench.store.context import rows_in_context

store = Store.open({path!r})
found = nearest_rows(store, {site!r}, {row}, {k}, metric={metric!r}, other_prompts={others!r})
table = rows_in_context(store, found.rows).assign(score=found.scores)
"""


@dataclass(frozen=True)
class Picks:
    """What is drawn; `key` is what its results are kept by."""

    path: str
    stamp: Stamp
    n: int
    by: str
    first: bool | None

    @property
    def key(self) -> tuple[Any, ...]:
        return self.path, self.stamp, self.n, self.by, self.first


def view(store: Store) -> None:
    """The picks, the plane, and below it the tokens that are selected in it."""
    _linked(str(store.path))


@st.fragment
@text.told
def _linked(path: str) -> None:
    store = open_store(path)
    columns = st.columns([3, 2, 2, 2, 3, 3], vertical_alignment="bottom")
    with columns[0]:
        site = pick_site(store)
    with columns[1]:
        method = choice("Method", METHODS, "method")
    with columns[2]:
        n = int(choice("Points", SIZES, "points", "5000"))
    with columns[3]:
        by = choice("Drawn by", STRATA.keys(), "by")
    with columns[5]:
        first = st.checkbox("position 0 too", key="first", bind="query-params", help=FIRST)
    picks = Picks(path, store_stamp(store), n, by, None if first else False)
    rows, table = _drawn(*picks.key)
    if len(rows) < 2:
        text.write("No two rows are left to draw: this store has few or none beyond position 0.")
        return
    with columns[4]:
        colour = str(choice("Coloured by", [*colours(table), SCORE], "colour"))
    if method == "umap" and not has_umap():
        text.missing("UMAP needs the package umap-learn, which is not installed.", "pip install umap-learn")
        return
    reader = probe_scores.picked(store, site) if colour == SCORE else None
    if colour == SCORE and reader is None:
        return
    plane = _projected(*picks.key, site, method)
    figure, colour, table = _coloured(picks, site, method, colour, reader, table)
    event = panel(figure, key="plane", code=_code(picks, site, method, colour, reader),
                  data=lambda: plane.frame().merge(table, on="row"), select=("box", "lasso", "points"),
                  remark=f"{plane.remark}; drawn {STRATA[by]}." + ("" if reader is None else f" {probe_scores.told(reader)}"),
                  )  # fmt: skip
    _selection(path, site, rows.tolist(), table, event, "" if reader is None else colour)


def _coloured(
    picks: Picks, site: str, method: str, colour: str, reader: Reader | None, table: pd.DataFrame
) -> tuple[go.Figure, str, pd.DataFrame]:
    """The figure, the column that it is coloured by, and the table with that column."""
    if reader is None:
        return _figure(*picks.key, site, method, colour), colour, table
    scores = _scores(*picks.key, reader)
    made = _figure(*picks.key, site, method, scores.name, reader)
    return made, scores.name, table.assign(**{scores.name: scores.scores.numpy()})


def _code(picks: Picks, site: str, method: str, colour: str, reader: Reader | None) -> str:
    """The code of the figure."""
    scored = "" if reader is None else f"{reader.code}table[scores.name] = scores.scores.numpy()\n"
    return CODE.format(path=picks.path, n=picks.n, by=picks.by, first=picks.first, site=site, method=method, scores=scored,
                       colour=repr(colour) if reader is None else "scores.name",
                       imports="" if reader is None else reader.imports)  # fmt: skip


def _selection(path: str, site: str, drawn: list[int], table: pd.DataFrame, event: Any, score: str) -> None:
    """The tokens that are selected in the figure, or some of all; score: the column of a probe, where there is one."""
    place = {row: i for i, row in enumerate(drawn)}
    chosen = [row for row in selected(event) if row in place]
    shown = spread(chosen or drawn)
    st.subheader("Tokens in context")
    if chosen:
        text.remark(f"{len(shown):,} of {len(chosen):,} selected rows, spread evenly over them.")
    else:
        text.remark(f"Nothing is selected: {len(shown):,} of {len(drawn):,} rows. Select with the box or the lasso.")
    known = table.iloc[[place[row] for row in shown]]
    _tokens(path, site, shown, known, {"score": known[score].round(3).tolist()} if score else {})


def colours(table: pd.DataFrame) -> list[str]:
    """The columns that points can be coloured by: those that say anything."""
    named = [name for name in table.columns if name in COLOURS or name.startswith("meta.")]
    there = [name for name in named if table[name].notna().any()]
    return sorted([*there, "norm"], key=lambda name: COLOURS.index(name) if name in COLOURS else len(COLOURS))


@st.cache_data(max_entries=8, show_spinner="Drawing rows …")
def _drawn(path: str, stamp: Stamp, n: int, by: str, first: bool | None) -> tuple[Any, pd.DataFrame]:
    store = open_store(path)
    rows = stratified_rows(store, n, by, first=first)
    return rows, row_frame(store, rows)


@st.cache_data(max_entries=16, show_spinner="Projecting …")
def _projected(path: str, stamp: Stamp, n: int, by: str, first: bool | None, site: str, method: str) -> Projection:
    rows, _ = _drawn(path, stamp, n, by, first)
    return project_rows(rows_of(path), site, rows, method)


@st.cache_data(max_entries=16, show_spinner="Reading rows with the probe …")
def _scores(path: str, stamp: Stamp, n: int, by: str, first: bool | None, reader: Reader) -> RowScores:
    rows, _ = _drawn(path, stamp, n, by, first)
    return probe_scores.scored(reader, rows)


@st.cache_resource(max_entries=8, show_spinner=False)
def _figure(
    path: str, stamp: Stamp, n: int, by: str, first: bool | None, site: str, method: str, colour: str,
    reader: Reader | None = None,
) -> go.Figure:  # fmt: skip
    """Nobody changes it: `panel` draws a copy on a dark page."""
    _, table = _drawn(path, stamp, n, by, first)
    plane = _projected(path, stamp, n, by, first, site, method)
    table = table.assign(norm=plane.norms.numpy())
    if reader is not None:
        table[colour] = _scores(path, stamp, n, by, first, reader).scores.numpy()
    return projection_scatter(plane, table, colour)


@st.fragment
@text.told
def _tokens(path: str, site: str, shown: list[int], known: pd.DataFrame, more: dict[str, list[float]]) -> None:
    """The tokens, and the neighbours of the one that is clicked."""
    store = open_store(path)
    pick_line(token_table(store, shown, more, known), "tokens", "row")
    st.subheader("Nearest neighbours")
    columns = st.columns([2, 2, 2, 3, 4], vertical_alignment="bottom")
    with columns[0]:
        row = st.number_input("Row", 0, store.n_rows - 1, value=None, key="row", bind="query-params",
                              placeholder="click a line above")  # fmt: skip
    with columns[1]:
        metric = choice("Nearness", METRICS, "metric")
    with columns[2]:
        k = int(choice("Neighbours", ("5", "10", "20", "50"), "k", "10"))
    with columns[3]:
        others = st.checkbox("of other prompts only", key="others", bind="query-params")
    if row is None:
        text.remark(
            f"Of all {store.n_rows:,} rows at {site}: click a line of the table above, or give the number of a row."
        )
        return
    found = _near(path, store_stamp(store), site, int(row), k, metric, others)
    _neighbours(store, int(row), found, NEAR.format(path=path, site=site, row=row, k=k, metric=metric, others=others))


@st.cache_data(max_entries=64, show_spinner="Comparing all rows …")
def _near(path: str, stamp: Stamp, site: str, row: int, k: int, metric: str, others: bool) -> Neighbours:
    return nearest_rows(rows_of(path), site, row, k, metric=metric, other_prompts=others)


def _neighbours(store: Store, row: int, found: Neighbours, code: str) -> None:
    frame = found.frame()
    name = frame.columns[1]
    table = token_table(store, [row, *frame["row"]], {name: [None, *frame[name].round(4)]})
    st.dataframe(table, hide_index=True, width="stretch", key="near", column_config=CONFIG)
    unit = "cosine similarity" if found.metric == "cosine" else "Euclidean distance, activation units"
    text.remark(f"The row itself, then the nearest of {found.searched:,} rows at {found.site} ({unit}).")
    with st.popover("Code for this table", icon=":material/code:"):
        st.code(code.strip() + "\n", language="python")
