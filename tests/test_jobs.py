"""Job files: what is refused and how it is told, there and back through TOML, and steps that are kept or done again."""

from __future__ import annotations

import io
import json
import logging
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from workbench import jobs_docs
from workbench.errors import UserError
from workbench.job_checks import check_job
from workbench.job_options import open_job
from workbench.jobs import Job
from workbench.runs import Run

from .conftest import ROOT

BEHAVIOUR = {
    "name": "refusal",
    "openers": ["sorry"],
    "grader": "refusal",
    "validation": "v.jsonl",
    "evaluation": "e.jsonl",
}
SMALLEST: dict[str, Any] = {"donor": {"model": "a"}, "recipient": {"model": "b"}, "behaviours": [BEHAVIOUR]}


def changed(**tables: Any) -> dict[str, Any]:
    return {**SMALLEST, **tables}


def job_file(folder: Path, data: dict[str, Any] | str) -> Path:
    path = folder / "job.toml"
    path.write_text(data if isinstance(data, str) else tomli_w.dumps(data))
    return path


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (changed(speed=3), ["unknown key 'speed'", "allowed here", "behaviours"]),
        (changed(paste={"mtach": "floor"}), ["unknown key 'paste.mtach'", "match", "max_sigma"]),
        (changed(behaviours=[{**BEHAVIOUR, "gradr": "x"}]), ["unknown key 'behaviours.0.gradr'", "grader_args"]),
        (changed(paste={"match": "middle"}), ["paste.match", "'middle'", "forecast", "nearest", "docs/jobs.md"]),
        (changed(profile={"holdout": 1.5}), ["profile.holdout", "1.5", "less than 1"]),
        (changed(training={"rank": 0}), ["training.rank", "given: 0"]),
        (changed(behaviours=[]), ["behaviours", "at least 1"]),
        (changed(name="../out"), ["name", "'../out'"]),
        (changed(behaviours=[{**BEHAVIOUR, "name": "a/b"}]), ["behaviours.0.name", "'a/b'"]),
        ({k: v for k, v in SMALLEST.items() if k != "donor"}, ["donor", "required"]),
        ("name = [", ["not valid TOML", "job.toml"]),
    ],
)
def test_a_bad_job_is_told_in_one_line(tmp_path, data, words):
    with pytest.raises(UserError) as caught:
        Job.load(job_file(tmp_path, data))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_job_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"gone\.toml"):
        Job.load(tmp_path / "gone.toml")
    with pytest.raises(UserError, match="job file"):
        Job.load(tmp_path)


def test_to_toml_and_back(tmp_path):
    given = changed(
        seed=7, paste={"match": "floor", "alphas": [0.5], "strength": 2.0}, training={"layers": [1, 2]},
        evaluate={"dose": [], "limit": 5}, behaviours=[{**BEHAVIOUR, "grader_args": {"openers": ["no"]}}],
    )  # fmt: skip
    job = Job.parse(given)
    written = job.text
    assert Job.load(job_file(tmp_path, written)) == job
    assert Job.parse(tomllib.loads(written)).paste.strength == 2.0


def test_what_is_turned_off_stays_off_through_toml(tmp_path):
    job = Job.parse(changed(evaluate={"neutral_text": "", "validation_text": "", "native": False}))
    back = Job.load(job_file(tmp_path, job.text))
    assert not back.evaluate.neutral_text
    assert not back.evaluate.validation_text


def test_options_of_the_command_line_replace_what_the_file_says(tmp_path):
    donor = {"model": "a", "dtype": "float32", "revision": "abc", "blocks": "model.layers"}
    path = job_file(tmp_path, changed(donor=donor))
    job = open_job(path, donor="elsewhere", out=tmp_path / "o", seed=3)
    assert (job.donor.model, job.donor.dtype, job.donor.revision, job.donor.blocks) == (
        "elsewhere",
        "float32",
        None,
        None,
    )
    assert (job.recipient.model, job.folder, job.seed) == ("b", tmp_path / "o" / "job", 3)
    assert open_job(path) == Job.load(path)
    quick = open_job(path, quick=True)
    assert quick.name == "job-quick"
    assert quick.evaluate.draws < job.evaluate.draws
    assert Job.parse(quick.model_dump()) == quick


def test_the_bundled_job_is_a_job():
    job = open_job("bundled:demo")
    assert (job.name, job.folder) == ("demo", Path("runs/demo"))
    with pytest.raises(UserError, match="allowed: bundled:demo"):
        open_job("bundled:other")


class Maker:
    """Counts how often a step is really done."""

    def __init__(self, run: Run, result: Any = 1) -> None:
        self.run, self.result, self.done = run, result, 0

    def __call__(self) -> Any:
        self.done += 1
        (self.run.folder / "made").mkdir(parents=True, exist_ok=True)
        return self.result


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def test_a_step_is_kept_for_the_same_inputs_and_done_again_for_others(run):
    make = Maker(run, {"value": 3})
    for _ in range(2):
        assert run.step("fit", {"alpha": 0.1}, make, ("made",)) == {"value": 3}
    assert make.done == 1
    Run(run.folder).step("fit", {"alpha": 0.1}, make, ("made",))
    assert make.done == 1
    run.step("fit", {"alpha": 0.2}, make, ("made",))
    assert make.done == 2
    run.step("other", {"alpha": 0.2}, make, ("made",))
    assert make.done == 3


def test_a_step_whose_artefact_is_gone_is_done_again(run):
    make = Maker(run)
    run.step("fit", 1, make, ("made",))
    (run.folder / "made").rmdir()
    run.step("fit", 1, make, ("made",))
    assert make.done == 2


def test_a_damaged_record_is_done_again(run):
    make = Maker(run)
    run.step("fit", 1, make)
    (run.folder / "steps" / "fit.json").write_text('{"key": ')
    run.step("fit", 1, make)
    assert make.done == 2


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(bytes(data))


class Writer(Maker):
    """A maker that leaves a folder of files."""

    def __call__(self) -> Any:
        for name in ("a.bin", "deep/b.bin"):
            file = self.run.folder / "made" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(name.encode() * 40)
        return super().__call__()


@pytest.mark.parametrize("name", ["made/a.bin", "made/deep/b.bin", "steps/fit.json"])
def test_one_bit_that_is_not_as_it_was_is_noticed(run, caplog, name):
    make = Writer(run, {"value": 0.123456789})
    run.step("fit", 1, make, ("made",))
    run.step("fit", 1, make, ("made",))
    assert make.done == 1
    whole = (run.folder / name).read_bytes()
    flipped(run.folder / name)
    assert run.step("fit", 1, make, ("made",)) == {"value": 0.123456789}
    assert make.done == 2
    if name.startswith("made"):
        assert (run.folder / name).read_bytes() == whole
        assert "is not what its step had made; the step is done again" in caplog.text


def test_a_file_that_came_to_an_artefact_is_noticed(run):
    make = Writer(run)
    run.step("fit", 1, make, ("made",))
    (run.folder / "made" / "more").write_text("x")
    run.step("fit", 1, make, ("made",))
    assert make.done == 2


@pytest.mark.parametrize("name", ["made/a.bin", "made/deep/b.bin"])
def test_what_another_run_made_is_not_taken_over_where_it_is_damaged(run, tmp_path, name):
    other = Run(tmp_path / "other")
    other.step("fit", 1, Writer(other), ("made",))
    taken = Writer(run)
    Run(run.folder, [other.folder]).step("fit", 1, taken, ("made",))
    assert taken.done == 0
    flipped(other.folder / name)
    third = Run(tmp_path / "third", [other.folder])
    anew = Writer(third)
    third.step("fit", 1, anew, ("made",))
    assert anew.done == 1


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (
            OSError(28, "No space left on device"),
            "step fit: .*No space left on device; what was finished is kept: make room",
        ),
        (
            OSError(30, "Read-only file system", "/x/y"),
            "step fit: /x/y: Read-only file system; .*choose another folder",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            r"step fit: out of memory \(CUDA out of memory.\); .*smaller batches",
        ),
        (MemoryError(), "step fit: out of memory"),
    ],
)
def test_what_the_machine_lacks_is_told_with_the_step_and_what_to_do(run, raised, words):
    def fail() -> None:
        raise raised

    with pytest.raises(UserError, match=words):
        run.step("fit", 1, fail)


def test_an_error_of_ours_stays_what_it_is(run):
    def fail() -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match=r"^shapes differ$"):
        run.step("fit", 1, fail)


class Full(io.StringIO):
    def write(self, _: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_log_without_room_does_not_stop_a_run(run, monkeypatch, capfd):
    run.folder.mkdir()
    with run.logging():
        handler = next(h for h in logging.getLogger("workbench").handlers if isinstance(h, logging.FileHandler))
        with monkeypatch.context() as patch:
            patch.setattr(handler, "stream", Full())
            logging.getLogger("workbench").info("a line")
    assert capfd.readouterr().err == ""


def test_a_step_of_another_version_is_done_again(run, monkeypatch):
    make = Maker(run)
    run.step("fit", 1, make)
    monkeypatch.setattr("workbench.__version__", "99.0")
    run.step("fit", 1, make)
    assert make.done == 2


def test_a_step_that_fails_is_named_and_leaves_the_earlier_ones(run):
    first = Maker(run)
    run.step("profile", 1, first)

    def fail() -> None:
        raise UserError("layer 9 is out of range")

    with pytest.raises(UserError, match="step fit: layer 9 is out of range"):
        run.step("fit", 1, fail)
    assert not (run.folder / "steps" / "fit.json").exists()
    run.step("profile", 1, first)
    assert first.done == 1
    second = Maker(run, 5)
    assert run.step("fit", 1, second) == 5
    assert json.loads((run.folder / "steps" / "fit.json").read_text())["result"] == 5


def test_the_result_of_a_kept_step_is_what_it_was(run):
    """The first return must already be what a later run reads back: tuples are lists, keys are strings."""
    made = run.step("fit", 1, lambda: {"pairs": [[0, 1]], "x": None})
    assert made == run.step("fit", 1, Maker(run))


def test_a_stop_is_in_the_log(run):
    run.folder.mkdir()
    with pytest.raises(KeyboardInterrupt), run.logging():
        raise KeyboardInterrupt
    assert "the run stopped" in (run.folder / "log.txt").read_text()


def test_the_reference_of_the_job_file_is_up_to_date():
    """Where this fails: workbench job --reference > docs/jobs.md"""
    assert (ROOT / "docs" / "jobs.md").read_text(encoding="utf-8") == jobs_docs.reference()


def test_the_reference_names_every_key():
    text = jobs_docs.reference()
    for _, table in jobs_docs.TABLES:
        for name, field in table.model_fields.items():
            assert f"| `{name}` |" in text
            assert field.description, f"{table.__name__}.{name} has no docstring"


def test_the_example_in_the_reference_is_a_job():
    example = jobs_docs.INTRO.split("```toml\n")[1].split("```")[0]
    assert Job.parse(tomllib.loads(example)).behaviours[0].name == "refusal"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"grader": "regex", "grader_args": {"pattern": "("}}, "pattern"),
        ({"openers": [""]}, "needs openers"),
        ({"grader": "final_integer", "grader_args": {}}, "no 'gold' answer"),
        ({"validation": "bundled:evaluation_refusal"}, "320 prompts are both in validation"),
        ({"demonstrations": "bundled:validation_refusal", "adapter": None}, "has no response"),
    ],
)
def test_what_can_be_known_of_a_job_is_told_before_anything_is_loaded(change, said):
    job = open_job("bundled:demo")
    table = next(b for b in job.behaviours if b.name == "refusal").model_copy(update=change)
    with pytest.raises(UserError, match=said):
        check_job(job.model_copy(update={"behaviours": [table]}))


@pytest.mark.parametrize("name", ["..", ".", "a/b", ".hidden", ""])
def test_a_job_is_not_named_like_a_way_out_of_its_folder(name):
    with pytest.raises(UserError, match="name"):
        Job.parse({**open_job("bundled:demo").model_dump(exclude_none=True), "name": name})


@pytest.mark.parametrize(
    "tables", [{"seed": -1}, {"seed": 2**70}, {"paste": {"alphas": [-1.0]}}, {"paste": {"max_sigma": float("nan")}}]
)
def test_numbers_out_of_range_are_refused(tables):
    with pytest.raises(UserError, match=r"seed|alphas|max_sigma"):
        Job.parse({**open_job("bundled:demo").model_dump(exclude_none=True), **tables})


def test_a_step_whose_artefact_is_damaged_is_done_again(run):
    calls = []

    def make():
        calls.append(1)
        run.folder.mkdir(exist_ok=True)
        (run.folder / "thing").write_text("whole")
        return {}

    def whole(path):
        if path.read_text() != "whole":
            raise UserError("thing is damaged")

    for content in (None, "bro", None):
        if content:
            (run.folder / "thing").write_text(content)
        run.step("one", 1, make, ("thing",), whole)
    assert len(calls) == 2
    (run.folder / "steps" / "one.json").write_text("[1, 2]")
    run.step("one", 1, make, ("thing",), whole)
    assert len(calls) == 3
