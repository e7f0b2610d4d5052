"""Graders of one's own, from a Python module that is named by whoever runs the command; no file ever names one."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path

from ..errors import UserError
from ..hashes import file_hash
from . import registry


def load_plugin(source: str) -> list[str]:
    """Runs a Python file (`graders.py`), or a module that can be imported, and returns the graders that it registers.

    It is code, and is run as such: with all that whoever calls may do. That is why a job file cannot name a plug-in.
    Raises UserError for one that is not there, that fails, or that registers no grader.
    """
    before = set(registry.GRADERS)
    name = source
    try:
        if source.endswith(".py"):
            file = Path(source).expanduser().resolve()
            name = f"workbench_plugin_{file.stem}"
            spec = importlib.util.spec_from_file_location(name, file)
            assert spec is not None, "a .py file has a spec"
            assert spec.loader is not None, "a .py file has a loader"
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
    except FileNotFoundError as err:
        raise UserError(
            f"plug-in {source!r}: no such file; give a .py file, or a module that Python can import"
        ) from err
    except ModuleNotFoundError as err:
        raise UserError(
            f"plug-in {source!r} cannot be imported ({err}); give a .py file, or a module that is installed"
        ) from err
    except UserError as err:
        raise UserError(f"plug-in {source!r}: {err}") from err
    except Exception as err:
        sys.modules.pop(name, None)
        raise UserError(f"plug-in {source!r} failed: {type(err).__name__}: {' '.join(str(err).split())[:200]}") from err
    added = set(registry.GRADERS) - before
    found = sorted(added or {n for n, fn in registry.GRADERS.items() if fn.__module__ == module.__name__})
    if not found:
        raise UserError(f"plug-in {source!r} registers no grader; use @register or @register_batch of "
                        "workbench.evaluate.graders")  # fmt: skip
    return found


def origin(name: str) -> str | None:
    """The sha256 of the file that a plugged-in grader is written in; None for those of the workbench itself."""
    fn = registry.GRADERS[name]
    if fn.__module__.partition(".")[0] == __name__.partition(".")[0]:
        return None
    file = inspect.getsourcefile(fn)
    return file_hash(Path(file)) if file and Path(file).is_file() else fn.__module__
