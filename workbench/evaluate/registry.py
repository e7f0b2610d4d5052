"""The graders by name: how one is registered, found, and asked for its verdicts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from ..prompts import Prompt

Grader = Callable[..., Any]
GRADERS: dict[str, Grader] = {}
BATCH: set[str] = set()
"""the graders that are given all answers at once"""


@dataclass(frozen=True)
class Verdict:
    """Whether an answer passed, and the number that decided it, where there is one (a probability, log-odds)."""

    passed: bool
    score: float | None = None


def register(name: str) -> Callable[[Grader], Grader]:
    """Adds a grader `fn(answer, prompt, **args) -> bool` under `name`; raises UserError when the name is taken."""

    def add(fn: Grader) -> Grader:
        if name in GRADERS:
            raise UserError(f"a grader named {name!r} is registered already; choose another name")
        GRADERS[name] = fn
        return fn

    return add


def register_batch(name: str) -> Callable[[Grader], Grader]:
    """As `register`, for `fn(answers, prompts, **args)` that returns a bool or a `Verdict` for each answer, in order."""

    def add(fn: Grader) -> Grader:
        register(name)(fn)
        BATCH.add(name)
        return fn

    return add


def grade(name: str, answers: Sequence[str], prompts: Iterable[Prompt], **args: Any) -> list[bool]:
    """Grades answers in the order of their prompts.

    Raises UserError for an unknown grader or argument, for lists of different lengths, and for a prompt without the
    gold answer that the grader needs.

    >>> from workbench.evaluate.graders import grade
    >>> grade("final_integer", ["7 plus 8 is 15"], [Prompt(messages=None, text="7 + 8", id="a", meta={"gold": "15"})])
    [True]
    """
    return [verdict.passed for verdict in verdicts(name, answers, prompts, **args)]


def verdicts(name: str, answers: Sequence[str], prompts: Iterable[Prompt], **args: Any) -> list[Verdict]:
    """As `grade`, with the score of each answer where the grader gives one."""
    fn = find(name, args)
    prompts = list(prompts)
    if len(answers) != len(prompts):
        raise UserError(f"{len(answers)} answers do not pair with {len(prompts)} prompts; give one answer per prompt")
    if name not in BATCH:
        return [Verdict(bool(fn(answer, prompt, **args))) for answer, prompt in zip(answers, prompts, strict=True)]
    found = list(fn(list(answers), prompts, **args)) if answers else []
    if len(found) != len(answers):
        raise UserError(
            f"grader {name!r} gave {len(found)} verdicts for {len(answers)} answers; it must give one for each"
        )
    return [one if isinstance(one, Verdict) else Verdict(_sure(name, one)) for one in found]


def _sure(name: str, verdict: Any) -> bool:
    """A bool as it is; a number is refused, since nobody has said from where on it passes."""
    if type(verdict).__name__ not in ("bool", "bool_"):
        raise UserError(
            f"grader {name!r} gave {verdict!r:.40}; it must give a bool or a Verdict(passed, score) for each"
        )
    return bool(verdict)


def find(name: str, args: Iterable[str] = ()) -> Grader:
    """The grader of that name, once it is known to take `args`; UserError names what is allowed."""
    if name not in GRADERS:
        raise UserError(f"unknown grader {name!r}; allowed: {', '.join(sorted(GRADERS))}")
    known = list(inspect.signature(GRADERS[name]).parameters.values())[2:]
    if not any(p.kind is p.VAR_KEYWORD for p in known):
        for arg in args:
            if arg not in {p.name for p in known}:
                allowed = ", ".join(p.name for p in known) or "none"
                raise UserError(f"grader {name!r} takes no argument {arg!r}; allowed: {allowed}")
    for p in known:
        if p.default is p.empty and p.kind is p.KEYWORD_ONLY and p.name not in set(args):
            raise UserError(f"grader {name!r} needs the argument {p.name!r}; give it in grader_args")
    return GRADERS[name]


def gold(prompt: Prompt) -> str:
    """The right answer of a prompt; UserError where it has none."""
    if prompt.meta.get("gold") is None:
        raise UserError(f"prompt {prompt.id!r} has no 'gold' answer to grade against; add a gold column to the prompts")
    return str(prompt.meta["gold"])
