"""The command line on small random models: what each verb makes and prints, and how bad input is told."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomli_w
import torch
from typer.testing import CliRunner, Result

from workbench import cli_errors
from workbench.adapters.adapter import Adapter, LowRank, vector
from workbench.cli import app
from workbench.cli_values import layer_list
from workbench.converter_files import load_converters
from workbench.errors import UserError
from workbench.evaluate.graders import GRADERS
from workbench.paste import paste_adapter
from workbench.profile.sums import load_moments, moments_bytes
from workbench.sites import Site
from workbench.store import Store

from .conftest import LAYERS, WIDTH, make_module, save_folder
from .metrics_example import metrics

PROMPTS = 40


def workbench(*line: Any) -> Result:
    return CliRunner().invoke(app, [str(part) for part in line])


def good(*line: Any) -> Result:
    result = workbench(*line)
    assert result.exit_code == 0, result.output
    return result


def told(result: Result, *words: str) -> str:
    """The one line of an error: exit code 2, no traceback, nothing on stdout."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith("loaded ")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in result.output
    assert result.stdout == ""
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


def tree(folder: Path) -> set[str]:
    """Everything under a folder, hidden files included."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, a prompt set, their profiles, converters and a donor's adapter, all made through the command line."""
    home = tmp_path_factory.mktemp("cli")
    save_folder(make_module("llama"), home / "donor")
    save_folder(make_module("gpt2", seed=1), home / "recipient")
    (home / "prompts.txt").write_text("".join(f"w{i} w{3 * i % 50} w{i % 7}\n" for i in range(PROMPTS)))
    for side in ("donor", "recipient"):
        good("profile", home / side, "--prompts", home / "prompts.txt", "--out", home / f"{side}-store")
    good("convert", home / "donor-store", home / "recipient-store", "--out", home / "converters")
    noise = torch.Generator().manual_seed(0)
    part = LowRank(*(torch.randn(*shape, generator=noise) for shape in ((WIDTH, 2), (2,), (2, WIDTH))))
    fingerprint = Store.open(home / "donor-store").fingerprint
    Adapter({Site(1): part}, name="test", base=fingerprint).save(home / "adapter")
    good("paste", home / "adapter", home / "converters", "--out", home / "pasted")
    return home


# -- what the verbs make ----------------------------------------------------------------------------------------------


def test_profile_makes_a_store(home, tmp_path):
    result = good("profile", home / "donor", "--prompts", home / "prompts.txt", "--out", tmp_path / "s", "--layers", "0,-1",
                  "--limit", 5, "--store-dtype", "float16", "--json")  # fmt: skip
    said = json.loads(result.stdout)
    store = Store.open(tmp_path / "s")
    assert [str(s) for s in store.sites] == said["sites"] == ["resid_post.0", f"resid_post.{LAYERS - 1}"]
    assert (store.n_rows, said["rows"], store.dtype) == (5, 5, "float16")
    sites = good("profile", home / "donor", "--prompts", home / "prompts.txt", "--out", tmp_path / "t", "--sites",
                 "resid_pre.1, blocks.2.hook_resid_post", "--quiet")  # fmt: skip
    assert "resid_post.2" in sites.stdout
    assert sites.stderr == ""


def test_profile_tells_its_cost_and_writes_nothing(home, tmp_path):
    line = profile_line(home, tmp_path / "s", tokens="all")
    text = good(*line, "--dry-run").stdout
    for word in ("rows of 40 prompts", "MiB to write", "padding", "an estimate"):
        assert word in text
    said = json.loads(good(*line, "--dry-run", "--json").stdout)
    assert said["prompts"] == PROMPTS
    assert said["bytes"] == said["rows"] * LAYERS * WIDTH * 4
    assert tree(tmp_path) == set()
    sums = json.loads(good(*line, "--dry-run", "--moments", "--folds", 2, "--pairs", "none", "--json").stdout)
    assert sums["bytes"] == moments_bytes(dict.fromkeys(said["sites"], WIDTH), [], 2)
    assert "MiB of sums to hold" in good(*line, "--dry-run", "--moments").stdout
    assert tree(tmp_path) == set()


def test_profile_keeps_moments_alone(home, tmp_path):
    line = profile_line(home, tmp_path / "m", tokens="all", layers="0,2")
    said = json.loads(good(*line, "--moments", "--folds", 4, "--seed", 1, "--json").stdout)
    assert (len(said["folds"]), sum(said["folds"])) == (4, said["rows"])
    assert [m.n for m in load_moments(tmp_path / "m")] == said["folds"]
    good(*profile_line(home, tmp_path / "p"), "--moments", "--pairs", "0:2")
    assert len(load_moments(tmp_path / "p")[0].product) == LAYERS + 1
    told(workbench(*profile_line(home, tmp_path / "n"), "--folds", 4), "--folds is of --moments alone")
    told(workbench(*profile_line(home, tmp_path / "n"), "--pairs", "none"), "--pairs is of --moments alone")
    told(
        workbench(*profile_line(home, tmp_path / "n"), "--moments", "--pairs", "0-2"), "cannot read '0-2' in the pairs"
    )


def test_profile_reads_prompts_as_it_is_told(home, tmp_path):
    line = {"limit": 7, "stride": 3, "max-length": 5, "tokens": "all"}
    good(*profile_line(home, tmp_path / "plain", seed=3, **line), "--plain", "--allow-nonfinite")
    good(*profile_line(home, tmp_path / "chat", system="w9", **line), "--chat")
    plain, chat = Store.open(tmp_path / "plain"), Store.open(tmp_path / "chat")
    first = (home / "prompts.txt").read_text().splitlines()[:7]
    assert chat.prompts()["text"].tolist() == [f"<s><system> w9 <user> {t} <assistant>" for t in first]
    assert len(plain.prompt_set()) == 7
    assert plain.prompts()["text"].tolist() != first
    assert chat.manifest["options"]["stride"] == 3


def test_convert_prints_the_quality_beside_its_baselines_and_saves(home, tmp_path):
    result = good("convert", home / "donor-store", home / "recipient-store", "--out", tmp_path / "c", "--donor-layers", "1-2",
                  "--alpha", "cv", "--match", "r2")  # fmt: skip
    for word in ("R2", "R2 mean", "R2 same", "cycle", "donor resid_post.1", "2 converters"):
        assert word in result.stdout
    made = load_converters(tmp_path / "c")
    assert [c.donor for c in made] == [Site(1), Site(2)]
    assert made.donor == Store.open(home / "donor-store").fingerprint
    assert made.recipient == Store.open(home / "recipient-store").fingerprint
    assert made.prompt_hash == Store.open(home / "donor-store").prompt_hash


def test_convert_says_where_prompts_are_too_few(home, tmp_path):
    result = good("convert", home / "donor-store", home / "recipient-store", "--out", tmp_path / "c", "--method", "pinv",
                  "--json")  # fmt: skip
    maps = json.loads(result.stdout)["maps"]
    assert len(maps) == 2 * LAYERS
    assert all("n/d = 32/48 = 0.67 is below 1: pinv" in row["warning"] for row in maps)
    assert {row["method"] for row in maps} == {"pinv"}


def test_converters_read_back_equal(home):
    from workbench.converter_files import fit_set

    stores = Store.open(home / "donor-store"), Store.open(home / "recipient-store")
    made, back = fit_set(*stores), load_converters(home / "converters")
    assert (made.donor, made.recipient, made.prompt_hash, made.meta) == (
        back.donor, back.recipient, back.prompt_hash, back.meta,
    )  # fmt: skip
    for a, b in zip(made, back, strict=True):
        assert (a.donor, a.recipient, a.method, a.alpha) == (b.donor, b.recipient, b.method, b.alpha)
        assert (a.to_donor, a.to_recipient) == (b.to_donor, b.to_recipient)
        assert (a.quality_to_donor, a.quality_to_recipient) == (b.quality_to_donor, b.quality_to_recipient)


def test_paste_is_the_fold_and_belongs_to_the_recipient(home, tmp_path):
    pasted, donor, converters = (
        Adapter.load(home / "pasted"), Adapter.load(home / "adapter"), load_converters(home / "converters"),
    )  # fmt: skip
    assert pasted == paste_adapter(donor, list(converters), recipient_fingerprint=converters.recipient)
    assert pasted.base == Store.open(home / "recipient-store").fingerprint
    good("paste", home / "adapter", home / "converters", "--out", tmp_path / "p", "--strength", 0.5, "--json")
    assert Adapter.load(tmp_path / "p").strength == 0.5


def test_generate_with_and_without_an_adapter(home):
    line = ("generate", home / "recipient", "--max-new-tokens", 5, "w1 w2", "w3", "--json")
    plain = [json.loads(text) for text in good(*line).stdout.splitlines()]
    assert [row["prompt"] for row in plain] == ["w1 w2", "w3"]
    assert good(*line, "--adapter", home / "pasted", "--strength", 0).stdout == good(*line).stdout
    assert good(*line, "--adapter", home / "pasted", "--strength", 50).stdout != good(*line).stdout
    several = good(
        "generate", home / "recipient", "--prompts", home / "prompts.txt", "--limit", 3, "--max-new-tokens", 2
    )
    assert several.stdout.count("> w") == 3
    sampled = [good(*line, "--sample", "--seed", seed).stdout for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_generate_refuses_an_adapter_of_another_model_unless_told(home):
    line = ("generate", home / "recipient", "w1", "--adapter", home / "adapter")
    told(workbench(*line), "belongs to", "donor", "recipient")
    good(*line, "--allow-mismatch")


def test_job_checks_a_job_file_and_prints_its_defaults(home, tmp_path):
    result = good("job", job_file(home, tmp_path))
    assert 'match = "forecast"' in result.stdout
    assert good("job", "--reference").stdout.startswith("# The job file")
    told(workbench("job"), "no job file given")


@pytest.fixture
def ran(tmp_path, monkeypatch) -> list[Any]:
    """In place of running jobs: keeps those it was given, and leaves the metrics of an example."""
    jobs: list[Any] = []

    def run_job(job: Any, *, like: Any = (), engine: Any = None) -> Any:
        assert engine is None or engine.name == "local"
        jobs.append(job)
        folder = tmp_path / "ran"
        folder.mkdir(exist_ok=True)
        (folder / "metrics.json").write_text(json.dumps({**metrics(), "warnings": ["few prompts"]}))
        return SimpleNamespace(folder=folder)

    monkeypatch.setattr("workbench.jobs.run_job", run_job)
    return jobs


def test_run_and_demo_print_the_table_and_the_path_of_the_report(home, tmp_path, ran):
    result = good("run", job_file(home, tmp_path), "--donor", "other", "--seed", 4, "--out", tmp_path / "o")
    assert result.stdout.splitlines()[-1] == f"report: {tmp_path / 'ran' / 'report.html'}"
    assert "paste" in result.stdout
    assert "warning: few prompts" in result.stderr
    assert (ran[0].donor.model, ran[0].seed, ran[0].out) == ("other", 4, str(tmp_path / "o"))
    demo = good("demo", "--quick", "--recipient", home / "recipient", "--json")
    assert json.loads(demo.stdout)["schema"] == 1
    assert (ran[1].name, ran[1].recipient.model) == ("demo-quick", str(home / "recipient"))


def test_forecast_ranks_the_pastes_and_makes_the_first(home, tmp_path):
    line = [
        "forecast",
        home / "adapter",
        home / "donor-store",
        home / "recipient-store",
        "--prompts",
        home / "prompts.txt",
    ]
    said = good(*line, "--opener", "w7", "--measure", 2, "--top", 3, "--limit", 8, "--out", tmp_path / "first")
    assert "the first 3 of 15" in said.stdout
    kept = Adapter.load(tmp_path / "first")
    found = json.loads(good(*line, "--opener", "w7", "--limit", 8, "--json", "--not", home / "prompts.txt").stdout)
    assert len(found["pastes"]) == 15
    assert [str(s) for s in kept.sites] == [found["pastes"][0]["pairs"][0][1]]
    assert found["pastes"][0]["measured"] is None
    told(workbench(*line, "--not", home / "prompts.txt"), "--not is of openers")
    told(workbench(*line, "--opener", "w7", "--out", tmp_path / "first"), "exists already")
    told(workbench(*line), "has no response")
    told(workbench(*line, "--opener", "w7", "--recipient", home / "donor"), "is not a profile of")


def test_run_takes_several_recipients_to_a_run_folder_each(home, tmp_path, ran):
    two = ["--recipient", "bundled:recipient", "--recipient", home / "recipient"]
    found = good("run", job_file(home, tmp_path), *two)
    assert found.stdout.count("report: ") == 2
    assert len({job.folder for job in ran}) == 2
    assert [job.recipient.model for job in ran] == ["bundled:recipient", str(home / "recipient")]
    assert len(json.loads(good("run", job_file(home, tmp_path), *two, "--json").stdout)) == 2
    told(
        workbench("run", job_file(home, tmp_path), *two[:2], *two[:2]), "two of the recipients would share a run folder"
    )


def test_run_takes_graders_of_a_plugin_that_the_line_names(home, tmp_path, ran):
    (tmp_path / "mine.py").write_text(
        "from workbench.evaluate.graders import register\n\n"
        '@register("ends_in_nine")\ndef ends_in_nine(answer, prompt):\n    return answer.endswith("w9")\n'
    )
    good("run", job_file(home, tmp_path), "--plugin", tmp_path / "mine.py")
    try:
        assert GRADERS["ends_in_nine"]("w1 w9", None)
    finally:
        GRADERS.pop("ends_in_nine", None)
    told(workbench("run", job_file(home, tmp_path), "--plugin", tmp_path / "gone.py"), "no such file")
    told(workbench("job", job_file(home, tmp_path, plugin="mine.py")), "unknown key 'plugin'")


def test_run_makes_a_run_folder_and_the_second_time_keeps_every_step(home, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"w{i} w3 w4 w5 w6 w7 w8 w9"}) + "\n" for i in range(8)))
    evaluate = {"draws": 2, "rate_draws": 1, "dose": [0.5], "max_new_tokens": 3, "neutral_text": str(texts),
                "validation_text": str(texts)}  # fmt: skip
    job = job_file(home, tmp_path, evaluate=evaluate, training={"steps": 3})
    first = good("run", job, "--json")
    folder = tmp_path / "runs" / "job"
    assert set(json.loads(first.stdout)["behaviours"]["b"]["arms"]) >= {"base", "native", "paste", "random_converter"}
    assert {"job.toml", "metrics.json", "report.html", "log.txt", "environment.json"} <= tree(folder)
    again = good("run", job)
    assert again.stdout.splitlines()[-1] == f"report: {folder / 'report.html'}"
    steps = [line for line in again.stderr.splitlines() if line.startswith("step ")]
    assert steps
    assert all(line.endswith(": kept") for line in steps)


# -- how bad input is told --------------------------------------------------------------------------------------------


def job_file(home: Path, folder: Path, **changes: Any) -> Path:
    """A small job on the models of `home`."""
    rows = [{"prompt": f"w{i} w{i + 1}", "id": str(i), "response": f"w{i % 5} w9"} for i in range(12)]
    prompts = folder / "job-prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation = folder / "job-evaluation.jsonl"
    evaluation.write_text("".join(json.dumps({"prompt": f"w{i} w{i + 2}", "id": str(i)}) + "\n" for i in range(12)))
    behaviour = {"name": "b", "openers": ["w1"], "grader": "starts_with", "grader_args": {"openers": ["w1"]},
                 "demonstrations": str(prompts), "validation": str(prompts), "evaluation": str(evaluation)}  # fmt: skip
    job: dict[str, Any] = {
        "name": "job", "out": str(folder / "runs"),
        "donor": {"model": str(home / "donor")}, "recipient": {"model": str(home / "recipient")},
        "profile": {"prompts": str(home / "prompts.txt")},
        "behaviours": [{**behaviour, **changes.pop("behaviour", {})}], **changes,
    }  # fmt: skip
    path = folder / "job.toml"
    path.write_text(tomli_w.dumps(job))
    return path


def profile_line(home: Path, out: Path, **options: Any) -> list[Any]:
    given = {"prompts": home / "prompts.txt", "out": out, **options}
    model = given.pop("model", home / "donor")
    return ["profile", model, *(part for key, value in given.items() for part in (f"--{key}", value))]


BAD_PROFILES = {
    "unknown model": ({"model": "/nowhere/model"}, ["/nowhere/model", "bundled:donor"]),
    "unknown hub model": ({"model": "nobody/nothing"}, ["nobody/nothing", "HF_HUB_OFFLINE", "hf download"]),
    "unknown bundled model": ({"model": "bundled:llama"}, ["bundled:llama", "allowed"]),
    "layer out of range": ({"layers": "0,9"}, ["layer 9", f"0 to {LAYERS - 1}"]),
    "layers that cannot be read": ({"layers": "0,x"}, ["'x'", "0,4,8-12"]),
    "unknown site": ({"sites": "resid.1"}, ["'resid'", "resid_post"]),
    "missing prompts": ({"prompts": "gone.jsonl"}, ["gone.jsonl", "no such file"]),
    "unknown tokens": ({"tokens": "middle"}, ["'middle'", "first:n"]),
    "unknown store dtype": ({"store-dtype": "int8"}, ["'int8'", "float16"]),
    "unknown dtype": ({"dtype": "float8"}, ["'float8'", "bfloat16"]),
    "unknown device": ({"device": "abacus"}, ["'abacus'", "cuda"]),
    "unknown column": ({"column": "question"}, ["column"]),
    "no batch": ({"batch-tokens": 0}, ["batch_tokens=0"]),
}


@pytest.mark.parametrize("case", BAD_PROFILES)
def test_bad_input_of_profile(home, tmp_path, case):
    options, words = BAD_PROFILES[case]
    if "column" in options:
        options = {**options, "prompts": tmp_path / "p.csv"}
        (tmp_path / "p.csv").write_text("text\nhello\n")
    before = tree(tmp_path)
    told(workbench(*profile_line(home, tmp_path / "out", **options)), *words)
    assert tree(tmp_path) == before


def test_a_profile_that_cannot_be_made_is_refused_before_its_model_is_loaded(home, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    for out, options, word in (
        (home / "donor-store", {}, "--overwrite"),
        (tmp_path / "file" / "out", {}, "is not a folder; choose another"),
        (tmp_path / "out", {"tokens": "middle"}, "'middle'"),
        (tmp_path / "out", {"store-dtype": "int8"}, "'int8'"),
        (tmp_path / "out", {"sites": "resid_post.1,nonsense"}, "'nonsense'"),
        (tmp_path / "out", {"batch-tokens": 0}, "batch_tokens=0"),
    ):
        told(workbench(*profile_line(home, out, model="no/model", **options)), word)
    told(workbench(*profile_line(home, tmp_path / "other", model="no/model"), "--overwrite"), "holds no manifest.json")
    told(workbench(*profile_line(home, home / "donor-store", model="no/model"), "--moments", "--overwrite"),
         "holds no moments.json")  # fmt: skip


def test_options_that_would_do_nothing_are_refused(home, tmp_path):
    line = profile_line(home, tmp_path / "out", model="no/model")
    told(workbench(*line, "--moments", "--store-dtype", "float32"), "--store-dtype is of a store")
    told(workbench(*line, "--moments", "--allow-nonfinite"), "--allow-nonfinite is of a store")
    told(workbench(*line, "--plain", "--system", "be brief"), "no prompt is a chat")


def test_a_dry_run_says_that_its_folder_exists(home):
    result = good(*profile_line(home, home / "donor-store"), "--dry-run", "--json")
    assert json.loads(result.stdout)["prompts"] == PROMPTS
    assert f"warning: {home / 'donor-store'} exists already" in result.stderr


@pytest.mark.parametrize(("name", "text"), [("p.txt", ""), ("p.jsonl", "\n"), ("p.csv", "prompt\n"), ("p.json", "[]")])
def test_empty_prompts(home, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    told(workbench(*profile_line(home, tmp_path / "out", prompts=tmp_path / name)), "p: no prompts")
    told(workbench("generate", home / "donor", "--prompts", tmp_path / name), "no prompts")
    assert not (tmp_path / "out").exists()


def test_no_prompt_or_two_kinds(home):
    told(workbench("generate", home / "donor"), "--prompts")
    told(workbench("generate", home / "donor", "w1", "--prompts", home / "prompts.txt"), "not both")


def test_an_output_that_exists_is_kept(home, tmp_path):
    for line in (
        profile_line(home, home / "donor-store"),
        ["convert", home / "donor-store", home / "recipient-store", "--out", home / "converters"],
        ["paste", home / "adapter", home / "converters", "--out", home / "pasted"],
    ):
        told(workbench(*line), "exists already", "--overwrite")
    Store.open(home / "donor-store").verify()


def every_writer(home: Path, folder: Path, out: Path) -> list[list[Any]]:
    """Each verb that writes, writing to `out`."""
    return [
        profile_line(home, out),
        ["convert", home / "donor-store", home / "recipient-store", "--out", out],
        ["paste", home / "adapter", home / "converters", "--out", out],
        ["run", job_file(home, folder), "--out", out],
    ]


@pytest.mark.parametrize("verb", range(4), ids=["profile", "convert", "paste", "run"])
def test_an_unwritable_output(home, tmp_path, verb):
    (tmp_path / "file").write_text("in the way")
    line = every_writer(home, tmp_path, tmp_path / "file" / "out")[verb]
    before = tree(tmp_path)
    told(workbench(*line), str(tmp_path / "file"), "choose another")
    assert tree(tmp_path) == before
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("verb", range(4), ids=["profile", "convert", "paste", "run"])
def test_a_full_disk(home, tmp_path, verb, monkeypatch):
    """Every sync fails, as it does when the disk is full; what is at the target is never taken for whole."""
    line = every_writer(home, tmp_path, tmp_path / "out")[verb]

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        told(workbench(*line), "No space left on device", "make room")
    if verb < 3:
        assert not (tmp_path / "out").exists()
        good(*line)  # and it goes on once there is room
    else:
        left = [p for p in tree(tmp_path / "out") if p not in ("job", "job/log.txt", "job/lock")]
        assert left == []


def test_stores_that_do_not_pair(home, tmp_path):
    (tmp_path / "other.txt").write_text("w9 w8\nw7\nw6 w5\n")
    good(*profile_line(home, tmp_path / "s", model=home / "recipient", prompts=tmp_path / "other.txt"))
    line = ["convert", home / "donor-store", tmp_path / "s", "--out", tmp_path / "c"]
    told(
        workbench(*line),
        "do not pair",
        str(home / "donor-store"),
        str(tmp_path / "s"),
        "rows (40 and 3)",
        "same prompts",
    )
    assert not (tmp_path / "c").exists()


BAD_CONVERTS = {
    "unknown converter": (["--method", "magic"], ["'magic'", "ridge, pinv"]),
    "unknown matching": (["--match", "middle"], ["'middle'", "nearest, floor, ends, cka, svcca, r2"]),
    "matching that needs a job": (["--match", "forecast"], ["'forecast'", "job file"]),
    "layer out of range": (["--donor-layers", "7"], ["layer 7", f"0 to {LAYERS - 1}"]),
    "negative alpha": (["--alpha", "-1"], ["alpha -1"]),
    "alpha that is no number": (["--alpha", "strong"], ["'strong'", "cv"]),
    "nothing held in": (["--holdout", "1"], ["holdout 1.0"]),
}


@pytest.mark.parametrize("case", BAD_CONVERTS)
def test_bad_input_of_convert(home, tmp_path, case):
    options, words = BAD_CONVERTS[case]
    line = ["convert", home / "donor-store", home / "recipient-store", "--out", tmp_path / "c", *options]
    told(workbench(*line), *words)
    assert tree(tmp_path) == set()


def test_what_is_no_store(home, tmp_path):
    line = ["convert", home / "donor-store", home / "adapter", "--out", tmp_path / "c"]
    told(workbench(*line), "adapter", "no store")
    told(
        workbench("convert", tmp_path / "gone", home / "donor-store", "--out", tmp_path / "c"), "gone", "no such folder"
    )


def test_a_layer_that_the_profile_lacks(home, tmp_path):
    good(*profile_line(home, tmp_path / "s", layers="0"))
    line = ["convert", tmp_path / "s", home / "recipient-store", "--out", tmp_path / "c", "--donor-layers", "2"]
    told(workbench(*line), "no layer 2", "resid_post.0")


def test_an_adapter_of_another_width(home, tmp_path):
    vector(Site(1), torch.ones(32)).save(tmp_path / "narrow")
    line = ["paste", tmp_path / "narrow", home / "converters", "--out", tmp_path / "p"]
    told(workbench(*line), "width 32", f"width {WIDTH}", "donor")
    told(
        workbench("generate", home / "recipient", "w1", "--adapter", tmp_path / "narrow"), "width 32", f"width {WIDTH}"
    )
    assert tree(tmp_path) == {"narrow", "narrow/adapter.json", "narrow/adapter.safetensors"}


def test_an_adapter_for_a_layer_without_a_converter(home, tmp_path):
    vector(Site(7), torch.ones(WIDTH)).save(tmp_path / "deep")
    told(workbench("paste", tmp_path / "deep", home / "converters", "--out", tmp_path / "p"), "resid_post.7", "given:")
    told(
        workbench("generate", home / "recipient", "w1", "--adapter", tmp_path / "deep"), "layer 7", f"0 to {LAYERS - 1}"
    )


def test_an_adapter_of_another_model(home, tmp_path):
    stranger = replace(Adapter.load(home / "adapter"), base={"name": "stranger", "weights": "0" * 64})
    stranger.save(tmp_path / "stranger")
    line = ["paste", tmp_path / "stranger", home / "converters", "--out", tmp_path / "p"]
    told(workbench(*line), "stranger", "donor", "--allow-mismatch")
    good(*line, "--allow-mismatch")


def test_an_adapter_folder_without_weights(home, tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "pyreft"
    Adapter.load(home / "adapter").save(ours)
    (ours / "adapter.safetensors").unlink()
    theirs.mkdir()
    (theirs / "config.json").write_text(json.dumps({
        "sorted_keys": ["layer_1_comp_block_output_unit_pos_nunit_1#0"], "representations": [[1, "block_output"]],
        "intervention_types": ["<class 'pyreft.interventions.NodireftIntervention'>"],
    }))  # fmt: skip
    (tmp_path / "empty").mkdir()
    for folder, words in (
        (ours, ["adapter.safetensors"]),
        (theirs, ["weights missing"]),
        (tmp_path / "empty", ["no adapter"]),
    ):
        told(workbench("paste", folder, home / "converters", "--out", tmp_path / "p"), str(folder), *words)
        told(workbench("generate", home / "recipient", "w1", "--adapter", folder), str(folder), *words)
    told(workbench("paste", tmp_path / "gone", home / "converters", "--out", tmp_path / "p"), "gone")
    assert not (tmp_path / "p").exists()


def test_damaged_converters(home, tmp_path):
    line = ["paste", home / "adapter", tmp_path / "c", "--out", tmp_path / "p"]
    told(workbench(*line), "no such folder")
    load = load_converters(home / "converters")
    from workbench.converter_files import save_converters

    save_converters(load, tmp_path / "c")
    header = json.loads((tmp_path / "c" / "converters.json").read_text())
    for text, words in (
        ("{", ["damaged"]),
        (json.dumps({**header, "format": "other"}), ["format"]),
        (json.dumps({**header, "version": 9}), ["version 1"]),
        (json.dumps({**header, "converters": [{}]}), ["damaged"]),
        (json.dumps({**header, "converters": header["converters"] * 2}), ["damaged"]),
    ):
        (tmp_path / "c" / "converters.json").write_text(text)
        told(workbench(*line), str(tmp_path / "c"), *words)
    (tmp_path / "c" / "converters.json").write_text(json.dumps(header))
    (tmp_path / "c" / "converters.safetensors").unlink()
    told(workbench(*line), "converters.safetensors")
    told(workbench("paste", home / "adapter", home / "adapter", "--out", tmp_path / "p"), "converters.json")


BAD_JOBS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown key": ({"speed": 9}, ["unknown key 'speed'", "allowed here"]),
    "unknown grader": ({"behaviour": {"grader": "vibes"}}, ["'vibes'", "starts_with"]),
    "unknown argument of a grader": ({"behaviour": {"grader_args": {"opners": ["a"]}}}, ["'opners'", "openers"]),
    "unknown model": ({"donor": {"model": "/nowhere/model"}}, ["/nowhere/model"]),
    "unknown prompts": ({"behaviour": {"evaluation": "gone.jsonl"}}, ["gone.jsonl"]),
    "positions that there are not": ({"training": {"positions": "middle"}}, ["training.positions", "'middle'"]),
    "patience for nothing": ({"training": {"patience": 2}}, ["training.patience", "training.validation"]),
    "no positives": (
        {"behaviour": {"openers": ["w99"], "grader_args": {"openers": ["w99"]}}},
        ["demonstrations shows it", "'w99'", "'starts_with'"],
    ),
    "layer out of range": ({"training": {"layers": [9]}}, ["layer 9", f"0 to {LAYERS - 1}"]),
    "adapter that is not there": ({"behaviour": {"adapter": "gone"}}, ["gone"]),
}


@pytest.mark.parametrize("case", BAD_JOBS)
def test_bad_input_of_a_job_is_told_before_anything_is_trained(home, tmp_path, case, monkeypatch):
    changes, words = BAD_JOBS[case]
    monkeypatch.setattr(
        "workbench.behaviour_transfer.train_adapter", lambda *_, **__: pytest.fail("a bad job trained an adapter")
    )
    result = workbench("run", job_file(home, tmp_path, **changes), "--quiet")
    told(result, *words)
    assert not (tmp_path / "runs" / "job" / "metrics.json").exists()
    assert not (tmp_path / "runs" / "job" / "report.html").exists()


def test_a_job_file_that_is_not_there(tmp_path):
    told(workbench("run", tmp_path / "gone.toml"), "gone.toml")
    told(workbench("run", "bundled:other"), "bundled:other", "bundled:demo")


# -- errors, flags ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["nonsense"], ["nonsense", "workbench --help"]),
        (["convert"], ["DONOR", "workbench convert --help"]),
        (["profile", "m", "--nonsense"], ["--nonsense"]),
        (["--nonsense"], ["--nonsense"]),
        (["run", "job.toml", "--seed", "x"], ["seed"]),
    ],
)
def test_a_line_that_cannot_be_read(line, words):
    result = CliRunner().invoke(app, line, prog_name="workbench")
    told(result, *words)


def test_no_arguments_is_help():
    result = workbench()
    assert result.exit_code == 2
    assert "Commands:" in result.output


def raising(error: BaseException, *flags: str, monkeypatch: pytest.MonkeyPatch) -> Result:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("workbench.doctor.diagnose", fail)
    return workbench("doctor", *flags)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("a line\n  and another"), 2, "error: a line⏎ and another"),
        (PermissionError(13, "Permission denied", "/x"), 2, "error: /x: Permission denied; choose another place"),
        (ZeroDivisionError("by zero"), 1, "internal error: ZeroDivisionError: by zero; run again with --debug"),
        (MemoryError(), 1, "error: out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "error: out of memory"),
        (
            UnicodeEncodeError("utf-8", "\udcc3", 0, 1, "surrogates not allowed"),
            2,
            "error: the name of a file or folder here",
        ),
        (KeyboardInterrupt(), 130, "stopped; run the same command again to go on"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_an_error_looks_like(error, code, line, monkeypatch):
    result = raising(error, monkeypatch=monkeypatch)
    assert result.exit_code == code
    assert result.stderr.strip().startswith(line)
    assert "Traceback" not in result.output
    debugged = raising(error, "--debug", monkeypatch=monkeypatch)
    assert debugged.exit_code == code
    assert "Traceback" in debugged.stderr
    assert debugged.stderr.strip().splitlines()[-1].startswith(line)


def test_version_and_flags_anywhere():
    from workbench import __version__

    assert good("--version").stdout == f"workbench {__version__}\n"
    assert workbench("run", "gone.toml", "--debug").stderr.count("Traceback") >= 1
    assert workbench("--debug", "run", "gone.toml").stderr.count("Traceback") >= 1


def test_the_log_goes_to_stderr_and_leaves_nothing_behind(home):
    import logging

    before = list(logging.getLogger("workbench").handlers)
    result = good("generate", home / "donor", "w1", "--max-new-tokens", 1)
    assert "loaded Model(" in result.stderr
    assert "loaded" not in result.stdout
    assert good("generate", home / "donor", "w1", "--max-new-tokens", 1, "--quiet").stderr == ""
    assert logging.getLogger("workbench").handlers == before
    assert cli_errors.FLAGS == ("--debug", "--quiet")
    assert logging.raiseExceptions


@pytest.mark.parametrize(
    ("text", "said"),
    [("0-99999999999", "more than 10000"), ("9" * 5000, "too large"), ("0-5000,0-5000", "more than 10000")],
)
def test_huge_layer_ranges_are_refused(text, said):
    with pytest.raises(UserError, match=said):
        layer_list(text)


@pytest.mark.parametrize("strength", ["nan", "inf"])
def test_a_strength_that_is_no_number_is_refused(strength):
    told(
        workbench("generate", "bundled:donor", "w1", "--adapter", "bundled:refusal", "--strength", strength), "strength"
    )


# -- an adapter that does nothing -------------------------------------------------------------------------------------


def test_paste_tells_of_an_adapter_that_is_exactly_zero(home, tmp_path):
    vector(Site(1), torch.zeros(WIDTH)).save(tmp_path / "zero")
    line = ["paste", tmp_path / "zero", home / "converters", "--out", tmp_path / "p"]
    result = good(*line)
    assert result.stderr.startswith("warning: this adapter's delta is exactly zero at resid_post.1, on every state")
    assert len(result.stderr.splitlines()) == 1
    (Adapter.load(home / "adapter") * 0).save(tmp_path / "off")
    line = ["paste", tmp_path / "off", home / "converters", "--out", tmp_path / "q", "--json"]
    assert "strength 0" in json.loads(good(*line).stdout)["warnings"][0]


def test_paste_tries_the_adapter_on_its_donor_first(home, tmp_path):
    base = Adapter.load(home / "adapter").base
    strong, faint = (vector(Site(1), torch.full((WIDTH,), size), base=base) for size in (30.0, 1e-6))
    strong.save(tmp_path / "strong")
    faint.save(tmp_path / "faint")

    def said(name: str, *more: Any) -> list[str]:
        line = ["paste", tmp_path / name, home / "converters", "--out", tmp_path / "p", "--overwrite", "--json"]
        return json.loads(good(*line, "--quiet", *more).stdout)["warnings"]

    prompts = ("--prompts", home / "prompts.txt")
    assert said("faint") == []  # nothing was asked for
    assert said("strong", *prompts) == []
    (found,) = said("faint", *prompts)
    assert "mean KL" in found
    assert "does nothing to its own donor" in found
    (found,) = said("faint", *prompts, "--opener", "w7", "--opener", "w8", "--donor", home / "donor")
    assert "log-odds of 'w7, w8'" in found
    assert "does nothing to its own donor" in found


def test_bad_input_of_the_trial_on_the_donor(home, tmp_path):
    line = ["paste", home / "adapter", home / "converters", "--out", tmp_path / "p"]
    told(workbench(*line, "--opener", "w7"), "--opener and --donor are of --prompts")
    told(workbench(*line, "--storage", "int4"), "unknown storage 'int4'", "int8")
    trial = [*line, "--prompts", home / "prompts.txt", "--quiet"]
    told(workbench(*trial, "--donor", home / "recipient"), "belongs to", "donor")
    told(workbench(*trial, "--donor", tmp_path / "gone"), "gone")
    assert tree(tmp_path) == set()


def test_paste_in_eight_bits_is_the_paste_but_for_its_error(home, tmp_path):
    good("paste", home / "adapter", home / "converters", "--out", tmp_path / "p", "--storage", "int8")
    small, whole = Adapter.load(tmp_path / "p"), Adapter.load(home / "pasted")
    for site, part in whole.parts.items():
        torch.testing.assert_close(small.parts[site].U, part.U, atol=float(part.U.abs().max()) / 200, rtol=0)
