"""Pictures of every page of the explorer over a folder of the demo's and a transport run: two widths, two themes."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..ui.browser import chromium, opened, served, settled

WIDTHS, THEMES = (1280, 1920), ("light", "dark")
PAGES = ("runs", "activations", "transport", "converters", "paste", "probes", "lens")
TALLEST = 2400
"""pixels of a picture"""


def make_folder(folder: Path) -> None:
    """The demo's run, a transport run, a store of all tokens and a lens: what every page has something to show of."""
    workbench = [sys.executable, "-m", "workbench"]
    for line in (
        ["demo", "--out", folder],
        ["transport", "bundled:recipient", "--prompts", "bundled:profile", "--out", folder / "transport"],
        ["profile", "bundled:recipient", "--prompts", "bundled:profile", "--tokens", "all", "--out", folder / "tokens"],
    ):
        subprocess.run([*workbench, *map(str, line)], check=True, stdout=subprocess.DEVNULL)


def take_all(folder: Path, out: Path) -> list[Path]:
    """Writes explorer_PAGE_WIDTH_THEME.png of every page; returns what was written."""
    made = []
    with served(folder, folder / "server.log") as (address, _), chromium() as browser:
        for name in PAGES:
            for width in WIDTHS:
                for theme in THEMES:
                    page = opened(browser, f"{address}/{name}", width=width, dark=theme == "dark")
                    file = out / f"explorer_{name}_{width}_{theme}.png"
                    file.write_bytes(_small(_whole(page)))
                    page.context.close()
                    made.append(file)
    return made


def _whole(page: Any) -> bytes:
    """The page at its full height, which scrolls inside its frame, once all of it is drawn."""
    height = page.evaluate("() => document.querySelector('[data-testid=stMain]').scrollHeight")
    page.set_viewport_size({"width": page.viewport_size["width"], "height": max(600, min(height + 40, TALLEST))})
    settled(page)
    page.wait_for_timeout(1500)  # figures draw themselves after their data came
    return page.screenshot()


def _small(png: bytes) -> bytes:
    """With 128 colours, which a page of text and figures does not miss."""
    from PIL import Image

    out = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(128).save(out, "PNG", optimize=True)
    return out.getvalue()
