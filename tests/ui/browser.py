"""A server of the explorer and a headless Chromium that looks at it, for the end-to-end tests and the benchmark."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ui.server import command
from ui.settings import Settings

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WHY_NOT = "no chromium on this machine: apt-get install chromium"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip
PATIENCE = 60_000
"""milliseconds that a page has to show what is waited for"""
SETTLED = ("[data-testid=stMain] h1", "[data-testid=stApp][data-test-script-state=notRunning]")
"""what is there once a page shows something and no script runs"""


@contextmanager
def served(folder: Path, log: Path, **options: Any) -> Iterator[tuple[str, int]]:
    """The explorer over a folder, on a free port: its address, and the number of its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    chosen = Settings(folder, options.get("models", ()), options.get("token", ""), "cpu")
    with log.open("wb") as handle:
        process = subprocess.Popen(
            command("127.0.0.1", port), env={**os.environ, **chosen.variable()}, stdout=handle, stderr=subprocess.STDOUT
        )
    try:
        _until_up(port, process, log)
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait(20)


def _until_up(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=2) as answer:
                if answer.read() == b"ok":
                    return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"the explorer did not come up: {log.read_text(errors='replace')[-2000:]}")


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser of playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


def opened(browser: Any, address: str, *, width: int = 1280, dark: bool = False) -> Any:
    """A page of a session of its own, once the script has run to its end."""
    context = browser.new_context(
        viewport={"width": width, "height": 1000}, color_scheme="dark" if dark else "light", accept_downloads=True
    )
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    settled(page)
    return page


def settled(page: Any) -> None:
    """Waits until the page shows something and no script runs."""
    for selector in SETTLED:
        page.wait_for_selector(selector)
    page.wait_for_function("() => !document.querySelector('[data-testid=stSkeleton]')")


def drawn(page: Any) -> None:
    """Waits until the script has ended and a figure is there."""
    page.wait_for_selector("[data-testid=stPlotlyChart] .main-svg")
    settled(page)


CELL = """([key, x, y]) => {
  const plot = document.querySelector(`.st-key-${key} .js-plotly-plot`), at = plot.getBoundingClientRect();
  const [a, b] = [plot._fullLayout.xaxis, plot._fullLayout.yaxis];
  return [at.left + a._offset + a.c2p(a.d2c(x)), at.top + b._offset + b.c2p(b.d2c(y))];
}"""


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


INSIDE = """(key) => {
  const plot = document.querySelector(`.st-key-${key} .js-plotly-plot`), box = plot._fullLayout.selections[0], found = [];
  const [[x0, x1], [y0, y1]] = [[box.x0, box.x1], [box.y0, box.y1]].map(ends => ends.sort((one, other) => one - other));
  for (const trace of plot._fullData) for (let i = 0; i < trace.x.length; i++)
    if (x0 < trace.x[i] && trace.x[i] < x1 && y0 < trace.y[i] && trace.y[i] < y1) found.push(Number(trace.customdata[i]));
  return found.sort((one, other) => one - other);
}"""


def drag_box(page: Any, key: str, start: tuple[float, float], end: tuple[float, float]) -> list[int]:
    """Draws a box in the figure of a panel, from a share of its width and height to another; returns the customdata of the
    points in it, by what plotly holds."""
    page.wait_for_timeout(1000)  # the figure takes its width
    figure = page.locator(f".st-key-{key} .js-plotly-plot")
    figure.locator(".modebar-btn[data-attr=dragmode][data-val=select]").evaluate("button => button.click()")
    at = figure.locator(".nsewdrag").first.bounding_box()
    (x0, y0), (x1, y1) = ((at["x"] + at["width"] * x, at["y"] + at["height"] * y) for x, y in (start, end))
    page.mouse.move(x0, y0)
    page.mouse.down()
    page.mouse.move(x1, y1, steps=5)
    page.mouse.up()
    page.wait_for_function("(key) => document.querySelector(`.st-key-${key} .js-plotly-plot`)._fullLayout.selections.length",
                           arg=key)  # fmt: skip
    return [int(one) for one in page.evaluate(INSIDE, key)]
