"""The engine of one machine: every piece in this process, in order, on the model at hand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .engine import Recipe, task_named

if TYPE_CHECKING:
    from ..interrupts import Asked
    from ..models import Model


class LocalEngine:
    """See `engine.Engine`; nothing is copied, and nothing is done again."""

    name, workers, redone, device = "local", 1, 0, ""

    def spread(
        self, model: Model | Recipe | None, task: str, pieces: Iterable[Any], *, common: Mapping[str, Any] | None = None,
        stop: Asked | None = None,
    ) -> Iterator[tuple[int, Any]]:  # fmt: skip
        """See `engine.Engine.spread`; a recipe is loaded first."""
        call, replica = task_named(task), model.load() if isinstance(model, Recipe) else model
        for index, piece in enumerate(pieces):
            if stop is not None:
                stop.check()
            yield index, call(replica, piece, **(common or {}))

    def about(self) -> dict[str, Any]:
        return {"engine": self.name, "workers": self.workers, "redone": self.redone}
