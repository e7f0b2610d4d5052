"""What runs in a worker: a replica of the model, loaded once, and the tasks that it is given."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .engine import Recipe, task_named

if TYPE_CHECKING:
    from ..models import Model

Line = tuple[int, str]
"""level and text of a line of the log"""


class Replica:
    """Holds one model at a time: the one of the last recipe."""

    def __init__(self) -> None:
        os.environ["WORKBENCH_PROGRESS"] = "0"  # the driver has the bar
        self._recipe: Recipe | None = None
        self._model: Model | None = None

    def ready(self) -> bool:
        """Answers once the worker runs."""
        return True

    def run(self, recipe: Recipe | None, task: str, piece: Any, common: Mapping[str, Any]) -> tuple[Any, list[Line]]:
        """The result of a task, and what was logged and warned of meanwhile: for the driver to tell, once."""
        with _heard() as lines:
            return task_named(task)(None if recipe is None else self._replica(recipe), piece, **common), lines

    def _replica(self, recipe: Recipe) -> Model:
        if self._recipe != recipe or self._model is None:
            self._model = self._recipe = None  # first, for there may be no room for two
            _check_versions(recipe)
            if recipe.threads:
                import torch

                torch.set_num_threads(recipe.threads)
            self._model, self._recipe = recipe.load(), recipe
        return self._model


def _check_versions(recipe: Recipe) -> None:
    differ = [(name, version(name), wanted) for name, wanted in recipe.versions if version(name) != wanted]
    if differ:
        text = ", ".join(f"{name} {here} and not {wanted}" for name, here, wanted in differ)
        raise UserError(f"a worker on {os.uname().nodename} has {text}, as the driver: their results differ in their bits; "
                        "install the same versions everywhere")  # fmt: skip


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[Line] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelno, record.getMessage()))


@contextmanager
def _heard() -> Iterator[list[Line]]:
    log, handler = logging.getLogger("workbench"), _Lines()
    level, spreads = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            yield handler.lines
        handler.lines += [(logging.WARNING, f"{w.category.__name__}: {w.message}") for w in caught]
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = spreads
