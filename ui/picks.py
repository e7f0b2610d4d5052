"""A choice among a few values, which the address of a page carries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import streamlit as st

from . import text

LONGEST = 120
"""characters of an option that are shown, and that an address carries"""


def choice(
    label: str, options: Mapping[Any, str] | Iterable[str], key: str, default: Any = None, **more: Any
) -> Any:  # fmt: skip
    """A pick among {value: how it is shown}, or among names, in the page's address as `key`; at least one is given.

    What a link asks for and is not there is refused in so many words, until something else is picked; what other picks
    of the page leave no room for gives way to the default: the first unless another is named that is there.
    """
    shown = unlike(options if isinstance(options, Mapping) else {name: name for name in options})
    values, entries = list(shown), list(shown.values())
    first = values.index(default) if default in shown else 0
    refused, of = f"{key} refused", f"{key} options"
    kept, asked = key in st.session_state, st.query_params.get(key)
    if not kept:
        st.session_state[refused] = asked if asked not in entries else None
    elif (
        st.session_state.get(of) != entries
    ):  # other picks changed what there is, or how it is shown: the browser is told
        value = st.session_state[key]
        st.session_state[key] = value if value in shown else values[first]
    st.session_state[of] = entries
    if st.session_state.get(refused) is not None:
        text.problem(f"the link asks for {key} {st.session_state[refused][:200]!r}, which is not there; it was refused")
    # Streamlit wants no default beside a value that is there already
    return st.selectbox(label, values, 0 if kept else first, key=key, bind="query-params", format_func=lambda v: shown[v],
                        on_change=lambda: st.session_state.update({refused: None}), **more)  # fmt: skip


def unlike(options: Mapping[Any, str]) -> dict[Any, str]:
    """How each option is shown; those that would look the same are counted, for Streamlit takes the last of them for all.

    >>> unlike({1: "a", 2: "b", 3: "a"})
    {1: 'a', 2: 'b', 3: 'a (2)'}
    """
    shown: dict[Any, str] = {}
    taken: set[str] = set()
    for value, words in options.items():
        name = plain = text.shown(words, LONGEST)
        number = 1
        while name in taken:
            number += 1
            name = f"{plain} ({number})"
        taken.add(name)
        shown[value] = name
    return shown


def take(key: str, value: Any) -> None:
    """Makes a value the pick of `choice`, or of another widget, from a callback: a click in a figure or a table, say."""
    st.session_state[key], st.session_state[f"{key} refused"] = value, None
