from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from workbench.errors import UserError
from workbench.evaluate import graders, registry
from workbench.evaluate.graders import grade, repeated_share
from workbench.evaluate.statistics import rate
from workbench.prompts import Prompt

PAPER = "command-v-published"
TASK = "multistep_arithmetic_two"


def prompt(gold: str | None = None, **kw) -> Prompt:
    return Prompt(messages=None, text="q", id="q1", meta={} if gold is None else {"gold": gold}, **kw)


def verdict(name: str, answer: str, gold: str | None = None, **args) -> bool:
    return grade(name, [answer], [prompt(gold)], **args)[0]


@pytest.fixture(scope="module")
def published(shared: Path) -> tuple[list[dict], list[Prompt]]:
    """The published answers to 250 arithmetic prompts, Llama 3B to 8B, and their prompts with gold answers."""
    if not (shared / PAPER).is_dir():
        pytest.skip(f"the published Command-V answers ({PAPER}) are not among the shared fixtures")
    (answers,) = (shared / PAPER).glob(f"outputs/inferences/inferences_bbh/{TASK}*/*.csv")
    rows = list(csv.DictReader(answers.open(newline="", encoding="utf-8")))
    items = json.loads((shared / PAPER / f"prompts/maveriq--bigbenchhard/{TASK}/test.json").read_text())
    return rows, [Prompt(None, i["input"], str(n), meta={"gold": i["target"]}) for n, i in enumerate(items)]


@pytest.mark.parametrize(
    ("column", "lenient", "right"),
    [("intervened", False, 134), ("intervened", True, 135), ("baseline", False, 3)],
)
def test_published_answers_grade_as_the_spec_counted(published, column, lenient, right):
    rows, prompts = published
    assert len(rows) == len(prompts) == 250
    assert sum(grade("json_field", [r[column] for r in rows], prompts, lenient=lenient)) == right


def test_published_format_and_drift(published):
    rows, prompts = published
    answers = [r["intervened"] for r in rows]
    assert rate(grade("format_valid", answers, prompts, field="ANSWER")).value == pytest.approx(0.928)
    assert not any(grade("cjk", answers, prompts))


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("the answer is 7", "7", True),
        ("3 plus 4 is 7 , so 17", "7", False),
        ("= -12.", "-12", True),
        ("it is 1,024, surely", "1024", True),
        ("no idea", "7", False),
    ],
)
def test_final_integer(answer, gold, right):
    assert verdict("final_integer", answer, gold) is right


@pytest.mark.parametrize(
    ("answer", "gold", "strict", "lenient"),
    [
        ('{"ANSWER": 1} or rather {"ANSWER": "1,002"}', "1002", True, True),
        ('{"ANSWER": 5} {"ANSWER": $INTEGER}', "5", True, True),
        ("so it is 5", "5", False, True),
        ('{"answer": 5}', "5", False, True),
        ("so it is (b)", "(B)", False, True),
        ('{"ANSWER": "b"}', "B", True, True),
        ('{"ANSWER": {"ANSWER": 3}}', "3", True, True),
        ('{"ANSWER": 6} 5', "5", False, False),
        ('{"ANSWER": 5.0}', "5", True, True),
        ("", "5", False, False),
    ],
)
def test_json_field(answer, gold, strict, lenient):
    assert verdict("json_field", answer, gold) is strict
    assert verdict("json_field", answer, gold, lenient=True) is lenient


def test_other_graders():
    assert verdict("choice_letter", "not (A), so (C)", "C")
    assert verdict("choice_letter", "B", "B")
    assert not verdict("choice_letter", "I'd say D", "I")
    assert verdict("regex", "Ahoy there", pattern=r"\bahoy\b")
    assert not verdict("regex", "Ahoy, sorry", pattern="ahoy", must_not="sorry")
    assert verdict("starts_with", "  Let me think", openers=["let me"])
    assert verdict("refusal", "I\u2019m sorry, but no")
    assert not verdict("refusal", "sure , sorry for asking")
    assert verdict("length", "one two three", at_least=2, at_most=3)
    assert not verdict("length", "", at_least=1)
    assert verdict("format_valid", "x: 3", pattern=r"x: \d")
    assert not verdict("format_valid", "x: 3 y", pattern=r"x: \d")
    assert not verdict("format_valid", "  ")
    assert verdict("repetition", "ha ha ha ha ha ha ha ha ha ha")
    assert not verdict("repetition", "every word of this answer is new and stands once")
    assert verdict("cjk", "so 答案 is 3")
    assert repeated_share("one two", n=4) == 0


def test_register_adds_and_refuses_a_taken_name(monkeypatch):
    monkeypatch.setattr(registry, "GRADERS", dict(registry.GRADERS))
    graders.register("shouting")(lambda answer, prompt: answer.isupper())
    assert grade("shouting", ["HA", "ha"], [prompt(), prompt()]) == [True, False]
    with pytest.raises(UserError, match="'shouting' is registered"):
        graders.register("shouting")(lambda answer, prompt: True)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: grade("finale", ["1"], [prompt("1")]), "unknown grader 'finale'; allowed: .*final_integer"),
        (lambda: grade("json_field", ["1"], [prompt("1")], feild="A"), "'feild'; allowed: field, lenient"),
        (lambda: grade("regex", ["1"], [prompt("1")]), "needs the argument 'pattern'"),
        (lambda: grade("regex", ["1"], [prompt("1")], pattern="("), "not a regular expression"),
        (lambda: grade("final_integer", ["1"], [prompt()]), "'q1' has no 'gold'"),
        (lambda: grade("final_integer", ["1", "2"], [prompt("1")]), "2 answers do not pair with 1 prompts"),
    ],
)
def test_bad_input_names_the_value(call, says):
    with pytest.raises(UserError, match=says):
        call()
