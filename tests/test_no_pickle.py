"""Nothing pickled is loaded and no text is run as code: by the source, and by a guard that watches the whole suite."""

from __future__ import annotations

import ast
import io
import multiprocessing
import pickle
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from . import no_pickle
from .conftest import ROOT

FORBIDDEN = ("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle")
SOURCES = sorted(file for name in ("workbench", "probes", "ui", "data") for file in (ROOT / name).rglob("*.py"))


def offences(source: str, name: str = "") -> Iterator[str]:
    """What a module does that loads pickles or runs texts, with its line."""
    for node in ast.walk(ast.parse(source)):
        for said in _offence(node, name):
            yield f"{getattr(node, 'lineno', 0)}: {said}"


def _offence(node: ast.AST, name: str) -> Iterator[str]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        yield from (f"imports {one}" for one in named if one.split(".")[0] in FORBIDDEN)
    if not isinstance(node, ast.Call):
        return
    called, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
    last = called.rpartition(".")[2]
    if called in ("eval", "exec", "compile", "__import__", "yaml.load", "yaml.unsafe_load") or last == "read_pickle":
        yield called
    if called in ("torch.jit.load", "torch.hub.load", "torch.package.PackageImporter"):
        yield called
    if called == "torch.load" and options.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if called in ("np.load", "numpy.load") and options.get("allow_pickle") != "False":
        yield "np.load without allow_pickle=False"
    if options.get("trust_remote_code", "False") != "False":
        yield "trust_remote_code"
    if called == "torch.save" and name != "pyreft.py":  # that format is made of torch archives
        yield "torch.save"


@pytest.mark.parametrize("package", ["workbench", "probes", "ui", "data"])
def test_no_module_loads_a_pickle_or_runs_a_text(package):
    files = [file for file in SOURCES if file.relative_to(ROOT).parts[0] == package]
    assert files
    found = [f"{f.relative_to(ROOT)}:{said}" for f in files for said in offences(f.read_text(encoding="utf-8"), f.name)]
    assert found == []


@pytest.mark.parametrize("line", [
    "import pickle", "from dill import load", "import joblib.numpy_pickle", "eval('1')", "exec(text)", "yaml.load(text)",
    "torch.load(file)", "torch.load(file, weights_only=False)", "np.load(file)", "np.load(file, allow_pickle=True)",
    "Model.from_pretrained(name, trust_remote_code=True)", "pd.read_pickle(file)", "torch.save(x, file)", "import marshal",
])  # fmt: skip
def test_the_rule_sees_each_of_them(line):
    assert len(list(offences(line))) == 1


class Harmful:
    """What a stranger's pickle may do when it is loaded."""

    def __reduce__(self) -> tuple[object, ...]:
        return print, ("code ran",)


def loaders(folder: Path) -> dict[str, object]:
    import joblib

    file, data = folder / "a.pkl", pickle.dumps(Harmful())
    file.write_bytes(data)
    np.save(folder / "a.npy", np.array([Harmful()], dtype=object), allow_pickle=True)
    torch.save(Harmful(), folder / "a.pt")
    joblib.dump(Harmful(), folder / "a.joblib")
    return {
        "load": lambda: pickle.load(file.open("rb")), "loads": lambda: pickle.loads(data),
        "class": lambda: pickle.Unpickler(io.BytesIO(data)).load(), "in Python": lambda: pickle._Unpickler(io.BytesIO(data)),
        "numpy": lambda: np.load(folder / "a.npy", allow_pickle=True), "pandas": lambda: pd.read_pickle(file),
        "torch": lambda: torch.load(folder / "a.pt", weights_only=False), "joblib": lambda: joblib.load(folder / "a.joblib"),
    }  # fmt: skip


@pytest.mark.parametrize("way", ["load", "loads", "class", "in Python", "numpy", "pandas", "torch", "joblib"])
def test_the_guard_bites_whatever_loads_a_pickle(way, tmp_path, capsys):
    load = loaders(tmp_path)[way]
    with no_pickle.expected() as found, pytest.raises(no_pickle.Unpickled, match="nothing pickled is loaded"):
        load()  # type: ignore[operator]
    assert found
    assert capsys.readouterr().out == ""


def test_the_guard_is_not_hidden_by_an_except():
    def swallowing() -> None:
        with suppress(Exception):
            pickle.loads(pickle.dumps(1))

    with no_pickle.expected() as found, pytest.raises(no_pickle.Unpickled):
        swallowing()
    assert found == ["pickle.loads by tests.test_no_pickle"]


def test_an_unpickler_that_was_there_before_the_guard_is_seen_too():
    real = pickle.Unpickler.__mro__[1]  # what somebody may have imported before
    with no_pickle.expected() as found, pytest.raises(no_pickle.Unpickled, match=r"pickle\.find_class"):
        real(io.BytesIO(pickle.dumps(Harmful()))).load()
    assert found


def test_tensors_are_read_and_processes_may_talk(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    assert torch.load(tmp_path / "a.pt", weights_only=True)["a"].tolist() == [1.0, 1.0]
    one, other = multiprocessing.Pipe()
    one.send({"a": Path("x")})
    assert other.recv() == {"a": Path("x")}
