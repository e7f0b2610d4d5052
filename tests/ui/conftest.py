"""A small folder of work, made once, and pages of the explorer run over it without a browser."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from ui.settings import Settings

PAGE = """
import streamlit as st
from ui.text import told
from ui.pages.{name} import page
st.set_page_config(layout="wide")
told(page.page)()
"""


@pytest.fixture
def open_page(monkeypatch: pytest.MonkeyPatch) -> Callable[..., AppTest]:
    """open_page("runs", folder, models=(), **query): the page, run once, over a folder; query is its address."""

    def opened(
        name: str, folder: Path, models: tuple[str, ...] = (), token: str = "", **query: str | list[str]
    ) -> AppTest:
        for key, value in Settings(folder, models, token, "cpu").variable().items():
            monkeypatch.setenv(key, value)
        test = AppTest.from_string(PAGE.format(name=name), default_timeout=60)
        for key, value in query.items():
            test.query_params[key] = value
        return test.run()

    return opened


def words(test: AppTest) -> str:
    """All text that a page shows, one piece to a line."""
    found: list[Any] = [*test.title, *test.markdown, *test.text, *test.caption, *test.error, *test.code]
    return "\n".join(str(one.value) for one in found)


def run_snippets(test: AppTest) -> int:
    """Runs the code of every figure on a page; each must end with the figure that the page drew. Returns how many."""
    drawn = [json.loads(one.proto.spec) for one in test.get("plotly_chart")]
    snippets = [one.value for one in test.code if one.value.rstrip().splitlines()[-1:][0].startswith("figure")]
    assert len(snippets) == len(drawn)
    for code, spec in zip(snippets, drawn, strict=True):
        names: dict[str, Any] = {}
        exec(compile(code, "<snippet>", "exec"), names)
        assert json.loads(names["figure"].to_json()) == spec
    return len(snippets)
