"""A store at a glance: norms, dimensions that stand out, massive activations."""

from __future__ import annotations

import streamlit as st

from ui import text
from ui.held import open_store
from ui.opened import pick_site
from ui.panels import panel
from ui.stamps import Stamp, store_stamp
from workbench.store import Store
from workbench.store.overview import RULES, StoreOverview, store_overview
from workbench.store_plots import norms_by_layer, norms_by_position, outlier_dimensions

VALUES = 24 << 20
"""values that an overview reads at most: what is done in about a second"""
HEAD = """from workbench.store import Store
from workbench.store.overview import store_overview
from workbench.store_plots import {figure}

overview = store_overview(Store.open({path!r}), {rows})
figure = {figure}(overview{site})
"""


def view(store: Store) -> None:
    """What the store holds, and four panels of numbers from a sample of it."""
    rows = rows_of_sample(store)
    found = _overview(str(store.path), store_stamp(store), rows)
    _facts(found)
    with st.columns(3)[0]:
        site = pick_site(store)

    def code(figure: str, named: bool) -> str:
        return HEAD.format(figure=figure, path=str(store.path), rows=rows, site=f", {site!r}" if named else "")

    left, right = st.columns(2)
    with left:
        st.subheader("Norms by layer")
        panel(norms_by_layer(found), key="norms", code=code("norms_by_layer", False), data=lambda: found.norms,
              remark=f"Bands: the middle half and the middle 90 % of {found.sample}.")  # fmt: skip
    with right:
        st.subheader("Norms by position")
        panel(norms_by_position(found, site), key="positions", code=code("norms_by_position", True),
              data=lambda: found.positions, remark=f"At {site}; {found.sample}.")  # fmt: skip
    left, right = st.columns(2)
    with left:
        st.subheader("Outlier dimensions")
        panel(outlier_dimensions(found, site), key="dimensions", code=code("outlier_dimensions", True),
              data=lambda: found.dimensions, remark=f"{len(found.outliers)} at all sites. {RULES[0]}")  # fmt: skip
    with right:
        st.subheader("Massive activations")
        _massive(found)


def rows_of_sample(store: Store) -> int:
    """Fewer rows of each site where a store has many or wide ones."""
    width = sum(store.width(site) for site in store.sites)
    return max(100, min(2000, VALUES // width))


@st.cache_data(max_entries=8, show_spinner="Reading a sample of rows …")
def _overview(path: str, stamp: Stamp, rows: int) -> StoreOverview:
    return store_overview(open_store(path), rows)


def _facts(found: StoreOverview) -> None:
    import pandas as pd

    told = [(name, text.shown(value)) for name, value in found.facts() if name != "sample"]  # every panel says it
    st.dataframe(pd.DataFrame(told, columns=["fact", "this store"]), hide_index=True, width="stretch",
                 column_config={"fact": st.column_config.TextColumn(width=80)})  # fmt: skip


def _massive(found: StoreOverview) -> None:
    table = found.massive.assign(token=[text.shown("" if t is None else t, 60) for t in found.massive["token"]])
    elsewhere, first = table[~table["first"]], table[table["first"]]
    columns = ["site", "row", "position", "token", "dim", "value", "ratio"]
    st.markdown("Beyond the first position")
    if len(elsewhere):
        st.dataframe(elsewhere[columns], hide_index=True, width="stretch", height=200)
    else:
        st.text("none in the sample")
    st.markdown("At position 0")
    if len(first):
        by = first.groupby(["site", "dim"], sort=False)["value"].agg(["count", "median"]).reset_index()
        st.dataframe(by.rename(columns={"median": "median value", "count": "rows"}), hide_index=True, width="stretch",
                     height=min(200, 40 + 36 * len(by)))  # fmt: skip
    else:
        st.text("none in the sample" if found.first else "the store has no rows at position 0")
    text.remark(f"{found.told_apart}. {RULES[1]} Of {found.sample}.")
