"""A choice among a few values, which the address of a page carries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamlit as st

from . import text


def choice(label: str, options: Mapping[Any, str], key: str, default: int = 0, **more: Any) -> Any:
    """A pick among {value: how it is shown}, in the page's address as `key`; one that is not there is refused in words."""
    asked, shown = st.query_params.get(key), {value: text.shown(words, 120) for value, words in options.items()}
    if asked is not None and asked not in shown.values():
        text.problem(f"the link asks for {key} {asked!r}, which is not there; it was refused")
    return st.selectbox(
        label, list(options), default, key=key, bind="query-params", format_func=lambda v: shown[v], **more
    )
