"""Figures to small PNG files, drawn by a headless Chromium: plotly itself would need a package of its own for it."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import plotly.graph_objects as go

WIDTH, COLOURS = 1100, 64
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
         "--disable-background-networking", "--disable-sync", "--hide-scrollbars", "--virtual-time-budget=8000")  # fmt: skip
PAGE = '<!doctype html><meta charset="utf-8"><style>body {{ margin: 0 }}</style>{figure}'


def browser() -> str | None:
    """The Chromium of this machine, if it has one."""
    return next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )


def take(figure: go.Figure, target: Path, program: str) -> None:
    """A figure as a PNG of few colours, 1100 wide and as high as it says."""
    from PIL import Image

    html = PAGE.format(figure=figure.to_html(full_html=False, include_plotlyjs=True, config={"displayModeBar": False}))
    with tempfile.TemporaryDirectory(prefix="picture-") as folder:
        (Path(folder) / "figure.html").write_text(html, encoding="utf-8")
        taken = Path(folder) / "figure.png"
        size = f"--window-size={WIDTH},{figure.layout.height}"
        subprocess.run([program, *FLAGS, f"--user-data-dir={folder}/profile", size, f"--screenshot={taken}",
                        f"file://{folder}/figure.html"], check=True, capture_output=True, timeout=120)  # fmt: skip
        with Image.open(taken) as image:
            image.convert("RGB").quantize(COLOURS).save(target, optimize=True)
