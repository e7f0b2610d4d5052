"""What can be known to be wrong with a job before any model is loaded and anything is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .adapters.adapter import Adapter
from .errors import UserError
from .evaluate.graders import find
from .prompts import PromptSet

if TYPE_CHECKING:
    from .jobs import BehaviourTable, Job


def check_job(job: Job) -> None:
    """Raises UserError, naming the key, for prompts and adapters that cannot be read, unknown graders and double names."""
    names = [b.name for b in job.behaviours]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise UserError(f"two behaviours are named {twice!r}; give each a name of its own")
    _readable("profile.prompts", job.profile.prompts)
    _readable("evaluate.neutral_text", job.evaluate.neutral_text)
    _readable("evaluate.validation_text", job.evaluate.validation_text)
    for behaviour in job.behaviours:
        _check_behaviour(behaviour)


def _check_behaviour(table: BehaviourTable) -> None:
    try:
        find(table.grader, table.grader_args)
    except UserError as err:
        raise UserError(f"behaviour {table.name!r}: {err}") from err
    if table.adapter is None and table.demonstrations is None:
        raise UserError(f"behaviour {table.name!r} has neither an adapter nor demonstrations to train one on; give one")
    if table.adapter is not None:
        Adapter.load(table.adapter)
    for key in ("demonstrations", "validation", "validation_not", "evaluation", "evaluation_not"):
        _readable(f"behaviour {table.name!r}, {key}", getattr(table, key))


def _readable(key: str, source: str | None) -> None:
    if not source:
        return
    try:
        PromptSet.load(source)
    except UserError as err:
        raise UserError(f"{key}: {err}") from err
