"""The explorer as a reader meets it, in headless Chromium: pages, links, the door, clicks in figures, selections."""

from __future__ import annotations

from typing import Any

import pytest

from workbench.store import Store

from .browser import CHROMIUM, WHY_NOT, click_cell, drag_box, drawn, opened, served, settled
from .transport_runs import EVIL

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT)


def picks(page: Any, *labels: str) -> list[str]:
    settled(page)
    boxes = [page.locator("[data-testid=stSelectbox]", has_text=label).first for label in labels]
    return [box.locator("input").first.input_value() for box in boxes]


def test_runs_are_compared_and_exported(browser, explorer, tmp_path):
    page = opened(browser, explorer.address)
    page.get_by_text("Code for this figure").first.wait_for()
    page.get_by_text("Export").first.click()
    with page.expect_download() as saved:
        page.get_by_role("button", name="CSV", exact=True).click()
    saved.value.save_as(tmp_path / "compared.csv")
    assert "behaviour,arm,score" in (tmp_path / "compared.csv").read_text()
    assert page.locator("script", has_text="alert(1)").count() == 0
    page.context.close()


def test_each_page_has_an_address_of_its_own(browser, explorer):
    page = opened(browser, explorer.address)
    for name in ("runs", "activations", "transport", "converters", "paste", "probes", "lens"):
        page.goto(f"{explorer.address}/{name}")
        settled(page)
        assert page.locator("[data-testid=stMain] h1").inner_text() == name.title()
        assert page.get_by_text("Page not found").count() == 0
    page.context.close()


def test_a_link_that_leads_out_of_the_folder_is_refused_and_stays_so(browser, explorer):
    page = opened(browser, f"{explorer.address}/activations?store=../../etc")
    refused = page.get_by_text("the link asks for store '../../etc', which is not there; it was refused")
    refused.wait_for()
    page.wait_for_timeout(1500)  # the page may run once more by itself
    assert refused.count() == 1
    page.context.close()


def test_a_link_holds_the_picks_of_its_page(browser, explorer):
    page = opened(browser, f"{explorer.address}/?report=runs/second")
    assert picks(page, "Of the run") == ["runs/second"]
    assert "report=runs" in page.url
    page.context.close()


def test_a_click_in_the_grid_picks_its_pair_and_the_link_keeps_it(browser, explorer):
    page = opened(browser, f"{explorer.address}/transport?metric=weighted")
    click_cell(page, "grid", "resid_post.2", "resid_post.1")
    page.wait_for_url("**source=resid_post.1**")
    assert "metric=weighted" in page.url
    page.reload()
    assert picks(page, "Source", "Target") == ["resid_post.1", "resid_post.2"]
    assert page.locator("script", has_text=EVIL[0][8:16]).count() == 0
    page.context.close()


def test_a_click_in_the_layers_picks_their_pair(browser, explorer):
    page = opened(browser, f"{explorer.address}/converters?run=demo")
    click_cell(page, "layers", "0", "1")
    page.wait_for_url("**donor=resid_post.1**")
    assert picks(page, "Donor", "Recipient") == ["resid_post.1", "resid_post.0"]
    page.context.close()


def test_a_box_in_the_plane_lists_the_tokens_in_it(browser, explorer):
    page = opened(browser, f"{explorer.address}/activations?store=store&view=projection&colour=position")
    drawn(page)
    inside = drag_box(page, "plane", (0.3, 0.3), (0.7, 0.75))
    assert 10 < len(inside) < 400
    page.get_by_text(f"of {len(inside):,} selected rows").wait_for()
    settled(page)
    # the grid of the table is drawn on a canvas; what it shows is told to screen readers in a table
    first = page.locator(".st-key-tokens table tbody tr").first.locator("td")
    first.first.wait_for(state="attached")
    row, token = (first.nth(i).text_content() for i in (0, 5))
    told = Store.open(explorer.folder / "store").rows()
    assert (int(row), token) == (inside[0], told["text"].iloc[inside[0]])
    page.context.close()


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
        page.context.close()
