"""An engine in place of Ray: other replicas, another order of results, and no cluster to start."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from workbench.engines import Recipe
from workbench.engines.engine import task_named


class StandIn:
    """Loads a replica from the recipe, hands results back to front, and keeps the names of the tasks that it was given."""

    name, workers, redone, device = "ray", 2, 0, "cpu"

    def __init__(self) -> None:
        self.tasks: list[str] = []
        self._replicas: dict[Recipe, Any] = {}

    def spread(self, model: Any, task: str, pieces: Any, *, common: Any = None, stop: Any = None) -> Iterator[Any]:
        recipe = model if isinstance(model, Recipe) else Recipe.of(model)
        if recipe not in self._replicas:
            self._replicas[recipe] = recipe.load()
        call = task_named(task)
        found = [(i, call(self._replicas[recipe], piece, **(common or {}))) for i, piece in enumerate(pieces)]
        self.tasks += [task.rpartition(":")[2]] * len(found)
        yield from reversed(found)

    def about(self) -> dict[str, Any]:
        return {"engine": self.name, "workers": self.workers, "redone": self.redone}
