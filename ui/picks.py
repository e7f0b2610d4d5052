"""A choice among a few values, which the address of a page carries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamlit as st

from . import text


def choice(label: str, options: Mapping[Any, str], key: str, default: int = 0, **more: Any) -> Any:
    """A pick among {value: how it is shown}, in the page's address as `key`; at least one is given.

    What a link asks for and is not there is refused in so many words; what other picks of the page leave no room for
    gives way to the default.
    """
    asked, shown = st.query_params.get(key), {value: text.shown(words, 120) for value, words in options.items()}
    if asked is not None and asked not in shown.values() and key not in st.session_state:
        text.problem(f"the link asks for {key} {asked!r}, which is not there; it was refused")
    kept, entries, of = key in st.session_state, list(shown.values()), f"{key} options"
    if kept and st.session_state.get(of) != entries:  # other picks of the page changed what there is
        value = st.session_state[key]
        st.session_state[key] = value if value in shown else list(options)[default]
    st.session_state[of] = entries
    # Streamlit wants no default beside a value that is there already
    return st.selectbox(label, list(options), 0 if kept else default, key=key, bind="query-params",
                        format_func=lambda v: shown[v], **more)  # fmt: skip
