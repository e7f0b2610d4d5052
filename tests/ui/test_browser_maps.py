"""The pages of transport and converters in headless Chromium: a click in the heatmap picks its pair, and the link keeps it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .browser import CHROMIUM, WHY_NOT, chromium, opened, served, settled
from .converter_runs import converter_run
from .transport_runs import EVIL, transport_run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT)

CELL = """([key, x, y]) => {
  const plot = document.querySelector(`.st-key-${key} .js-plotly-plot`), at = plot.getBoundingClientRect();
  const [a, b] = [plot._fullLayout.xaxis, plot._fullLayout.yaxis];
  return [at.left + a._offset + a.c2p(a.d2c(x)), at.top + b._offset + b.c2p(b.d2c(y))];
}"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder: Path = tmp_path_factory.mktemp("work")
    transport_run(folder)
    converter_run(folder)
    with served(folder, folder / "server.log") as (found, _):
        yield found
    assert "Traceback" not in (folder / "server.log").read_text(errors="replace")


def click_cell(page: Any, key: str, x: str, y: str) -> None:
    """A click a little beside the middle of a cell of a panel's heatmap."""
    page.locator(f".st-key-{key} .js-plotly-plot .heatmaplayer").first.wait_for()
    page.wait_for_function(
        "(key) => document.querySelector(`.st-key-${key} .js-plotly-plot`)._fullLayout.xaxis._categories", arg=key
    )
    page.wait_for_timeout(1000)  # the figure takes its width
    left, top = page.evaluate(CELL, [key, x, y])
    page.mouse.move(left + 12, top + 6)
    page.mouse.click(left + 12, top + 6)


def picks(page: Any, *labels: str) -> list[str]:
    settled(page)
    boxes = [page.locator("[data-testid=stSelectbox]", has_text=label).first for label in labels]
    return [box.locator("input").first.input_value() for box in boxes]


def test_a_click_in_the_grid_picks_its_pair_and_the_link_keeps_it(address):
    with chromium() as browser:
        page = opened(browser, f"{address}/transport?metric=weighted")
        click_cell(page, "grid", "resid_post.2", "resid_post.1")
        page.wait_for_url("**source=resid_post.1**")
        assert "metric=weighted" in page.url
        page.reload()
        assert picks(page, "Source", "Target") == ["resid_post.1", "resid_post.2"]
        assert page.locator("script", has_text=EVIL[0][8:16]).count() == 0


def test_a_click_in_the_layers_picks_their_pair(address):
    with chromium() as browser:
        page = opened(browser, f"{address}/converters")
        click_cell(page, "layers", "0", "1")
        page.wait_for_url("**donor=resid_post.1**")
        assert picks(page, "Donor", "Recipient") == ["resid_post.1", "resid_post.0"]
