"""Writes the pages of docs/ that come from a run: `make pages`, or `python -m tests.pages [PART ...]`.

`transport` runs `workbench transport` on the bundled recipient and writes docs/transport.md, its numbers
(docs/transport.json) and its pictures; `similarity` and `geometry` do the same of the verbs of their names on the bundled
pair; `probes` trains probes on the bundled pair and writes docs/probes.md; `notebooks` runs every notebook of docs/ and
keeps what it shows. Pictures are taken in a headless Chromium; where there is none, those that are there stay. `explorer`
takes pictures of every page of the explorer over the demo's run, a transport run and a store, which takes ten minutes.
(docs/transport.json) and its pictures; `probes` trains probes on the bundled pair and writes docs/probes.md; `depth` runs
`workbench depth` on it and writes docs/depth.md; `notebooks` runs every notebook of docs/ and keeps what it shows. Pictures
are taken in a headless Chromium; where there is none, those that are there stay. `explorer` takes pictures of every page of
the explorer over the demo's run, a transport run and a store, which takes ten minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from . import geometry, pictures, probes, similarity, transport
from . import depth, pictures, probes, transport

DOCS = Path(__file__).resolve().parents[2] / "docs"


def write_transport() -> None:
    with tempfile.TemporaryDirectory(prefix="pages-") as folder:
        kept = transport.measure(Path(folder) / "run")
        transport.KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        transport.PAGE.write_text(transport.page(kept), encoding="utf-8")
        browser = pictures.browser()
        if browser is None:
            sys.stderr.write("no chromium here: the pictures of docs/img stay as they are\n")
            return
        for name, figure in transport.figures(Path(folder) / "run").items():
            pictures.take(figure, DOCS / "img" / f"transport_{name}.png", browser)


def write_probes() -> None:
    kept, browser = probes.write(), pictures.browser()
    for name, figure in probes.figures(kept).items() if browser else ():
        pictures.take(figure, DOCS / "img" / f"probes_{name}.png", browser)


def write_similarity() -> None:
    with tempfile.TemporaryDirectory(prefix="pages-") as folder:
        _write(similarity, Path(folder), "similarity_best")


def write_geometry() -> None:
    with tempfile.TemporaryDirectory(prefix="pages-") as folder:
        _write(geometry, Path(folder), "geometry_costs")


def _write(part: ModuleType, folder: Path, picture: str) -> None:
    """A page with one picture: its numbers, its text, and the picture where there is a browser."""
    kept = part.measure(folder)
    part.KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    part.PAGE.write_text(part.page(kept), encoding="utf-8")
    browser = pictures.browser()
    if browser is None:
        sys.stderr.write("no chromium here: the pictures of docs/img stay as they are\n")
        return
    pictures.take(part.figure(folder), DOCS / "img" / f"{picture}.png", browser)
def write_depth() -> None:
    with tempfile.TemporaryDirectory(prefix="pages-") as folder:
        kept = depth.measure(Path(folder))
        depth.KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        depth.PAGE.write_text(depth.page(kept), encoding="utf-8")
        browser = pictures.browser()
        if browser is None:
            sys.stderr.write("no chromium here: the pictures of docs/img stay as they are\n")
            return
        for name, figure in depth.figures(Path(folder)).items():
            pictures.take(figure, DOCS / "img" / f"depth_{name}.png", browser)


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
        sys.stderr.write("no chromium here: the pictures of docs/img stay as they are\n")
        return
    with tempfile.TemporaryDirectory(prefix="pages-") as folder:
        explorer.make_folder(Path(folder))
        explorer.take_all(Path(folder), DOCS / "img")


PARTS: dict[str, Callable[[], None]] = {
    "transport": write_transport, "probes": write_probes, "similarity": write_similarity, "geometry": write_geometry,
    "notebooks": write_notebooks, "explorer": write_explorer,
    "transport": write_transport, "probes": write_probes, "depth": write_depth, "notebooks": write_notebooks,
    "explorer": write_explorer,
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
