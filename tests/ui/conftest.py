"""Folders of work that are made once, pages of the explorer run over them without a browser, and what pages are asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from ui.settings import Settings

from .browser import chromium, served
from .converter_runs import converter_run
from .job_runs import job_run
from .paste_runs import paste_run
from .transport_runs import transport_run
from .word_stores import word_store

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


@dataclass(frozen=True)
class Explorer:
    """A server that runs for all end-to-end tests."""

    address: str
    pid: int
    folder: Path


@pytest.fixture(scope="session")
def explorer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Explorer]:
    """The explorer over a folder with something for every page; at the end its log must hold no exception."""
    folder = tmp_path_factory.mktemp("explorer")
    for name in ("first", "second"):
        job_run(folder / "runs", name)
    converter_run(folder)
    transport_run(folder)
    paste_run(folder / "pasted")
    word_store(folder / "store")
    log = tmp_path_factory.mktemp("log") / "server.log"
    with served(folder, log) as (address, pid):
        yield Explorer(address, pid, folder)
    assert "Traceback" not in log.read_text(errors="replace")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium; of one module, for what drives it keeps an event loop running, which others could not bear."""
    with chromium() as found:
        yield found


def words(test: AppTest) -> str:
    """All text that a page shows, one piece to a line."""
    found: list[Any] = [*test.title, *test.markdown, *test.text, *test.caption, *test.error, *test.code]
    return "\n".join(str(one.value) for one in found)


def plain_words(test: AppTest) -> str:
    """`words`, with our own remarks, which are escaped for Markdown, as they are read."""
    return words(test).replace("\\", "")


def fine(test: AppTest) -> AppTest:
    """The page, which shows neither an exception nor a problem."""
    assert not test.exception, [e.value for e in test.exception]
    assert "could not be done" not in words(test)
    return test


def charts(test: AppTest) -> list[dict[str, Any]]:
    """The figures that a page drew."""
    return [json.loads(one.proto.spec) for one in test.get("plotly_chart")]


def as_markup(test: AppTest, *pieces: str) -> list[str]:
    """What a page hands to what reads Markdown, as far as it holds one of these pieces; and figures, in which plotly reads
    HTML, that hold one with an angle bracket, a sign that turns the text, or more letters than are drawn of any."""
    kinds = ("markdown", "caption", "error", "success", "warning", "info", "title", "header", "subheader")
    shown = [str(one.value) for kind in kinds for one in test.get(kind)]
    drawn = [
        str(one.proto.spec).replace("\\u003c", "<").replace("\\u202e", "\u202e") for one in test.get("plotly_chart")
    ]
    in_figures = [piece for piece in pieces if "<" in piece or "\u202e" in piece or len(piece) > 100]
    return [*(one for one in shown if any(piece in one for piece in pieces)),
            *(one for one in drawn if any(piece in one for piece in in_figures))]  # fmt: skip


def run_snippets(test: AppTest) -> int:
    """Runs the code of every figure on a page; each must end with the figure that the page drew. Returns how many."""
    drawn = charts(test)
    snippets = [one.value for one in test.code if one.value.rstrip().splitlines()[-1:][0].startswith("figure")]
    assert len(snippets) == len(drawn)
    for code, spec in zip(snippets, drawn, strict=True):
        names: dict[str, Any] = {}
        exec(compile(code, "<snippet>", "exec"), names)
        assert json.loads(names["figure"].to_json()) == spec
    return len(snippets)
