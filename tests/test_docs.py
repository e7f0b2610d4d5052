"""What the documents say runs: the README's code, the notebook from its first cell to its last, and every local link."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from typer.testing import CliRunner

from workbench.cli import app

from .conftest import ROOT

README = ROOT / "README.md"
NOTEBOOKS = sorted((ROOT / "docs").glob("*.ipynb"))
GUIDES = [ROOT / "docs" / name for name in ("profile.md", "store.md", "paste.md")]
PAGES = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: str, *languages: str) -> list[str]:
    """The fenced code blocks in these languages."""
    return [body for language, body in fences(text) if language in languages]


def fences(text: str) -> list[tuple[str, str]]:
    """(language, body) of every fenced code block, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


SHELLS = ("console", "bash", "shell", "sh")


def commands(text: str) -> list[list[str]]:
    """The arguments of every `workbench ...` line, with or without a prompt sign.

    A line whose comment speaks of minutes is left out: what takes so long has tests of its own.
    """
    return [line for block in blocks(text, *SHELLS) for line in lines_of(block)]


def lines_of(block: str) -> list[list[str]]:
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words[:1] == ["workbench"] and "minutes" not in line.partition("#")[2]:
            found.append(words[1:])
    return found


def links(text: str) -> list[str]:
    """The targets of links and images that are files of ours."""
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
    return [t.partition("#")[0] for t in targets if not re.match(r"[a-z]+:|#", t)]


EXAMPLE = """
# Title
[page](docs/a.md#part) ![picture](img/b.png) [web](https://example.org) [here](#part)
```python
x = 1
```
```console
$ make demo            # installs
$ workbench demo       # 3 minutes
$ workbench generate bundled:donor "two words" \\
    --limit 3          # quick
workbench doctor
loaded a thing
```
```python
y = x + 1
```
"""


def test_how_a_document_is_read():
    assert blocks(EXAMPLE, "python") == ["x = 1\n", "y = x + 1\n"]
    assert commands(EXAMPLE) == [["generate", "bundled:donor", "two words", "--limit", "3"], ["doctor"]]
    assert links(EXAMPLE) == ["docs/a.md", "img/b.png"]


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) < 150


def test_the_code_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = blocks(README.read_text(encoding="utf-8"), "python")
    assert found, "the README shows no Python"
    namespace: dict[str, Any] = {"__name__": "readme"}
    for i, block in enumerate(found):
        exec(compile(block, f"README.md, python block {i}", "exec"), namespace)


@pytest.mark.parametrize("line", commands(README.read_text(encoding="utf-8")), ids=" ".join)
def test_the_commands_of_the_readme_run(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("page", GUIDES, ids=lambda p: p.name)
def test_a_guide_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    """In one folder, each block going on with what those before it made."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "guide"}
    shown = set()
    for i, (language, body) in enumerate(fences(page.read_text(encoding="utf-8"))):
        shown.add(language)
        if language == "python":
            exec(compile(body, f"{page.name}, block {i}", "exec"), namespace)
        for line in lines_of(body) if language in SHELLS else []:
            result = CliRunner().invoke(app, line)
            assert result.exit_code == 0, f"{' '.join(line)}: {result.output}"
    assert shown >= {"python", "console"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    gone = [link for link in links(page.read_text(encoding="utf-8")) if not (page.parent / link).exists()]
    assert gone == []


def test_there_is_a_notebook():
    assert ROOT / "docs" / "quickstart.ipynb" in NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_a_notebook_is_short_and_shows_what_it_found(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) < 20
    assert max(len(cell.source.splitlines()) for cell in code) < 12
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "not executed from top to bottom"
    kinds = {output.output_type for cell in code for output in cell.outputs}
    assert "error" not in kinds
    streams = {o.name for cell in code for o in cell.outputs if o.output_type == "stream"}
    assert "stderr" not in streams
    assert path.stat().st_size < 1e6
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert [link for link in links(prose) if not (path.parent / link).exists()] == []


def kinds_of_outputs(notebook: nbformat.NotebookNode) -> list[set[str]]:
    return [{output.output_type for output in cell.get("outputs", [])} for cell in notebook.cells]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_a_notebook_runs(path: Path, tmp_path: Path):
    notebook = nbformat.read(path, 4)
    shown = kinds_of_outputs(notebook)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    assert kinds_of_outputs(notebook) == shown
    assert list(tmp_path.iterdir()) == [], "the notebook leaves files behind"
