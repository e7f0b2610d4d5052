"""Nothing pickled is loaded while the suite runs: a pickle can run code, and what strangers give is data.

`install` puts a guard in the place of what unpickles (pickle's `load`, `loads` and `Unpickler`, in C and in Python, and so
what stands on them: joblib, dill, cloudpickle, pandas, numpy with allow_pickle, torch without weights_only), and listens
to Python's own report of every class that any unpickler looks up, whoever it is and whenever it was imported. A test in
which one runs fails, also where the code under test swallows the error.
"""

from __future__ import annotations

import _pickle
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

WIRE = (
    "multiprocessing.",
    "execnet.",
    "xdist.",
    "concurrent.futures.",
    "ray.",
    "joblib.externals.loky.",
    "torch.multiprocessing.",
)
"""between processes of this very run; no file, and nobody else's"""
ALLOWED = {
    "streamlit.runtime.caching.": "copies of its cached values, in the memory of the process that made them",
    "sklearn.utils.estimator_checks": "`check_estimator` asks that estimators survive a pickle; its bytes are of the same test",
    "sklearn.utils._testing": "the same; its memory-mapped arrays lie in a temporary folder that it has just written",
    "nnsight.intervention.": "what its remote runs send and get back; the server of the tests is this process",
}
"""modules that unpickle what this process pickled, each with the reason"""
_THROUGH = ("pickle", "_pickle", "cloudpickle", "cloudpickle.", "dill.", "copyreg", "joblib.numpy_pickle",
            "joblib.numpy_pickle_utils", "torch.serialization", "torch.storage", "torch._utils", __name__)  # fmt: skip
"""what unpickles for whoever asked it to"""
seen: list[str] = []
"""what was unpickled and should not have been, by whom"""


class Unpickled(BaseException):
    """Something was unpickled; not an Exception, so that no `except Exception` hides it."""


def install() -> None:
    """Puts the guard in place, for the life of the process; a second call does nothing."""
    if hasattr(pickle, "_guarded_by_tests"):
        return
    for module, names in ((pickle, ("load", "loads", "_load", "_loads")), (_pickle, ("load", "loads"))):
        for name in names:
            setattr(module, name, _guarded(getattr(module, name)))
    for module, name in ((pickle, "Unpickler"), (pickle, "_Unpickler"), (_pickle, "Unpickler")):
        setattr(module, name, _guarded_class(getattr(module, name)))
    pickle._guarded_by_tests = True  # type: ignore[attr-defined]
    sys.addaudithook(lambda event, args: _check(event) if event == "pickle.find_class" else None)


@contextmanager
def expected() -> Iterator[list[str]]:
    """A block in which unpickling is tried on purpose; what was seen in it, which then does not count."""
    before = len(seen)
    found: list[str] = []
    try:
        yield found
    finally:
        found += seen[before:]
        del seen[before:]


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(*args: Any, **options: Any) -> Any:
        _check(f"pickle.{function.__name__}")
        return function(*args, **options)

    guarded.__name__ = function.__name__
    return guarded


def _guarded_class(unpickler: Any) -> Any:
    class Guarded(unpickler):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            _check("pickle.Unpickler")
            super().__init__(*args, **options)

    Guarded.__name__ = Guarded.__qualname__ = unpickler.__name__
    return Guarded


def _check(what: str) -> None:
    caller = _caller(sys._getframe(2))
    if any(f"{caller}.".startswith(name) for name in (*WIRE, *ALLOWED)):
        return
    said = f"{what} by {caller}"
    seen.append(said)
    raise Unpickled(f"{said}: nothing pickled is loaded; read safetensors, json or parquet (tests/no_pickle.py)")


def _caller(frame: FrameType | None) -> str:
    """The module that asked: the first on the way out that is no pickle module itself."""
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if not any(name == own or (own.endswith(".") and name.startswith(own)) for own in _THROUGH):
            return name
        frame = frame.f_back
    return "?"
