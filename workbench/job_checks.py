"""What can be known to be wrong with a job before any model is loaded and anything is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .adapters.adapter import Adapter
from .backends.torch_hooks import check_policy
from .errors import UserError
from .evaluate.behaviour import Behaviour
from .evaluate.graders import grade
from .evaluate.idleness import silent
from .evaluate.registry import BATCH
from .hashes import json_hash
from .prompts import PromptSet

if TYPE_CHECKING:
    from .jobs import BehaviourTable, Job, TrainingTable


def check_job(job: Job) -> None:
    """Raises UserError, naming the key, for prompts and adapters that cannot be read, unknown graders and double names."""
    names = [b.name for b in job.behaviours]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise UserError(f"two behaviours are named {twice!r}; give each a name of its own")
    _check_training(job.training)
    _readable("profile.prompts", job.profile.prompts)
    _readable("evaluate.neutral_text", job.evaluate.neutral_text)
    _readable("evaluate.validation_text", job.evaluate.validation_text)
    for behaviour in job.behaviours:
        _check_behaviour(behaviour)


def _check_training(table: TrainingTable) -> None:
    try:
        check_policy(table.positions)
    except UserError as err:
        raise UserError(f"training.positions: {err}") from err
    if table.patience is not None and not table.validation:
        raise UserError("training.patience needs demonstrations to validate on; give training.validation, 0.1 say")


def _check_behaviour(table: BehaviourTable) -> None:
    try:
        Behaviour(table.name, tuple(table.openers), table.grader, table.grader_args)
    except UserError as err:
        raise UserError(f"behaviour {table.name!r}: {err}") from err
    if table.adapter is None and table.demonstrations is None:
        raise UserError(f"behaviour {table.name!r} has neither an adapter nor demonstrations to train one on; give one")
    if table.adapter is not None and (said := silent(Adapter.load(table.adapter))):
        raise UserError(f"behaviour {table.name!r}, {table.adapter}: {said}")
    for key in ("demonstrations", "validation", "validation_not", "evaluation", "evaluation_not"):
        _readable(f"behaviour {table.name!r}, {key}", getattr(table, key))
    _check_sets(table)


def _check_sets(table: BehaviourTable) -> None:
    """What the sets of a behaviour must be to each other, and to its grader."""
    where = f"behaviour {table.name!r}"
    evaluation = PromptSet.load(table.evaluation)
    try:
        tried = evaluation[:1] if table.grader in BATCH else evaluation  # a model that judges takes its time
        grade(table.grader, ["0"] * len(tried), tried, **table.grader_args)
    except UserError as err:
        raise UserError(f"{where}: {err}") from err
    except TypeError as err:
        raise UserError(
            f"{where}: grader {table.grader!r} cannot use its arguments {table.grader_args}: {err}"
        ) from err
    shared = _contents(evaluation) & _contents(PromptSet.load(table.validation))
    if shared:
        raise UserError(f"{where}: {len(shared)} prompts are both in validation, which choices are made on, and in "
                        "evaluation; keep the two apart")  # fmt: skip
    if table.demonstrations is not None:
        dumb = [p.id for p in PromptSet.load(table.demonstrations) if not p.meta.get("response")]
        if dumb:
            raise UserError(
                f"{where}: demonstration {dumb[0]!r} has no response; each line needs a 'response' to learn from"
            )
        _check_positives(table, where)


def _check_positives(table: BehaviourTable, where: str) -> None:
    """UserError where no demonstration shows the behaviour: none begins as an opener does, and none passes the grader."""
    demonstrations = PromptSet.load(table.demonstrations or "")
    answers = [str(p.meta["response"]) for p in demonstrations]
    openers = tuple(o.strip().lower() for o in table.openers)
    if any(answer.strip().lower().startswith(openers) for answer in answers) or table.grader in BATCH:
        return
    try:
        shown = any(grade(table.grader, answers, demonstrations, **table.grader_args))
    except UserError:  # demonstrations need not have what the grader compares with
        shown = False
    if not shown:
        raise UserError(f"{where}: none of its {len(answers)} demonstrations shows it: no response begins with "
                        f"{', '.join(map(repr, table.openers))[:120]} or passes {table.grader!r}; give some "
                        "that do")  # fmt: skip


def _contents(prompts: PromptSet) -> set[str]:
    return {json_hash(p.content) for p in prompts}


def _readable(key: str, source: str | None) -> None:
    if not source:
        return
    try:
        PromptSet.load(source)
    except UserError as err:
        raise UserError(f"{key}: {err}") from err
