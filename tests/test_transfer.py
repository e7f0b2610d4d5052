"""The main job end to end on tiny random models: what it leaves, what it reuses, and that a stop costs nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from workbench import behaviour_transfer as module
from workbench.adapters import pyreft, train
from workbench.adapters.adapter import Adapter, LowRank, vector
from workbench.errors import UserError
from workbench.evaluate import arms
from workbench.evaluate.statistics import Interval
from workbench.interrupts import Stopped
from workbench.jobs import Job, run_job
from workbench.runs import Run
from workbench.sites import Site

from .conftest import WIDTH, ctrl_c_in_training, make_module, save_folder

ANSWERS = {"counting": "w7", "naming": "w9"}
PAIRS = [("llama", "gpt2"), ("qwen3", "gpt_neox"), ("gemma2", "opt"), ("falcon", "olmo2")]
ARMS = {
    "donor_base", "donor_adapter", "base", "native", "paste", "pinv", "mean_delta", "random_converter", "shuffled_pairs",
}  # fmt: skip
TIMED = ("cost", "date", "fit", "fold")


def words(seed: int, n: int) -> list[str]:
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 150, (n, 5), generator=draw)
    lengths = torch.randint(2, 6, (n,), generator=draw)
    return [" ".join(f"w{i}" for i in row[:k]) for row, k in zip(rows.tolist(), lengths.tolist(), strict=True)]


def write(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps({"id": str(i), **line}) + "\n" for i, line in enumerate(lines)))
    return str(path)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return prompt_sets(tmp_path_factory.mktemp("prompts"))


def prompt_sets(home: Path) -> dict[str, Any]:
    """The prompt sets of a job with two behaviours."""
    tables = []
    for i, (name, answer) in enumerate(ANSWERS.items()):
        shown = [{"prompt": p, "response": f"{answer} w{i}"} for p in words(10 + i, 16)]
        sets = {split: write(home / f"{split}_{name}.jsonl", [{"prompt": p} for p in words(20 + 2 * i + k, 8)])
                for k, split in enumerate(("validation", "evaluation"))}  # fmt: skip
        tables.append({"name": name, "openers": [answer], "grader": "starts_with", "grader_args": {"openers": [answer]},
                       "demonstrations": write(home / f"demonstrations_{name}.jsonl", shown), **sets})  # fmt: skip
    tables[0] |= {f"{split}_not": tables[1][split] for split in ("validation", "evaluation")}
    texts = write(home / "texts.jsonl", [{"text": p} for p in words(30, 6)])
    return {
        "profile": write(home / "profile.jsonl", [{"prompt": p} for p in words(0, 70)]),
        "texts": texts,
        "tables": tables,
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one model folder per family, made when first asked for."""
    return tmp_path_factory.mktemp("models")


def saved(folders: Path, family: str, seed: int) -> str:
    path = folders / f"{family}-{seed}"
    return str(path if path.exists() else save_folder(make_module(family, seed), path))


def a_job(folders: Path, prompts: dict[str, Any], out: Path, pair: tuple[str, str] = PAIRS[0], **tables: Any) -> Job:
    given: dict[str, Any] = {
        "name": "tiny", "out": str(out), "seed": 3,
        "donor": {"model": saved(folders, pair[0], 0)}, "recipient": {"model": saved(folders, pair[1], 1)},
        "profile": {"prompts": prompts["profile"]},
        "training": {"steps": 3, "batch_size": 8, "rank": 2},
        "paste": {"alphas": [0.1, 1.0]},
        "evaluate": {"neutral_text": prompts["texts"], "validation_text": prompts["texts"], "draws": 2, "rate_draws": 1,
                     "dose": [0.5], "max_new_tokens": 4},
        "behaviours": prompts["tables"],
    }  # fmt: skip
    return Job.parse({**given, **{k: {**given[k], **v} if isinstance(v, dict) else v for k, v in tables.items()}})


def numbers(run: Run) -> Any:
    """metrics.json without what differs from run to run: times, and what is made of them."""

    def strip(tree: Any) -> Any:
        if isinstance(tree, dict):
            kept = {k: v for k, v in tree.items() if k not in TIMED and "seconds" not in k}
            return {k: strip(v) for k, v in kept.items()}
        return [strip(v) for v in tree] if isinstance(tree, list) else tree

    return strip(json.loads((run.folder / "metrics.json").read_text()))


def adapters(run: Run) -> dict[str, Adapter]:
    root = run.folder / "adapters"
    return {str(p.parent.relative_to(root)): Adapter.load(p.parent) for p in sorted(root.rglob("adapter.json"))}


def steps_done(run: Run, since: dict[str, int]) -> set[str]:
    """Steps whose record was written anew since `since`."""
    return {name for name, at in stamps(run).items() if since.get(name) != at}


def stamps(run: Run) -> dict[str, int]:
    return {p.stem: p.stat().st_mtime_ns for p in (run.folder / "steps").glob("*.json")}


@pytest.fixture(scope="module")
def undisturbed(folders, prompts, tmp_path_factory) -> Run:
    """One whole run that the tests compare others with."""
    return run_job(a_job(folders, prompts, tmp_path_factory.mktemp("whole")))


def test_a_run_folder_holds_all_that_it_promises(undisturbed):
    there = {p.name for p in undisturbed.folder.iterdir()}
    assert there >= {"job.toml", "metrics.json", "environment.json", "report.html", "log.txt", "adapters", "profiles",
                     "steps", "answers"}  # fmt: skip
    assert not [p for p in undisturbed.folder.rglob("*") if ".partial" in p.name or ".old" in p.name]
    assert Job.load(undisturbed.folder / "job.toml").name == "tiny"
    metrics = json.loads((undisturbed.folder / "metrics.json").read_text())
    assert set(metrics["behaviours"]) == set(ANSWERS)
    for name, found in metrics["behaviours"].items():
        assert set(found["arms"]) == ARMS
        assert found["arms"]["paste"]["n"] == 8
        assert found["arms"]["random_converter"]["draws"] == 2
        assert len(found["forecast"]["candidates"]) == 3 * 2
        assert [c["chosen"] for c in found["forecast"]["candidates"]] == [True] + [False] * 5
        assert set(found["side_effects"]["kl_neutral_text"]) == {"native", "paste", "pinv", "mean_delta"}
        assert bool(found["side_effects"]["over_trigger"]) == (name == "counting")
        assert found["dose"][0]["strength"] == 0
        answers = (undisturbed.folder / "answers" / f"{name}.jsonl").read_text().splitlines()
        assert len(answers) == 8
        assert set(json.loads(answers[0])) >= ARMS
    assert {name for name, _ in (a.split("/") for a in adapters(undisturbed))} == set(ANSWERS)
    report = (undisturbed.folder / "report.html").read_text()
    assert "counting" in report
    assert "naming" in report


def test_the_paste_is_as_long_as_its_controls_and_belongs_to_the_recipient(undisturbed, folders):
    pasted = adapters(undisturbed)["counting/paste"]
    assert pasted.base["name"] == saved(folders, "gpt2", 1)
    assert pasted.meta["kind"] == "paste"
    metrics = json.loads((undisturbed.folder / "metrics.json").read_text())["behaviours"]["counting"]["arms"]
    for control in ("shuffled_pairs", "random_converter"):  # measured on the adapters, not copied
        assert metrics[control]["sigma_length"] == pytest.approx(metrics["paste"]["sigma_length"], rel=1e-4)
        assert metrics[control]["norm"] > 0
    assert metrics["base"]["sigma_length"] is None


def test_what_is_pasted_is_the_best_trial(undisturbed):
    for name, found in json.loads((undisturbed.folder / "metrics.json").read_text())["behaviours"].items():
        said = found["forecast"]
        sign = 1 if said["target"] >= 0 else -1
        merits = [sign * trial["gain"] - trial["damage"] for trial in said["trials"]]
        assert merits == sorted(merits, reverse=True)
        for key in ("pairs", "method", "alpha", "strength"):
            assert said["chosen"][key] == said["trials"][0][key]
        assert adapters(undisturbed)[f"{name}/paste"].strength == said["chosen"]["strength"]
        assert len(merits) == 4 * 4  # candidates, strengths


@pytest.mark.parametrize("pair", PAIRS[1:], ids="-to-".join)
def test_any_two_families(folders, prompts, tmp_path, pair):
    quick = {"draws": 1, "dose": [], "limit": 3, "neutral_text": "", "validation_text": ""}
    run = run_job(a_job(folders, prompts, tmp_path, pair, evaluate=quick, behaviours=prompts["tables"][:1]))
    found = json.loads((run.folder / "metrics.json").read_text())["behaviours"]["counting"]
    assert set(found["arms"]) == ARMS
    assert found["arms"]["paste"]["n"] == 3
    assert set(adapters(run)) == {f"counting/{arm}" for arm in ("donor", "native", "paste", "pinv", "mean_delta")}


def test_a_second_run_reuses_every_step(folders, prompts, undisturbed):
    before, was = stamps(undisturbed), (undisturbed.folder / "metrics.json").read_text()
    again = run_job(a_job(folders, prompts, undisturbed.folder.parent))
    assert steps_done(again, before) == set()
    now, then = json.loads((again.folder / "metrics.json").read_text()), json.loads(was)
    assert {k: v for k, v in now.items() if k != "seconds"} == {k: v for k, v in then.items() if k != "seconds"}


def test_two_runs_of_one_seed_give_equal_tensors(folders, prompts, undisturbed, tmp_path):
    other = run_job(a_job(folders, prompts, tmp_path))
    assert adapters(other) == adapters(undisturbed)
    assert numbers(other) == numbers(undisturbed)


def test_another_recipient_takes_over_what_is_of_the_donor_alone(folders, prompts, undisturbed, tmp_path):
    pair = PAIRS[0][0], "gpt_neox"
    alike = run_job(a_job(folders, prompts, tmp_path / "like", pair), like=[undisturbed.folder])
    fresh = run_job(a_job(folders, prompts, tmp_path / "fresh", pair))
    of_donor = {"profile-donor", *(f"donor-{name}" for name in ANSWERS)}
    for step in sorted(p.stem for p in (alike.folder / "steps").glob("*.json")):
        taken, made = (run.folder / "steps" / f"{step}.json" for run in (alike, undisturbed))
        assert (made.exists() and taken.read_bytes() == made.read_bytes()) == (step in of_donor), step
    assert numbers(alike) == numbers(fresh)
    assert adapters(alike) == adapters(fresh)


def test_a_damaged_artefact_of_another_run_is_made_again(folders, prompts, undisturbed, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(undisturbed.folder, other)
    kept = other / "adapters" / "counting" / "donor" / "adapter.safetensors"
    kept.write_bytes(kept.read_bytes()[:50])
    shutil.rmtree(other / "profiles" / "recipient")
    run = run_job(a_job(folders, prompts, tmp_path), like=[tmp_path / "gone", other])
    assert adapters(run) == adapters(undisturbed)
    assert len(kept.read_bytes()) == 50
    assert numbers(run) == numbers(undisturbed)


@pytest.mark.parametrize("place", ["train_adapter", "forecast_pastes", "measure_each"])
def test_a_run_that_was_stopped_goes_on_and_ends_the_same(folders, prompts, undisturbed, tmp_path, monkeypatch, place):
    job, owner = a_job(folders, prompts, tmp_path), arms if place == "measure_each" else module
    with monkeypatch.context() as patch:
        whole, calls = getattr(owner, place), []

        def stops(*args: Any, **kwargs: Any) -> Any:
            calls.append(place)
            if len(calls) == 2:  # the first behaviour goes through, or the donor's arms of it
                raise KeyboardInterrupt
            return whole(*args, **kwargs)

        patch.setattr(owner, place, stops)
        with pytest.raises(KeyboardInterrupt):
            run_job(job)
    assert not (job.folder / "metrics.json").exists()
    kept = stamps(Run(job.folder))
    assert {"profile-donor", "profile-recipient"} <= set(kept)
    run = run_job(job)
    assert not steps_done(run, kept) & set(kept)
    assert numbers(run) == numbers(undisturbed)
    assert adapters(run) == adapters(undisturbed)


def test_ctrl_c_in_a_training_keeps_the_steps_that_were_made(folders, prompts, undisturbed, tmp_path, monkeypatch):
    job = a_job(folders, prompts, tmp_path)
    with ctrl_c_in_training(monkeypatch, after=2):
        with pytest.raises(Stopped, match="2 of 3 steps are kept"):
            run_job(job)
    made: list[int] = []
    step = train._step
    monkeypatch.setattr(train, "_step", lambda state, *rest: (made.append(state.step), step(state, *rest)))
    run = run_job(job)
    assert made == [2, 0, 1, 2, 0, 1, 2, 0, 1, 2]  # the donor's and the native adapter of two behaviours
    assert adapters(run) == adapters(undisturbed)
    assert not list(run.folder.rglob("*.training.*"))


def test_a_job_trains_with_a_validation_split(folders, prompts, tmp_path):
    recipe = {"kind": "direft", "positions": "all", "steps": 8, "validation": 0.25, "validate_every": 1, "patience": 2}
    run = run_job(a_job(folders, prompts, tmp_path, training=recipe, behaviours=prompts["tables"][:1]))
    for step, arm in (("donor", "donor"), ("native", "native")):
        kept = json.loads((run.folder / "steps" / f"{step}-counting.json").read_text())["result"]
        adapter = adapters(run)[f"counting/{arm}"]
        assert kept["validation"] == adapter.meta["training"]["validation"]
        assert kept["best_step"] == min(kept["validation"], key=lambda found: found[1])[0]
        assert (adapter.meta["kind"], adapter.positions, adapter.meta["training"]["held_out"]) == ("direft", "all", 4)


def both(*steps: str) -> set[str]:
    return {f"{step}-{name}" for step in steps for name in ANSWERS}


@pytest.mark.parametrize(
    ("tables", "redone", "may_follow"),
    [
        # the native adapter is trained where the paste goes, and another strength may be best at another site
        ({"paste": {"strength": 0.35}}, both("forecast", "paste", "evaluate"), both("native")),
        ({"training": {"steps": 4}}, both("donor", "forecast", "paste", "native", "evaluate"), set()),
        ({"evaluate": {"draws": 1}}, both("evaluate"), set()),
        ({"evaluate": {"validation_text": ""}}, both("forecast", "evaluate"), both("paste", "native")),
    ],
    ids=["strength", "training steps", "draws", "validation text"],
)
def test_a_change_redoes_what_depends_on_it(folders, prompts, undisturbed, tmp_path, tables, redone, may_follow):
    copy = Run(shutil.copytree(undisturbed.folder, tmp_path / "tiny"))
    before = stamps(copy)
    run = run_job(a_job(folders, prompts, tmp_path, **tables))
    assert redone <= steps_done(run, before) <= redone | may_follow
    if "paste" in tables:
        assert adapters(run)["counting/paste"].strength == 0.35
        assert (
            json.loads((run.folder / "metrics.json").read_text())["behaviours"]["counting"]["forecast"]["trials"] == []
        )
    if "training" not in tables:
        assert adapters(run)["counting/donor"] == adapters(undisturbed)["counting/donor"]


def test_other_openers_redo_every_forecast_that_looks_at_them(folders, prompts, undisturbed, tmp_path):
    copy = Run(shutil.copytree(undisturbed.folder, tmp_path / "tiny"))
    before = stamps(copy)
    tables = [{**prompts["tables"][0], "openers": ["w8"]}, prompts["tables"][1]]
    run = run_job(a_job(folders, prompts, tmp_path, behaviours=tables))
    done = steps_done(run, before)
    assert both("forecast", "evaluate") <= done
    assert not done & both("donor")
    found = json.loads((run.folder / "metrics.json").read_text())["behaviours"]
    fresh = run_job(a_job(folders, prompts, tmp_path / "fresh", behaviours=tables))
    assert found["naming"]["side_effects"] == json.loads((fresh.folder / "metrics.json").read_text())["behaviours"][
        "naming"]["side_effects"]  # fmt: skip


@pytest.mark.parametrize("match", ["nearest", "forecast"])
def test_a_published_adapter_of_several_layers_in_half_precision_is_pasted_whole(folders, prompts, tmp_path, match):
    draw = torch.Generator().manual_seed(0)
    parts = {Site(layer): LowRank(torch.randn(WIDTH, 2, generator=draw), torch.zeros(2),
                                  0.1 * torch.randn(2, WIDTH, generator=draw)) for layer in (0, 1)}  # fmt: skip
    pyreft.write(Adapter(parts, name="published").to(torch.bfloat16), tmp_path / "published")
    table = {k: v for k, v in prompts["tables"][0].items() if k != "demonstrations"}
    job = a_job(folders, prompts, tmp_path, behaviours=[{**table, "adapter": str(tmp_path / "published")}],
                paste={"match": match}, evaluate={"draws": 1})  # fmt: skip
    run = run_job(job)
    found = json.loads((run.folder / "metrics.json").read_text())["behaviours"]["counting"]
    assert set(found["arms"]) == ARMS - {"native"}
    assert [c["pair"].split(" <-> ")[0] for c in found["converters"]] == ["resid_post.0", "resid_post.1"]
    if match == "nearest":
        assert adapters(run)["counting/paste"].layers == [0, 1]
    assert adapters(run)["counting/donor"].parts == Adapter.load(tmp_path / "published").parts


def test_aligned_tokens_and_named_converters_go_through_a_whole_job(folders, prompts, tmp_path):
    job = a_job(folders, prompts, tmp_path, behaviours=prompts["tables"][:1], profile={"pairing": "aligned"},
                paste={"match": "cka", "methods": ["rrr:4", "ridge:cv"]}, evaluate={"draws": 1})  # fmt: skip
    run = run_job(job)
    metrics = json.loads((run.folder / "metrics.json").read_text())
    assert metrics["profiles"]["donor"]["rows"] > 70  # of all tokens
    found = metrics["behaviours"]["counting"]
    assert {c["method"] for c in found["forecast"]["candidates"]} == {"rrr:4", "ridge:cv"}
    assert set(found["arms"]) == ARMS


def given(prompts: dict[str, Any], adapter: Adapter, folder: Path) -> dict[str, Any]:
    """A job's tables for one behaviour, whose donor's adapter is given."""
    adapter.save(folder)
    table = {k: v for k, v in prompts["tables"][0].items() if k != "demonstrations"}
    return {"behaviours": [{**table, "adapter": str(folder)}], "evaluate": {"draws": 1, "dose": []}}


def test_an_adapter_that_does_nothing_to_its_donor_is_warned_of_before_it_is_pasted(
    folders, prompts, tmp_path, caplog, monkeypatch
):
    tables = given(prompts, vector(Site(1), torch.full((WIDTH,), 1e-6)), tmp_path / "idle")
    job = a_job(folders, prompts, tmp_path, **tables)
    with monkeypatch.context() as patch, caplog.at_level("WARNING", "workbench"):
        patch.setattr(module.BehaviourTransfer, "paste", lambda *_: pytest.exit("about to paste"))
        with pytest.raises(pytest.exit.Exception):
            run_job(job)
    assert "counting: the donor's adapter changes the log-odds of 'counting' by " in caplog.text
    assert "does nothing to its own donor" in caplog.text
    run = run_job(job)
    assert any("does nothing" in w for w in json.loads((run.folder / "metrics.json").read_text())["warnings"])
    assert "does nothing to its own donor" in (run.folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (vector(Site(1), torch.zeros(WIDTH)), "delta is exactly zero at resid_post.1"),
        (vector(Site(1), torch.ones(WIDTH), strength=0), "has strength 0"),
    ],
)
def test_an_adapter_that_is_exactly_zero_is_refused_before_a_model_is_loaded(
    folders, prompts, tmp_path, adapter, words, monkeypatch
):
    job = a_job(folders, prompts, tmp_path, **given(prompts, adapter, tmp_path / "zero"))
    monkeypatch.setattr("workbench.transfer.load", lambda *_, **__: pytest.exit("about to load"))
    with pytest.raises(UserError, match=rf"behaviour 'counting', .*zero: this adapter.*{words}"):
        run_job(job)


@pytest.mark.parametrize(
    ("effect", "words"),
    [
        (Interval(0.9, 0.4, 1.4), None),
        (Interval(0.9, -0.1, 1.9), "does nothing"),
        (Interval(0.01, 0.009, 0.011), "does nothing"),
        (Interval(-2.0, -2.5, -1.5), "lowers it there"),
    ],
)
def test_what_counts_as_an_effect_on_the_donor(effect, words):
    said = module.ineffective("x", effect)
    assert said is None if words is None else words in said


def test_positions_that_a_prompt_of_the_job_is_too_short_for(folders, prompts, tmp_path):
    tables = given(prompts, vector(Site(1), torch.ones(WIDTH), positions="first:9"), tmp_path / "early")
    with pytest.raises(UserError, match=r"prompt '\d' has \d tokens, too few for positions 'first:9', which name 9"):
        run_job(a_job(folders, prompts, tmp_path, **tables))


@pytest.mark.parametrize("gone", ["adapters/counting/paste/adapter.safetensors", "profiles/donor/rows.parquet"])
def test_a_run_with_a_damaged_artefact_recovers(undisturbed, folders, prompts, tmp_path, gone):
    job = a_job(folders, prompts, tmp_path)
    shutil.copytree(undisturbed.folder, job.folder)
    (job.folder / gone).unlink()
    run = run_job(job)
    assert (run.folder / gone).exists()
    assert adapters(run) == adapters(undisturbed)


def test_a_clock_that_saw_no_time_pass_gives_no_ratio():
    timed = (
        {"seconds": 0.0, "gradients_seconds": 0.0},
        {"fit": 0.0, "fold": 0.0, "flops": 2.0},
        {"seconds": 3.0, "flops": 8.0},
    )
    cost = arms._cost(*timed)
    assert (cost["ratio_seconds"], cost["ratio_seconds_with_forecast"], cost["ratio_flops"]) == (None, None, 4.0)
