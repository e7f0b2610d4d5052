"""Every example of a docstring runs and gives what it says."""

from __future__ import annotations

import ast
import doctest
import importlib
from pathlib import Path

import pytest

from .conftest import ROOT


def examples(path: Path) -> int:
    """Docstrings of a file that hold an example."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, kinds))
    return sum(">>> " in (ast.get_docstring(node) or "") for node in nodes)


FILES = {path: n for package in ("workbench", "probes") for path in sorted((ROOT / package).rglob("*.py"))
         if (n := examples(path))}  # fmt: skip


def test_there_are_examples():
    assert sum(FILES.values()) > 100


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    found = [test for test in doctest.DocTestFinder().find(module) if test.examples]
    assert len(found) == FILES[path], "an object that is wrapped must not hide its example"
    told: list[str] = []
    for test in found:
        doctest.DocTestRunner().run(test, out=told.append)
    assert not told, "".join(told)
