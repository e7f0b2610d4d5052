"""Plans say what runs then do: rows, tokens and bytes exactly, FLOPs as they are counted; and what will not do."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from workbench import (
    PromptSet,
    UserError,
    plan_job,
    plan_profile,
    plan_transport,
    profile_cost,
    profile_model,
    profile_moments,
)
from workbench.cli import app
from workbench.models import load
from workbench.planning.steps import moments_step, transport_steps
from workbench.planning.texts import Counted, count_prompts
from workbench.profile.plan import make_plan
from workbench.sites import Site
from workbench.transport import transport_grid
from workbench.work import Lengths, ModelShape, Work, forward
from workbench.work.rates import PRESETS, Rates, measured, preset

from ..conftest import make_model
from ..work.counting import counted
from ..work.test_passes import whole_squares

SMALL = Rates("small", dict.fromkeys(("float32", "float64", "bfloat16", "float16"), 1e9), 1e9, 1e9, disk=1e6, host=1e9,
              free=1e9, device="cpu", reached=1.0)  # fmt: skip


@pytest.fixture(scope="module")
def donor() -> ModelShape:
    return ModelShape.of(load("bundled:donor", prove=False))


@pytest.mark.parametrize("policy", ["last", "all", "first:3", "assistant"])
def test_rows_tokens_and_bytes_are_those_of_the_profile(policy):
    prompts = [[{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}], "w4 w5 w6 w7 w8"]
    model = make_model("llama")
    known = make_plan(model, prompts, tokens=policy)
    found = count_prompts(PromptSet.load(prompts), model.tokenizer, policy, max_length=model.max_length)
    assert (found.rows, found.texts.tokens) == (known.n_rows, known.n_tokens)
    with profile_model(model, prompts, tokens=policy, sites=[0, 2]) as store:
        plan = plan_profile(ModelShape.of(model), tokens=1, rates=SMALL, sites=[0, 2])
        assert plan.steps[0].work.disk * found.rows == pytest.approx(plan.steps[0].rows * sum(
            store.read(site).nbytes for site in store.sites))  # fmt: skip


def test_the_cost_of_a_profile_counts_the_same_flops():
    model, texts = make_model("llama"), ["w1 w2 w3 w4", "w5"]
    known = count_prompts(PromptSet.load(texts), model.tokenizer)
    cost = profile_cost(model, texts, sites=[0])
    assert cost.flops == forward(ModelShape.of(model), known.texts, stop_after=0).flops
    assert f"{cost.flops:.2e} FLOPs" in str(cost)


@pytest.mark.parametrize("pairs", [None, [(0, 2)], []])
def test_flops_of_moments_are_counted_while_they_are_made(pairs):
    model, texts = make_model("llama"), [" ".join(f"w{i}" for i in range(20))] * 8
    shape = ModelShape.of(model)
    known = make_plan(model, texts, tokens="all")
    lengths, rows = Lengths.of(known.spool.lengths.tolist()), float(known.n_rows)
    named = None if pairs is None else [(Site(a), Site(b)) for a, b in pairs]
    step = moments_step("m", whole_squares(shape), Counted(lengths, rows), shape.layers(), dtype="float32", pairs=named)
    made: list[Any] = []
    found = counted(lambda: made.extend(profile_moments(model, texts, tokens="all", pairs=pairs)))
    assert found == pytest.approx(step.work.flops, rel=1e-3)
    assert step.work.disk == sum(
        t.nbytes for m in made for t in (*m.product.values(), *m.sum.values(), *m.shift.values())
    )


def test_flops_of_a_transport_are_near_what_is_counted():
    model = make_model("llama")
    g = torch.Generator().manual_seed(0)
    texts = [" ".join(f"w{i}" for i in torch.randint(0, 180, (20,), generator=g).tolist()) for _ in range(60)]
    shape, known = ModelShape.of(model), make_plan(model, texts, tokens="all")
    lengths, rows = Lengths.of(known.spool.lengths.tolist()), float(known.n_rows)
    (sums, fits), said = transport_steps(
        whole_squares(shape),
        Counted(lengths, rows),
        shape.layers(),
        dtype="float32",
        memory=1e9,
        folds=3,
        shards=4,
        bos=False,
    )
    assert said == []
    found = counted(lambda: transport_grid(model, texts, folds=3, shards=4))
    unseen = 3 * 2 * 4 * 9 * 48**3  # decompositions, which a counter does not see
    assert 0.7 < found / (sums.work.flops + fits.work.flops - unseen) < 1.5


def test_every_step_of_the_job_is_planned_by_its_name():
    plan = plan_job("bundled:demo", rates=SMALL)
    names = [s.name for s in plan.steps]
    assert names[:2] == ["profile-donor", "profile-recipient"]
    assert {"forecast-refusal", "paste-refusal", "native-refusal", "evaluate-refusal"} <= set(names)
    assert plan.steps[0].rows == 2048
    assert all(step.work.flops > 0 for step in plan.steps)
    assert plan.warnings == ()
    assert json.loads(json.dumps(plan.as_dict()))["hours"] == plan.hours
    many = plan_job("bundled:demo", rates=SMALL, tokens=1e6)
    assert many.steps[0].tokens == pytest.approx(1e6)
    assert list(plan.frame()["step"]) == names


def test_a_plan_is_shown_and_nothing_of_it_is_trusted(donor):
    plan = plan_profile(dataclasses.replace(donor, name="<b>x</b>"), tokens=1e5, policy="all", rates=SMALL)
    assert "to disk" in str(plan)
    assert "<b>x" not in plan._repr_html_()
    assert "<table>" in plan._repr_html_()


def test_what_will_not_do_is_said_with_what_to_change(donor):
    little = dataclasses.replace(SMALL, capacity=1e7, host=1e6, free=1e6)
    plan = plan_profile(donor, tokens=1e6, policy="all", rates=little)
    said = " | ".join(plan.warnings)
    assert "of device memory are needed, and 1 x 10 MB are there" in said
    assert "of the host's memory are needed" in said
    assert "are free on the disk; take fewer sites" in said
    assert plan.needed(plan.steps[0]) > 1
    enough = plan_profile(donor, tokens=1e6, policy="all", rates=little, gpus=plan.needed(plan.steps[0]))
    assert "of device memory" not in " ".join(enough.warnings)
    assert "ask for fewer targets or folds" in plan_transport(donor, tokens=1e5, rates=little).warnings[0]


def test_replicas_share_what_they_can_and_a_fit_is_done_on_one(donor):
    one, two = (plan_transport(donor, tokens=1e6, rates=SMALL, gpus=n) for n in (1, 2))
    sums, fits = zip(one.steps, two.steps, strict=True)
    assert one.seconds(sums[0]) == pytest.approx(2 * two.seconds(sums[1]))
    assert one.seconds(fits[0]) == two.seconds(fits[1])


def test_time_is_the_longest_of_its_parts(donor):
    slow = dataclasses.replace(SMALL, disk=1e4)
    plan = plan_profile(donor, tokens=1e6, policy="all", rates=slow)
    step = plan.steps[0]
    assert plan.binds(step) == "disk"
    assert plan.seconds(step) == step.work.disk / slow.disk
    fast = plan_profile(donor, tokens=1e6, policy="last", rates=SMALL)
    assert fast.binds(fast.steps[0]) == "compute"


@pytest.mark.parametrize(("options", "said"), [
    ({}, "nothing says how much is read; give prompts, or how many tokens"),
    ({"tokens": -1.0}, "-1 tokens are nothing to plan; give a number from 1"),
    ({"tokens": 1e6, "policy": "first:3"}, "cannot be counted; plan with last or all"),
    ({"tokens": 1e6, "dtype": "int8"}, "unknown dtype 'int8'; allowed: auto, float32"),
    ({"tokens": 1e6, "store_dtype": "int8"}, "unknown store dtype 'int8'; allowed: auto, float32"),
    ({"tokens": 1e6, "gpus": 0}, "gpus 0 is out of range; give at least 1"),
    ({"tokens": 1e6, "sites": [0], "moments": True, "pairs": [(0, 1)]}, "names resid_post.1, which is not profiled"),
])  # fmt: skip
def test_what_cannot_be_planned_is_refused(options, said, donor):
    with pytest.raises(UserError, match=said):
        plan_profile(donor, rates=SMALL, **options)


def test_other_refusals(donor):
    for tokens in (float("inf"), float("nan"), 0.4, 1e300):
        with pytest.raises(UserError, match="tokens are nothing to plan"):
            plan_profile(donor, rates=SMALL, tokens=tokens)
    with pytest.raises(UserError, match="plan with two sites at least"):
        plan_transport(donor, tokens=1e5, sites=[0], rates=SMALL)
    with pytest.raises(UserError, match="no prompts to plan for"):
        count_prompts(PromptSet(()), None)
    with pytest.raises(UserError, match="0 tokens are nothing to plan; give a number from 1 to 1e"):
        Counted(Lengths.of([3]), 1.0).scaled(0)
    with pytest.raises(UserError, match="no data sheet of 'TPU' is known; there are A100, H100, H200"):
        preset("TPU")
    with pytest.raises(UserError, match="tflops -1 is out of range; give a number above 0"):
        preset("H100").changed(tflops=-1)
    with pytest.raises(UserError, match="reached 2 is out of range: a share of the rate, at most 1"):
        preset("H100").changed(reached=2)
    with pytest.raises(UserError, match="has no rate for int8; it has bfloat16"):
        preset("H100").seconds(Work({"int8": 1.0}))


def test_rates_are_measured_here_and_changed_by_hand(tmp_path):
    found = measured("cpu", tmp_path, size=32, seconds=0.001)
    assert min(found.flops.values()) > 0
    assert found.memory > 0 < found.disk
    assert list(tmp_path.iterdir()) == []
    changed = PRESETS["H100"].changed(tflops=100, bandwidth=1000, disk=3, capacity=40, reached=1)
    assert changed.flops["bfloat16"] == 1e14
    assert changed.flops["float32"] == pytest.approx(67e12 * 100 / 989.5)
    assert (changed.memory, changed.disk, changed.capacity) == (1e12, 3e9, 4e10)


def run(*line: str) -> Any:
    return CliRunner().invoke(app, ["plan", *line])


def test_the_command_prints_a_plan_or_json():
    told = run(
        "--model", "bundled:recipient", "--prompts", "bundled:validation_text", "--gpu", "H200", "--memory", "0.01"
    )
    assert told.exit_code == 0
    assert "stored in float32" in told.stdout
    assert "warning: profile: " in told.stderr
    found = json.loads(run("--model", "bundled:recipient", "--tokens", "1e6", "--keep", "all", "--moments", "--pairs", "0:1",
                           "--gpu", "A100", "--gpus", "4", "--json").stdout)  # fmt: skip
    assert found["gpus"] == 4
    assert found["steps"][0]["tokens"] == pytest.approx(1e6)


@pytest.mark.parametrize(("line", "said"), [
    ([], "nothing to plan: give a job file, or --model"),
    (["bundled:demo", "--model", "bundled:donor"], "both a job and --model were given"),
    (["bundled:demo", "--moments"], "a job file says itself what is profiled and kept"),
    (["--model", "bundled:donor", "--transport", "--moments"], "--transport is between all pairs of its sites"),
    (["--model", "bundled:donor", "--pairs", "none"], "--pairs is of --moments alone"),
    (["--model", "bundled:donor", "--tokens", "1e5", "--gpu", "abacus"], "no data sheet of 'abacus' is known"),
])  # fmt: skip
def test_the_command_refuses(line, said):
    told = run(*line)
    assert told.exit_code == 2
    assert said in told.stderr
