"""Writes the pages of docs/ that come from a run: `make pages`, or `python -m tests.pages [PART ...]`.

`transport`, `probes`, `similarity`, `geometry`, `depth` and `fold` each measure the bundled models anew and write the page of
their name in docs/, its numbers (a JSON file beside it) and its pictures; `scale` computes what large models cost and checks
its formulas against a small one. `notebooks` runs every notebook of docs/ and keeps
what it shows. `explorer` takes pictures of every page of the explorer over the demo's run, a transport run and a store, which
takes ten minutes. Pictures are taken in a headless Chromium; where there is none, those that are there stay.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

from . import pictures

DOCS = Path(__file__).resolve().parents[2] / "docs"
MEASURED = ("transport", "probes", "similarity", "geometry", "depth", "fold", "scale")
NO_BROWSER = "no chromium here: the pictures of docs/img stay as they are\n"


def write_measured(name: str) -> None:
    """A page of numbers: `measure(folder)` of its module, then `page(kept)` and `figures(folder, kept)`."""
    part = import_module(f"{__package__}.{name}")
    with tempfile.TemporaryDirectory(prefix="pages-") as folder:
        run = Path(folder) / "run"
        kept = part.measure(run)
        part.KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        part.PAGE.write_text(part.page(kept), encoding="utf-8")
        browser = pictures.browser()
        if browser is None:
            sys.stderr.write(NO_BROWSER)
            return
        for shown, figure in part.figures(run, kept).items():
            pictures.take(figure, DOCS / "img" / f"{name}_{shown}.png", browser)


def write_notebooks() -> None:
    import nbformat
    from nbclient import NotebookClient

    for path in sorted(DOCS.glob("*.ipynb")):
        notebook = nbformat.read(path, 4)
        with tempfile.TemporaryDirectory(prefix="pages-") as folder:
            resources = {"metadata": {"path": folder}}
            NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources,
                           record_timing=False).execute()  # fmt: skip
        nbformat.write(notebook, path)


def write_explorer() -> None:
    from . import explorer

    if pictures.browser() is None:
        sys.stderr.write(NO_BROWSER)
        return
    with tempfile.TemporaryDirectory(prefix="pages-") as folder:
        explorer.make_folder(Path(folder))
        explorer.take_all(Path(folder), DOCS / "img")


PARTS: dict[str, Callable[[], None]] = {
    **{name: partial(write_measured, name) for name in MEASURED}, "notebooks": write_notebooks, "explorer": write_explorer,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.pages", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} [all]")
    wanted = parser.parse_args().parts or list(PARTS)
    if unknown := sorted(set(wanted) - set(PARTS)):
        parser.error(f"unknown parts {', '.join(unknown)}; allowed: {', '.join(PARTS)}")
    for name in wanted:
        sys.stderr.write(f"{name} ...\n")
        PARTS[name]()


if __name__ == "__main__":
    main()
