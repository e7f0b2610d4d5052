"""The explorer as a reader meets it, in headless Chromium."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..metrics_example import metrics
from .browser import CHROMIUM, WHY_NOT, chromium, opened, served, settled
from .test_runs import a_run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("work")
    for name in ("first", "second"):
        a_run(made, name)
    (made / "second" / "metrics.json").write_text(json.dumps(metrics() | {"behaviours": {}}))
    return made


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with served(folder, folder / "server.log") as (found, _):
        yield found
    assert "Traceback" not in (folder / "server.log").read_text(errors="replace")


def test_runs_are_compared_exported_and_noted(browser, address, folder, tmp_path):
    page = opened(browser, address)
    page.get_by_text("Code for this figure").first.wait_for()
    page.get_by_text("Export").first.click()
    with page.expect_download() as saved:
        page.get_by_role("button", name="CSV", exact=True).click()
    saved.value.save_as(tmp_path / "compared.csv")
    assert "behaviour,arm,score" in (tmp_path / "compared.csv").read_text()
    assert page.locator("script", has_text="alert(1)").count() == 0


def test_each_page_has_an_address_of_its_own(browser, address):
    for name in ("", "runs", "activations", "transport", "converters", "paste", "probes", "lens"):
        page = opened(browser, f"{address}/{name}")
        assert page.locator("[data-testid=stMain] h1").inner_text() == (name or "runs").title()
        assert page.get_by_text("Page not found").count() == 0
        page.context.close()


def test_a_link_that_leads_out_of_the_folder_is_refused(browser, address):
    page = opened(browser, f"{address}/activations?store=../../etc")
    assert page.get_by_text("../../etc").count() == 0 or page.get_by_text("it was refused").count() == 1


def test_a_link_holds_the_picks_of_its_page(browser, address):
    page = opened(browser, f"{address}/?report=second")
    pick = page.locator("[data-testid=stSelectbox]", has_text="Of the run")
    assert pick.locator("input").first.input_value() == "second" or "second" in pick.inner_text()
    assert "report=second" in page.url


def test_nobody_passes_the_door_without_the_token(browser, tmp_path):
    with served(tmp_path, tmp_path / "log", token="right") as (address, _):
        page = opened(browser, address)
        page.get_by_test_id("stTextInputField").fill("wrong")
        page.get_by_role("button", name="Open").click()
        page.get_by_text("This is not the token.").wait_for()
        assert page.get_by_text("Opened folder", exact=True).count() == 0
        page.get_by_test_id("stTextInputField").fill("right")
        page.get_by_role("button", name="Open").click()
        page.get_by_text("Opened folder", exact=True).wait_for()
        settled(page)
