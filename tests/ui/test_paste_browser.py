"""A paste as a reader tries it, in headless Chromium: answered, stopped, a token clicked, linked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from .browser import CHROMIUM, WHY_NOT, chromium, opened, served, settled
from .test_paste import PROMPT, make_work

pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT), pytest.mark.slow]
CELLS = ".js-plotly-plot .points .point path"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = make_work(tmp_path_factory.mktemp("work"))
    with served(folder, folder / "server.log") as (found, _):
        yield found
    assert "Traceback" not in (folder / "server.log").read_text(errors="replace")


def paste(browser: Any, address: str, query: str = "", **options: Any) -> Any:
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


def test_a_token_is_clicked_and_a_link_opens_the_same(browser, address):
    page = paste(browser, address, "strength=2.0")
    click_cell(page, 3)
    page.wait_for_url("**token=*")
    page.get_by_text("after position 3,").wait_for()
    click_cell(page, 5)
    page.get_by_text("after position 5,").wait_for()
    again = paste(browser, address, page.url.partition("?")[2])
    again.get_by_text("after position 5,").wait_for()
    assert "strength=2" in again.url
    assert again.get_by_text("it was refused").count() == 0


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1920, True)])
def test_four_answers_come_and_are_stopped(browser, address, width, dark):
    page = paste(browser, address, "sample=true&temperature=5.0&tokens=250", width=width, dark=dark)
    page.get_by_role("button", name="Answer", exact=True).click()
    page.get_by_role("button", name="Stop", exact=True).click()
    page.get_by_text("stopped here").or_(page.get_by_text("not answered yet")).first.wait_for()
    settled(page)
    page.goto(f"{address}/paste?tokens=4")
    page.get_by_role("button", name="Answer", exact=True).click()
    page.locator("[data-testid=stCode]").nth(4).wait_for()
    settled(page)
    assert page.get_by_text("could not be done").count() == 0


def test_another_behaviour_keeps_the_page_whole(browser, address):
    page = paste(browser, address)
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
