"""The explorer under use: how soon a large store is seen, and ten readers at once who click at random.

Both drive headless Chromium against a server of their own (`tests/ui/browser.py`). Functions return dicts of numbers.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..ui.browser import ARGUMENTS, CHROMIUM, PATIENCE, SETTLED, chromium, drawn, opened, served
from .explorer_store import make_explorer_store

PAGES = ("runs", "activations", "transport", "converters", "paste", "probes", "lens")
APART = 500
"""milliseconds between two boxes: two presses within 300 are a double click, which clears what is selected"""
LEFT = 150.0
"""seconds after which the server has forgotten readers who left"""


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that is its own: mapped files do not count."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("this system does not tell the anonymous memory of a process")


class Peak:
    """The most memory that a process had while a block ran, looked at ten times a second."""

    def __init__(self, pid: int) -> None:
        self.pid, self.bytes, self._over = pid, 0, threading.Event()

    def __enter__(self) -> Peak:
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.1):
            self.bytes = max(self.bytes, anonymous_bytes(self.pid))

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def large_store(
    folder: Path, rows: int = 1_000_000, width: int = 2304, sites: int = 2, *, turns: int = 20
) -> dict[str, Any]:
    """Seconds to the first page of a large store, to another site, and to the table of a box drawn in its plane.

    `browser_s` is the first page of a small store in a browser that has never been here, which loads the frontend; all else
    is seen by that browser, of a store that the server has not opened yet.
    """
    make_explorer_store(folder / "large", rows, width, sites).close()
    make_explorer_store(folder / "small", 1000, 64, 1).close()
    names = [f"resid_post.{i}" for i in range(sites)]
    with served(folder, folder / "server.log") as (address, pid), chromium() as browser:
        opened(browser, f"{address}/runs").context.close()  # imports are the server's start, not this page
        context = browser.new_context(viewport={"width": 1280, "height": 1400})
        page = context.new_page()
        page.set_default_timeout(120_000)
        seen = timed(lambda: (page.goto(f"{address}/activations?store=small"), drawn(page)))
        before = anonymous_bytes(pid)
        with Peak(pid) as peak:
            overview = timed(lambda: (page.goto(f"{address}/activations?store=large"), drawn(page)))
            plane = timed(lambda: (page.goto(f"{address}/activations?store=large&view=projection"), drawn(page)))
            page.get_by_text("Code for this figure").first.wait_for()
            # the site that is shown first is the last; each is picked twice
            changes = [change(page, "Site", names[i % sites]) for i in range(2 * sites)]
            selections = [box(page, turn) for turn in range(turns)]
        return {
            "rows": rows, "width": width, "sites": sites, "browser_s": seen, "overview_s": overview, "plane_s": plane,
            "change_s": statistics.median(changes), "first_change_s": changes[0],
            "selection_s": statistics.median(selections), "turns": turns, "memory_bytes": peak.bytes - before,
        }  # fmt: skip


WATCH = """() => {
  const app = document.querySelector('[data-testid=stApp]'), name = 'data-test-script-state';
  window.__log = [];
  new MutationObserver(() => window.__log.push([app.getAttribute(name), performance.now()]))
    .observe(app, {attributes: true, attributeFilter: [name]});
}"""
RESTED = "() => window.__log.some(e => e[0] === 'running') && window.__log.at(-1)[0] === 'notRunning'"


def answered(page: Any, act: Callable[[], Any]) -> float:
    """Seconds from an act of the reader until the script that it started has ended, by the page's own clock."""
    page.evaluate(WATCH)
    started = page.evaluate("() => performance.now()")
    act()
    page.wait_for_function(RESTED)
    ended = page.evaluate("() => new Promise(done => requestAnimationFrame(() => done(window.__log.at(-1)[1])))")
    return max(0.0, ended - started) / 1000


def change(page: Any, label: str, value: str) -> float:
    """Seconds from a pick in a selectbox to the page that answers it."""
    pick = page.locator("[data-testid=stSelectbox]", has_text=label).first
    pick.locator("input").first.click()
    option = page.get_by_role("option", name=value, exact=True).first
    option.wait_for()
    return answered(page, option.click)


def box(page: Any, turn: int) -> float:
    """Seconds from a box drawn in the figure to the page that lists what is in it."""
    page.wait_for_timeout(APART)
    at = page.locator("[data-testid=stPlotlyChart] .nsewdrag").first.bounding_box()
    chance = random.Random(turn)
    x, y = at["x"] + at["width"] * chance.uniform(0.2, 0.5), at["y"] + at["height"] * chance.uniform(0.2, 0.5)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + at["width"] * 0.25, y + at["height"] * 0.25, steps=4)
    return answered(page, page.mouse.up)


def sessions(
    folder: Path, count: int = 10, seconds: float = 120.0, *, seed: int = 0, wait: float = LEFT
) -> dict[str, Any]:
    """Readers at once, each with a store of its own in view, who click at random for so long.

    `foreign`: pages that showed what belongs to another reader's store. `exceptions`: of a page, or in the log.
    `before_bytes` and `after_bytes`: the server's own memory after one reader had clicked as long and left, and after all
    of them had, each `wait` seconds later: Streamlit keeps the session of a reader who left for two minutes.
    """
    rows = {f"store{i}": 1013 + 97 * i for i in range(count)}
    for name, n in rows.items():
        make_explorer_store(folder / name, n, 64, 3).close()
    log, found = folder / "server.log", [dict.fromkeys(("clicks", "foreign", "exceptions"), 0) for _ in range(count)]
    with served(folder, log) as (address, pid):
        alone = [dict.fromkeys(("clicks", "foreign", "exceptions"), 0)]
        asyncio.run(_readers(address, rows, seconds, seed + 1, alone))
        before = _settled_bytes(pid, wait)
        asyncio.run(_readers(address, rows, seconds, seed, found))
        after = _settled_bytes(pid, wait)
    total = {key: sum(one[key] for one in found) for key in found[0]}
    total["exceptions"] += alone[0]["exceptions"] + log.read_text(errors="replace").count("Traceback")
    return {"count": count, "seconds": seconds, **total, "before_bytes": before, "after_bytes": after}


def _settled_bytes(pid: int, wait: float) -> int:
    """The memory once closed sessions have been let go."""
    time.sleep(wait)
    return anonymous_bytes(pid)


async def _readers(address: str, rows: dict[str, int], seconds: float, seed: int, found: list[dict[str, int]]) -> None:
    """In one browser, each with cookies and a cache of its own."""
    from playwright.async_api import async_playwright

    async with async_playwright() as play:
        browser = await play.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        readers = [_read(browser, address, i, rows, seconds, seed, found[i]) for i in range(len(found))]
        await asyncio.gather(*readers)
        await browser.close()


async def _read(
    browser: Any, address: str, reader: int, rows: dict[str, int], seconds: float, seed: int, found: dict[str, int]
) -> None:
    chance, mine = random.Random(seed * 1000 + reader), f"store{reader}"
    context = await browser.new_context(viewport={"width": 1280, "height": 1000})
    page = await context.new_page()
    page.set_default_timeout(2 * PATIENCE)
    await page.goto(f"{address}/activations?store={mine}")
    await _settled(page)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        await _click(page, address, mine, chance)
        found["clicks"] += 1
        said = await page.locator("[data-testid=stMain]").inner_text()
        others = {f"{n:,} rows" for name, n in rows.items() if name != mine}
        if f"store={mine}" in page.url and any(words in said for words in others):
            found["foreign"] += 1
        found["exceptions"] += await page.locator("[data-testid=stException]").count()
    await context.close()


async def _settled(page: Any) -> None:
    for selector in SETTLED:
        await page.wait_for_selector(selector)


async def _click(page: Any, address: str, mine: str, chance: random.Random) -> None:
    """Another page, or another value of one of its picks; what cannot be clicked just now is left."""
    from playwright.async_api import Error

    picks = page.locator("[data-testid=stSelectbox] input")
    try:
        if chance.random() < 0.3 or not await picks.count():
            await page.goto(f"{address}/{chance.choice(PAGES)}?store={mine}")
        else:
            pick = picks.nth(chance.randrange(await picks.count()))
            label = await pick.locator("xpath=ancestor::*[@data-testid='stSelectbox']").inner_text()
            if label.startswith("Store"):
                return
            await pick.click(timeout=2000)
            options = page.get_by_role("option")
            await options.nth(chance.randrange(max(1, await options.count()))).click(timeout=2000)
        await _settled(page)
    except Error:
        await page.keyboard.press("Escape")
