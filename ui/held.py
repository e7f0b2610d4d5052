"""What this process holds for all its sessions: open stores, rows on the device, models with a lock each; and how much."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from workbench.errors import UserError
from workbench.store import Store
from workbench.store.resident import ResidentRows

from .settings import settings
from .stamps import Stamp, fits_stamp, store_stamp

if TYPE_CHECKING:
    from workbench.convert import ConverterFits
    from workbench.models import Model

MOST_STORES, MOST_MODELS, MOST_FITS = 4, 3, 2
TIDY, EVERY = "gives memory back", 60.0
PATIENCE = 0.25
"""seconds from one word to a session that waits for a model to the next"""


class HeldFits:
    """The fits of a run and their lock: what one session factorises, the next one finds."""

    def __init__(self, fits: ConverterFits) -> None:
        self._fits = fits
        self._lock = threading.RLock()

    @contextmanager
    def alone(self) -> Iterator[ConverterFits]:
        """The fits, for this thread only."""
        with self._lock:
            yield self._fits

    def close(self) -> None:
        """Lets go of the stores, after whoever reads them is done."""
        with self._lock:
            self._fits.donor.close()
            self._fits.recipient.close()


def held_fits(run: Path) -> HeldFits:
    """The fits between the two profiles of a transfer run, once for all sessions; UserError as `fits_of_run`."""
    return _fits(str(run), fits_stamp(run))


@st.cache_resource(max_entries=MOST_FITS, show_spinner=False, on_release=lambda held: held.close())
def _fits(run: str, stamp: Stamp) -> HeldFits:
    from workbench.run_fits import fits_of_run

    return HeldFits(fits_of_run(run))


class HeldModel:
    """A model and its lock: one session at a time runs it."""

    def __init__(self, model: Model) -> None:
        self.model: Model | None = model
        self._lock = threading.RLock()
        self._fingerprint: dict[str, str] | None = None

    @property
    def fingerprint(self) -> dict[str, str]:
        """Of the model; taken once, and from then on without waiting for whoever runs it."""
        if self._fingerprint is None:
            with self.alone() as model:
                self._fingerprint = dict(model.fingerprint)
        return self._fingerprint

    @contextmanager
    def alone(self, waiting: Callable[[], None] | None = None) -> Iterator[Model]:
        """The model, for this thread only. `waiting` is called a few times a second until it is: it may say so, or give up.

        Raises UserError where the model was released meanwhile.
        """
        with _waited_for(self._lock, waiting):
            if self.model is None:
                raise UserError("the model was released meanwhile; do it again, and it is loaded anew")
            yield self.model


_DRAWS = threading.RLock()


def drawing(waiting: Callable[[], None] | None = None) -> AbstractContextManager[None]:
    """Around an answer that is sampled, and outside of the model's own lock: torch has one generator for all models, and
    of two sessions that draw from it at once each would change what the other gets for its seed."""
    return _waited_for(_DRAWS, waiting)


@contextmanager
def _waited_for(lock: Any, waiting: Callable[[], None] | None) -> Iterator[None]:
    while not lock.acquire(timeout=-1 if waiting is None else PATIENCE):
        assert waiting is not None
        waiting()
    try:
        yield
    finally:
        lock.release()


def open_store(path: str | Path) -> Store:
    """The one handle of a store; a store that was replaced is opened again."""
    return rows_of(path).store


def rows_of(path: str | Path) -> ResidentRows:
    """The rows of a store: on the device while they are looked at, memory-mapped where there is no GPU."""
    path = Path(path)
    return _rows(str(path), store_stamp(path), settings().device)  # Store.open says what is wrong with it


@st.cache_resource(max_entries=MOST_STORES, show_spinner=False, on_release=lambda rows: rows.close())
def _rows(path: str, stamp: Stamp, device: str) -> ResidentRows:
    return ResidentRows(Store.open(path), device or None)


def held_model(name: str) -> HeldModel:
    """A model that the explorer was started with, or a bundled one; loaded once for all sessions.

    Raises UserError for any other name: neither a link nor a file in the opened folder makes a page load what nobody named.
    """
    if not may_load(name):
        raise UserError(f"the explorer was not started with {name}; start it with `workbench ui FOLDER --model {name}`")
    return _model(name, settings().device)


def may_load(name: str) -> bool:
    """Whether `held_model` gives it."""
    return name in settings().models or name.startswith("bundled:")


@st.cache_resource(max_entries=MOST_MODELS, show_spinner="Loading the model …", on_release=lambda held: _free(held))
def _model(name: str, device: str) -> HeldModel:
    from workbench.models import load

    return HeldModel(load(name, device=device or "auto"))


def _free(held: HeldModel) -> None:
    """Gives the memory of a model back, after whoever runs it is done."""
    import torch

    with held.alone():
        held.model = None
    give_back()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def release() -> None:
    """Lets go of all that is held: stores, rows, fits and models, and every result and figure that was kept."""
    st.cache_data.clear()
    st.cache_resource.clear()  # each tells what it held to close
    give_back()


def keep_tidy() -> None:
    """Gives memory back every minute, from a thread of its own: Streamlit would collect all garbage after every run of a
    script, while the reader waits for it."""
    if not any(thread.name == TIDY for thread in threading.enumerate()):
        threading.Thread(target=_tidy, name=TIDY, daemon=True).start()


def _tidy() -> None:
    while True:
        time.sleep(EVERY)
        give_back()


def give_back() -> None:
    """Collects garbage, and returns what is free to the system: glibc keeps it, above all that of threads which are gone."""
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def memory() -> dict[str, Any]:
    """Bytes of this process, None where the system does not tell; and of the device where it is a GPU."""
    import torch

    found: dict[str, Any] = {"process": _resident_bytes()}
    if torch.cuda.is_available():
        free, whole = torch.cuda.mem_get_info()
        found |= {"device": torch.cuda.get_device_name(), "used": whole - free, "whole": whole}
    return found


def _resident_bytes() -> int | None:
    """Anonymous memory of this process: mapped files, which the system takes back at will, do not count."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))
    except (OSError, StopIteration):  # no Linux
        return None
