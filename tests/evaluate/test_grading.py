"""Answers in files: how they are read, graded and compared, from Python and by `workbench grade`."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from workbench.cli import app
from workbench.cli_grade import grader_args
from workbench.errors import UserError
from workbench.evaluate.answer_files import read_answers
from workbench.evaluate.grading import grade_answers
from workbench.evaluate.statistics import mcnemar, paired, wilson

TASK = "multistep_arithmetic_two"
GOLD = [3, 5, 7, 9, 11, 13]
BASE = ["3", "4", "so 7", "no", "11", "0"]
PASTE = ["is 3", "5", "7", "9", "12", "13"]


def rows(**columns: list[Any]) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def write(file: Path, table: list[dict[str, Any]]) -> Path:
    if file.suffix == ".csv":
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(table[0]))
            writer.writeheader()
            writer.writerows(table)
    elif file.suffix == ".parquet":
        pd.DataFrame(table).to_parquet(file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in table))
    return file


@pytest.fixture(params=[".csv", ".jsonl", ".parquet"])
def both(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Two arms beside each other, with their prompts and gold answers."""
    prompts = [f"what is number {i}?" for i in range(6)]
    return write(tmp_path / f"answers{request.param}", rows(prompt=prompts, gold=GOLD, base=BASE, paste=PASTE))


def workbench(*line: Any) -> Result:
    return CliRunner().invoke(app, [str(part) for part in line])


def said(*line: Any) -> dict[str, Any]:
    result = workbench("grade", *line, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def told(*line: Any) -> str:
    result = workbench("grade", *line)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture(scope="module")
def published(shared: Path) -> tuple[Path, Path]:
    """The published answers of Llama 3B to 8B, and the gold answers of their prompts."""
    folder = shared / "command-v-published"
    if not folder.is_dir():
        pytest.skip("the published Command-V answers are not among the shared fixtures")
    (answers,) = folder.glob(f"outputs/inferences/inferences_bbh/{TASK}*/*.csv")
    return answers, folder / f"prompts/maveriq--bigbenchhard/{TASK}/test.json"


def test_the_published_answers_grade_as_the_spec_counted_from_the_file_alone(published):
    answers, gold = published
    line = (answers, "--gold", gold, "--answer", "baseline", "--answer", "intervened", "--grader")
    strict = said(*line, "json_field")["arms"]
    assert (strict["baseline"]["passed"], strict["intervened"]["passed"]) == (3, 134)
    assert strict["intervened"]["rate"] == wilson(134, 250).as_dict()
    assert [round(strict[arm]["mean_chars"]) for arm in ("baseline", "intervened")] == [25, 347]
    assert said(*line, "json_field", "--arg", "lenient=true")["arms"]["intervened"]["passed"] == 135
    assert said(*line, "format_valid", "--arg", "field=ANSWER")["arms"]["intervened"]["passed"] == 232
    assert said(*line, "cjk")["arms"]["intervened"]["passed"] == 0
    assert "empty in every row" in told(
        answers, "--gold", gold, "--answer", "intervened_with_reppenal", "--grader", "json_field"
    )


def test_gold_rows_in_another_order_are_noticed(published, tmp_path):
    answers, gold = published
    items = json.loads(gold.read_text())
    turned = tmp_path / "turned.json"
    turned.write_text(json.dumps(items[1:] + items[:1]))
    assert "another order: the prompt of answer 0 is that of gold row 249" in told(
        answers, "--gold", turned, "--answer", "intervened", "--grader", "json_field"
    )


def test_two_columns_are_compared_prompt_by_prompt(both, tmp_path):
    found = said(both, "--answer", "base", "--answer", "paste", "--grader", "final_integer")
    first, second = found["arms"]["base"], found["arms"]["paste"]
    assert (first["passed"], second["passed"], first["n"]) == (3, 5, 6)
    assert first["paired_with_first"] is None
    verdicts = [b == g for b, g in zip([3, 4, 7, None, 11, 0], GOLD, strict=True)], [True] * 4 + [False, True]
    assert second["paired_with_first"] == paired(*verdicts).as_dict()
    assert second["paired_with_first"]["p"] == mcnemar(*verdicts)
    assert first["rate"] == wilson(3, 6).as_dict()
    shown = workbench("grade", both, "--answer", "base", "--answer", "paste", "--grader", "final_integer").stdout
    assert "3 of 6" in shown
    assert "McNemar" in shown


def test_two_files_are_compared_by_name_and_must_be_of_the_same_prompts(tmp_path):
    ids = list("abcdef")
    a = write(tmp_path / "base.jsonl", rows(id=ids, answer=BASE, gold=GOLD))
    b = write(tmp_path / "paste.csv", rows(id=ids, answer=PASTE))
    found = said(a, b, "--grader", "final_integer")["arms"]
    assert {name: arm["passed"] for name, arm in found.items()} == {"base": 3, "paste": 5}
    turned = write(tmp_path / "turned.csv", rows(id=ids[::-1], answer=PASTE[::-1]))
    assert "do not answer the same prompts in the same order: prompt 'a'" in told(
        a, turned, "--grader", "final_integer"
    )
    short = write(tmp_path / "short.csv", rows(id=ids[:3], answer=PASTE[:3]))
    assert "has 6 answers and" in told(a, short, "--grader", "final_integer")
    assert "both called 'base'" in told(a, a, "--grader", "length")


def test_gold_answers_come_from_another_file_by_id_or_in_order(tmp_path):
    ids = list("abcdef")
    answers = write(tmp_path / "answers.csv", rows(id=ids, response=PASTE))
    by_id = write(tmp_path / "gold.jsonl", rows(id=["z", *ids[::-1]], answer=[0, *GOLD[::-1]]))
    in_order = write(tmp_path / "gold.csv", rows(right=GOLD))
    assert said(answers, "--gold", by_id, "--grader", "final_integer")["arms"]["response"]["passed"] == 5
    line = (answers, "--grader", "final_integer", "--gold", in_order)
    assert said(*line, "--gold-column", "right")["arms"]["response"]["passed"] == 5
    assert "name one with --gold-column" in told(*line)
    few = write(tmp_path / "few.csv", rows(gold=GOLD[:2]))
    assert "2 gold answers for 6 answers, and no ids" in told(answers, "--gold", few, "--grader", "final_integer")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_verdicts_are_written_row_by_row(both, suffix, tmp_path):
    out = tmp_path / f"verdicts{suffix}"
    said(both, "--answer", "base", "--answer", "paste", "--grader", "final_integer", "--out", out)
    readers = {".jsonl": lambda f: pd.read_json(f, lines=True), ".csv": pd.read_csv, ".parquet": pd.read_parquet}
    frame = readers[suffix](out)
    assert len(frame) == 12
    assert frame.groupby("arm")["passed"].sum().to_dict() == {"base": 3, "paste": 5}
    assert frame["gold"].astype(int).tolist() == GOLD * 2
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([both.name, out.name])


def test_what_generate_prints_is_graded(tmp_path):
    printed = workbench("generate", "bundled:recipient", "--prompts", "bundled:evaluation_reasoning", "--limit", 4,
                        "--max-new-tokens", 3, "--json")  # fmt: skip
    assert printed.exit_code == 0, printed.output
    (tmp_path / "a.jsonl").write_text(printed.stdout)
    found = said(tmp_path / "a.jsonl", "--grader", "final_integer")["arms"]["answer"]
    assert found["n"] == 4


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["--grader", "final_integer"], "none of the columns answer, response"),
        (["--grader", "final_integer", "--answer", "pasted"], "has no column 'pasted'; it has prompt, gold, base"),
        (["--grader", "final", "--answer", "base"], "unknown grader 'final'; allowed: "),
        (["--grader", "length", "--answer", "base", "--arg", "at_least"], "write KEY=VALUE"),
        (["--grader", "length", "--answer", "base", "--arg", "least=2"], "takes no argument 'least'"),
        (["--grader", "length", "--answer", "base", "--arg", "at_least=x"], "cannot use its arguments"),
        (["--grader", "regex", "--answer", "base"], "needs the argument 'pattern'"),
        (["--grader", "length", "--answer", "base", "--out", "a.txt"], "allowed: .jsonl, .csv, .parquet"),
        (["--grader", "final_integer", "--answer", "base", "--gold-column", "right"], "has no column 'right'"),
        (["--grader", "language", "--answer", "base", "--arg", "script=runes"], "unknown script 'runes'"),
    ],
)
def test_bad_lines_are_refused_in_one(line, says, tmp_path):
    file = write(tmp_path / "a.csv", rows(prompt=["q"] * 6, gold=GOLD, base=BASE))
    assert says in told(file, *line)


def test_missing_answers_and_files_are_refused(tmp_path):
    assert "answers 'gone.csv': no such file" in told("gone.csv", "--grader", "length")
    null = write(tmp_path / "a.jsonl", [{"answer": "x"}, {"answer": None}])
    assert "row 1: no answer in column 'answer' (null)" in told(null, "--grader", "length")
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert "no rows with columns" in told(tmp_path / "a.txt", "--grader", "length")


def test_an_empty_cell_is_an_empty_answer(tmp_path):
    file = write(tmp_path / "a.csv", rows(prompt=["p", "q"], answer=["x", ""]))
    assert grade_answers(read_answers(file), "length").passed("answer") == [True, False]


def test_arguments_are_json_unless_the_grader_wants_a_text():
    assert grader_args("starts_with", ['openers=["a", "b"]']) == {"openers": ["a", "b"]}
    assert grader_args("regex", ["pattern=7=x", "must_not=null"]) == {"pattern": "7=x", "must_not": "null"}
    assert grader_args("length", ["at_most=3"]) == {"at_most": 3}


def test_paired_counts_add_up():
    a, b = [True, True, False, False, True], [True, False, True, False, False]
    found = paired(a, b)
    assert (found.both, found.only_a, found.only_b, found.neither) == (1, 2, 1, 1)
    assert found.p == paired(b, a).p == mcnemar(a, b)
    with pytest.raises(UserError, match="5 and 4 verdicts"):
        paired(a, b[:4])


def test_gold_rows_of_other_prompts_are_noticed_by_any_column_that_holds_the_question(tmp_path):
    questions = [f"is number {i} of the list odd" for i in range(6)]
    answers = write(tmp_path / "a.csv", rows(prompt=[f"Answer this: {q}?" for q in questions], answer=BASE))
    gold = rows(instruction=["Say it in digits"] * 6, input=[f"{q} =" for q in questions], target=GOLD)
    right, turned = write(tmp_path / "right.jsonl", gold), write(tmp_path / "turned.jsonl", gold[1:] + gold[:1])
    line = (answers, "--grader", "final_integer", "--gold")
    assert said(*line, right)["arms"]["answer"]["passed"] == 3
    assert "another order: the prompt of answer 0 is that of gold row 5" in told(*line, turned)
