"""Cached activations: a store at a glance, its rows in a plane, their tokens and neighbours, and two models side by side."""

from __future__ import annotations

import streamlit as st

from ui import text
from ui.opened import pick_store
from ui.pages.activations import overview, pairs, projection
from ui.picks import choice

VIEWS = {"overview": overview.view, "projection": projection.view, "two models": pairs.view}


def page() -> None:
    st.title("Activations")
    left, right = st.columns([2, 3], vertical_alignment="bottom")
    with left:
        store = pick_store()
    if store is None:
        return
    with right:
        name = choice("View", VIEWS.keys(), "view")
    text.write(f"{store.name} · {store.n_rows:,} rows · {len(store.sites)} sites · {store.dtype}", 300)
    VIEWS[name](store)
