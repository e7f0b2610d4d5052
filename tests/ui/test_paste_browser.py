"""A paste as a reader tries it, in headless Chromium: answered, stopped, a token clicked, linked."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from .browser import CHROMIUM, WHY_NOT, opened, settled
from .paste_runs import PROMPT

pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT), pytest.mark.slow]
RUN = "run=pasted/first"
LONG = RUN + "&sample=true&temperature=5.0&tokens=230"
"""answers that take as long as there is room for"""
CELLS = ".js-plotly-plot .points .point path"


def paste(browser: Any, address: str, query: str = RUN, **options: Any) -> Any:
    page = opened(browser, f"{address}/", **options)
    page.goto(f"{address}/paste?{query}")
    page.locator(CELLS).first.wait_for()
    settled(page)
    return page


def click_cell(page: Any, position: int) -> None:
    cell = page.locator(CELLS).nth(position)
    cell.scroll_into_view_if_needed()
    page.wait_for_timeout(500)  # until nothing above it grows any more
    box = cell.bounding_box()  # plotly listens on a layer above the cells
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)


def test_a_token_is_clicked_and_a_link_opens_the_same(browser, explorer):
    page = paste(browser, explorer.address, RUN + "&strength=2.0")
    click_cell(page, 3)
    page.wait_for_url("**token=*")
    page.get_by_text("after position 3,").wait_for()
    click_cell(page, 5)
    page.get_by_text("after position 5,").wait_for()
    again = paste(browser, explorer.address, page.url.partition("?")[2])
    again.get_by_text("after position 5,").wait_for()
    assert "strength=2" in again.url
    assert again.get_by_text("it was refused").count() == 0


@contextmanager
def held_still(pid: int) -> Iterator[None]:
    """A process that does nothing meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1920, True)])
def test_four_answers_come_and_are_stopped(browser, explorer, width, dark):
    page = paste(browser, explorer.address, LONG, width=width, dark=dark)
    page.get_by_role("button", name="Answer", exact=True).click()
    page.get_by_text("▌").first.wait_for()  # a first word has come
    with held_still(explorer.pid):  # the answers cannot end by themselves before the click is there
        page.get_by_role("button", name="Stop", exact=True).click()
        page.wait_for_timeout(200)
    page.get_by_text("stopped here").first.wait_for()
    settled(page)
    assert page.get_by_text("could not be done").count() == 0

    page.goto(f"{explorer.address}/paste?{RUN}&tokens=4")
    page.get_by_role("button", name="Answer", exact=True).click()
    page.locator("[data-testid=stCode]").nth(4).wait_for()
    settled(page)
    assert page.get_by_text("could not be done").count() == 0
    page.context.close()


def test_a_stop_that_comes_with_the_answer_it_stops_wins(browser, explorer):
    page = paste(browser, explorer.address, LONG)
    with held_still(explorer.pid):  # both clicks lie there before the page runs
        page.get_by_role("button", name="Answer", exact=True).click()
        page.get_by_role("button", name="Stop", exact=True).click()
        page.wait_for_timeout(200)
    page.wait_for_timeout(3000)  # in which an answer would have begun
    settled(page)
    assert page.get_by_text("not answered yet").count() == 4
    assert page.get_by_text("stopped here").count() == 0
    page.context.close()


def test_another_behaviour_keeps_the_page_whole(browser, explorer):
    page = paste(browser, explorer.address)
    click_cell(page, 2)
    page.wait_for_url("**token=*")
    box = page.locator("[data-testid=stSelectbox]", has_text="Behaviour").locator("input")
    box.focus()
    box.press("ArrowDown")
    page.locator("[role=option]").nth(1).wait_for()
    box.press("ArrowDown")
    box.press("Enter")
    page.wait_for_url("**behaviour=refusal*")
    settled(page)
    assert page.get_by_text("it was refused").count() == 0
    asked = page.locator("[data-testid=stSelectbox]", has_text="Prompt").locator("input")
    assert asked.first.input_value() == f"0: refusal {PROMPT}"
