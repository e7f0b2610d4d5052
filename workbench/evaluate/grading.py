"""Answers graded: how many of each arm passed, and in how many the arms differ."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..atomic import write_bytes
from ..errors import UserError
from .answer_files import Answers
from .graders import Verdict, verdicts
from .statistics import Interval, Paired, paired, rate

KINDS = (".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Grading:
    """The verdicts of one grader on every answer of every arm; the first arm is what the others are compared with."""

    grader: str
    args: Mapping[str, Any]
    answers: Answers
    verdicts: Mapping[str, tuple[Verdict, ...]]

    def passed(self, arm: str) -> list[bool]:
        """The verdicts of an arm, in the order of the prompts."""
        return [verdict.passed for verdict in self.verdicts[arm]]

    def rate(self, arm: str) -> Interval:
        """The share of an arm's answers that passed, with Wilson's interval."""
        return rate(self.passed(arm))

    def paired(self, arm: str) -> Paired:
        """The first arm (a) against another (b), on the same prompts."""
        return paired(self.passed(next(iter(self.verdicts))), self.passed(arm))

    def as_dict(self) -> dict[str, Any]:
        """The grading as JSON: for each arm n, passed, rate, mean_chars, and for all but the first the paired test."""
        arms: dict[str, Any] = {}
        for arm in self.verdicts:
            texts = self.answers.arms[arm]
            arms[arm] = {
                "n": len(texts),
                "passed": sum(self.passed(arm)),
                "rate": self.rate(arm).as_dict(),
                "mean_chars": sum(map(len, texts)) / len(texts),
                "paired_with_first": self.paired(arm).as_dict() if len(arms) else None,
            }
        return {"grader": self.grader, "args": dict(self.args), "arms": arms}

    def rows(self) -> list[dict[str, Any]]:
        """One row for each answer: its prompt, arm, answer, gold answer, verdict and score."""
        return [
            {"id": prompt.id, "arm": arm, "prompt": prompt.text, "answer": answer,
             "gold": None if prompt.meta.get("gold") is None else str(prompt.meta["gold"]), "passed": verdict.passed,
             "score": verdict.score}
            for arm, found in self.verdicts.items()
            for prompt, answer, verdict in zip(self.answers.prompts, self.answers.arms[arm], found, strict=True)
        ]  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Writes `rows` as .jsonl, .csv or .parquet; raises UserError for another kind of file."""
        path = Path(path)
        check_kind(path)
        if path.suffix.lower() == ".jsonl":
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows())
            return write_bytes(path, "".join(lines).encode())
        import pandas as pd

        frame = pd.DataFrame(self.rows())
        if path.suffix.lower() == ".csv":
            return write_bytes(path, frame.to_csv(index=False).encode())
        buffer = io.BytesIO()
        frame.to_parquet(buffer, index=False)
        write_bytes(path, buffer.getvalue())


def check_kind(path: Path) -> None:
    """UserError for a file that verdicts are not written to."""
    if path.suffix.lower() not in KINDS:
        raise UserError(f"verdicts are not written to {path.name!r}; allowed: {', '.join(KINDS)}")


def grade_answers(answers: Answers, grader: str, **args: Any) -> Grading:
    """Asks one grader for its verdict on every answer of every arm.

    Raises UserError as `graders.grade` does, and for arguments that the grader cannot use.

    >>> from workbench.prompts import Prompt
    >>> given = Answers((Prompt(None, "7 + 8", "a", meta={"gold": 15}),), {"base": ("14",), "paste": ("so 15",)})
    >>> grade_answers(given, "final_integer").passed("paste")
    [True]
    """
    try:
        found = {arm: tuple(verdicts(grader, texts, answers.prompts, **args)) for arm, texts in answers.arms.items()}
    except TypeError as err:
        raise UserError(f"grader {grader!r} cannot use its arguments {args}: {err}") from err
    return Grading(grader, args, answers, found)
