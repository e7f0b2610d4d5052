"""A stop leaves what is done; what a profile would cost is known before it; a disk too small is said before it begins."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from workbench.errors import UserError
from workbench.hashes import json_hash, json_list_hash
from workbench.interrupts import Stopped, first_interrupt_noted
from workbench.models import load
from workbench.profile import plan as profile_plan
from workbench.profile import profile, profile_model, run_blocks
from workbench.profile import run as profile_run
from workbench.profile.cost import profile_cost
from workbench.profile.plan import make_plan
from workbench.rendering import render

from ..conftest import make_model, make_module, save_folder, word_tokenizer
from .test_profile import PROMPTS, contents, hooks

ROOT = Path(__file__).resolve().parents[2]
Usage = namedtuple("Usage", "total used free")


pytestmark = pytest.mark.usefixtures("interrupts_are_heard")


def interrupting(model, monkeypatch, after):
    """The model, which is sent a Ctrl-C in the forward pass of this number."""
    calls, run = [0], model.run

    def counted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == after:
            os.kill(os.getpid(), signal.SIGINT)
        return run(*args, **kwargs)

    monkeypatch.setattr(model, "run", counted)


def test_the_first_interrupt_keeps_the_finished_blocks_and_the_same_call_goes_on(gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr(profile_plan, "BLOCK_ROWS", 3)
    before, handler = hooks(gpt2), signal.getsignal(signal.SIGINT)
    profile_model(gpt2, PROMPTS, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupting(gpt2, patch, after=3)
        with pytest.raises(Stopped, match="stopped: 2 of 4 blocks are kept; run the same again to go on"):
            profile_model(gpt2, PROMPTS, tmp_path / "again")
    assert issubclass(Stopped, KeyboardInterrupt)
    assert (hooks(gpt2), signal.getsignal(signal.SIGINT)) == (before, handler)
    profile_model(gpt2, PROMPTS, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


def test_the_second_interrupt_acts_as_ever():
    def twice():
        with first_interrupt_noted() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.asked
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        twice()
    assert not isinstance(caught.value, Stopped)


def test_a_stop_that_nobody_heeds_comes_at_the_end_of_the_block():
    with pytest.raises(Stopped):
        with first_interrupt_noted():
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_ctrl_c_at_the_command_line_is_one_line_and_exit_code_130(tmp_path):
    save_folder(make_module("llama"), tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"text": p.user}) + "\n" for p in PROMPTS))
    script = textwrap.dedent("""
        import os, signal, sys
        from workbench import cli
        from workbench.profile import plan as profile_plan
        from workbench.profile.run import BlockRunner
        profile_plan.BLOCK_ROWS, calls, forward = 3, [0], BlockRunner._forward
        def counted(self, *args, **kwargs):
            calls[0] += 1
            if calls[0] == int(sys.argv[1]):
                os.kill(os.getpid(), signal.SIGINT)
            return forward(self, *args, **kwargs)
        BlockRunner._forward = counted
        cli.app(sys.argv[2:], prog_name="workbench")
    """)

    def run(after, out):
        line = [sys.executable, "-c", script, str(after), "profile", str(tmp_path / "model"), "--prompts",
                str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / out)]  # fmt: skip
        env = {**os.environ, "OMP_NUM_THREADS": "1", "WORKBENCH_PROGRESS": "0"}
        return subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)

    stopped = run(3, "again")
    assert stopped.returncode == 130, stopped.stderr
    assert stopped.stderr.splitlines()[-1] == "stopped: 2 of 4 blocks are kept; run the same again to go on"
    assert (run(0, "again").returncode, run(0, "whole").returncode) == (0, 0)
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


def test_the_cost_is_what_the_profile_then_takes(llama, tmp_path):
    options = {"tokens": "all", "sites": [0, 2], "dtype": "bfloat16", "batch_tokens": 60}
    cost = profile_cost(llama, PROMPTS, tmp_path / "deep" / "s", **options)
    assert list(tmp_path.iterdir()) == []
    store = profile_model(llama, PROMPTS, tmp_path / "s", **options)
    assert (cost.rows, cost.sites) == (store.n_rows, [str(s) for s in store.sites])
    assert cost.bytes == sum(store.read(site).nbytes for site in store.sites)
    assert cost.blocks == len(store.shards)
    assert cost.tokens == int(store.prompts()["n_tokens"].sum())
    assert 0 <= cost.padding < 1
    assert cost.seconds > 0
    assert "an estimate" in str(cost)
    json.dumps(cost.as_dict())


def test_a_disk_that_is_too_small_is_refused_unless_the_rest_fits(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(profile_plan, "BLOCK_ROWS", 3)
    plan = make_plan(llama, PROMPTS)
    monkeypatch.setattr(profile.shutil, "disk_usage", lambda _: Usage(0, 0, plan.n_bytes - 1))
    with pytest.raises(UserError, match=r"MiB free and the profile needs .* MiB more; make room"):
        profile_model(llama, PROMPTS, tmp_path / "s")
    with monkeypatch.context() as patch:
        patch.setattr(profile.shutil, "disk_usage", lambda _: Usage(0, 0, plan.n_bytes))
        interrupting(llama, patch, after=3)
        with pytest.raises(Stopped):
            profile_model(llama, PROMPTS, tmp_path / "s")
    profile_model(llama, PROMPTS, tmp_path / "s").verify()


def test_memory_that_runs_out_halves_the_batches_and_changes_float_noise_alone(gpt2, tmp_path, monkeypatch):
    whole, shapes, run = profile_model(gpt2, PROMPTS, tokens="all"), [], gpt2.run

    def small(ids, mask, stop_after=None):
        shapes.append(tuple(ids.shape))
        if ids.numel() > 70:
            raise torch.OutOfMemoryError("planted")
        run(ids, mask, stop_after=stop_after)

    monkeypatch.setattr(gpt2, "run", small)
    store = profile_model(gpt2, PROMPTS, tmp_path / "s", tokens="all")
    for site in store.sites:
        torch.testing.assert_close(store.read(site), whole.read(site), atol=1e-4, rtol=1e-4)
    failed = [i for i, (b, t) in enumerate(shapes) if b * t > 70]
    assert failed
    assert all(b * t <= 70 for b, t in shapes[failed[-1] + 1 :])  # what was halved stays so
    assert sum(b for b, t in shapes if b * t <= 70) == len(PROMPTS)  # none is run again
    first = contents(tmp_path / "s")
    assert contents(profile_model(gpt2, PROMPTS, tmp_path / "t", tokens="all").path) == first
    monkeypatch.setattr(gpt2, "run", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("planted")))
    with pytest.raises(UserError, match=r"of \d+ tokens does not fit the device's memory"):
        profile_model(gpt2, PROMPTS)


def test_halving_costs_no_more_forwards_than_halvings(llama, monkeypatch):
    """Memory that is linear in tokens: one failure for each halving, and batches that are no smaller than they must be."""
    shapes, run = [], llama.run
    prompts = [" ".join(f"w{(i + j) % 150}" for j in range(1 + i % 60)) for i in range(200)]
    plan = make_plan(llama, prompts, sites=[0], batch_tokens=1024)
    asked = [sum(1 for _ in plan.cut(list(range(200)), tokens)) for tokens in (1024, 512)]

    def small(ids, mask, stop_after=None):
        shapes.append(tuple(ids.shape))
        if ids.numel() > 600:
            raise torch.OutOfMemoryError("planted")
        run(ids, mask, stop_after=stop_after)

    monkeypatch.setattr(llama, "run", small)
    store = profile_model(llama, prompts, sites=[0], batch_tokens=1024)
    failed = [b * t for b, t in shapes if b * t > 600]
    assert len(failed) == 1
    assert asked[0] < len(shapes) <= asked[1] + 1 + 2  # a batch at the seam, and one for the rounding of b * t // 2
    monkeypatch.setattr(llama, "run", run)
    torch.testing.assert_close(store.read(0), profile_model(llama, prompts, sites=[0]).read(0), atol=1e-4, rtol=1e-4)


def test_memory_that_runs_out_within_a_batch_leaves_no_trace_of_it(llama, monkeypatch):
    with torch.no_grad():
        llama.module.get_input_embeddings().weight[100] *= 1e6
    prompts = [f"w{i} {llama.tokenizer.decode([100])}" for i in range(8)]
    options = {"sites": [0, 1], "dtype": "float16", "tokens": "all", "allow_nonfinite": True}
    whole = profile_model(llama, prompts, **options)
    assert whole.shards[0]["nonfinite"]["resid_post.0"] == int((~torch.isfinite(whole.read(0))).sum()) > 0
    take = profile_run.BlockRunner._take

    def failing(self, site, h):
        if site.layer == 1 and len(h) > 3:
            raise torch.OutOfMemoryError("planted")
        return take(self, site, h)

    monkeypatch.setattr(profile_run.BlockRunner, "_take", failing)
    assert profile_model(llama, prompts, **options).shards[0]["nonfinite"] == whole.shards[0]["nonfinite"]
    assert profile_cost(llama, prompts, sites=[0, 1], tokens="all").seconds > 0  # a dry run halves as well


def test_a_prompt_that_is_larger_than_a_block_gathers_on_the_host(llama, monkeypatch):
    whole = profile_model(llama, PROMPTS, tokens="all")
    monkeypatch.setattr(profile_plan, "BLOCK_BYTES", 10 * make_plan(llama, PROMPTS).row_bytes)
    plan, hosted = make_plan(llama, PROMPTS, tokens="all"), []
    runner = profile_run.BlockRunner(llama, plan)
    for block in plan.blocks:
        for site, rows in runner.run(block).items():
            stored = whole.read(site, slice(block.start, block.start + block.n))
            torch.testing.assert_close(rows, stored, atol=1e-4, rtol=1e-4)
        kept = plan.spool.sequences["n_rows"][block.first : block.last]
        hosted.append((runner._on_host, block.n > 10, int((kept > 0).sum())))
    assert {large for _, large, _ in hosted} == {True, False}
    assert all(on_host == large and (n == 1 or not large) for on_host, large, n in hosted)


def test_blocks_can_be_computed_again(llama, monkeypatch):
    monkeypatch.setattr(profile_plan, "BLOCK_ROWS", 20)
    store = profile_model(llama, PROMPTS, tokens="all")
    plan = make_plan(llama, PROMPTS, tokens="all")
    assert store.manifest["plan"] == plan.hash
    assert store.manifest["options"] == {"tokens": "all", "max_length": None, "stride": None, "batch_tokens": 8192,
                                         "backend": "hooks"}  # fmt: skip
    for number, rows, nonfinite in run_blocks(llama, plan, [2, 0]):
        start, n = plan.blocks[number].start, plan.blocks[number].n
        assert set(nonfinite.values()) == {0}
        for site, values in rows.items():
            assert torch.equal(values, store.read(site, slice(start, start + n)))


def test_the_block_of_a_last_resid_pre_is_not_run(llama):
    ran = []
    mlp = llama.block(1).mlp.register_forward_hook(lambda *_: ran.append("mlp 1"))
    before = llama.block(0).mlp.register_forward_hook(lambda *_: ran.append("mlp 0"))
    store = profile_model(llama, PROMPTS, sites=["resid_pre.1", "resid_post.0"])
    assert set(ran) == {"mlp 0"}
    assert torch.equal(store.read("resid_pre.1"), store.read("resid_post.0"))
    mlp.remove()
    before.remove()


def test_padding_needs_no_mask(family_model):
    plan = make_plan(family_model, PROMPTS, tokens="all")
    runner = profile_run.BlockRunner(family_model, plan)
    assert runner._causal
    without = runner.run(plan.blocks[0])
    runner._causal = False
    for site, rows in runner.run(plan.blocks[0]).items():
        torch.testing.assert_close(without[site], rows, atol=2e-4, rtol=2e-4)


def test_a_rounded_store_says_so_once(llama, caplog):
    with caplog.at_level("WARNING", "workbench"):
        profile_model(llama, PROMPTS, dtype="bfloat16")
        profile_model(llama, PROMPTS)
    told = [r.getMessage() for r in caplog.records if "rounded rows" in r.getMessage()]
    assert len(told) == 1
    assert re.search("keeps bfloat16.*moments, R2", told[0])


def test_hashes_of_many_texts_are_those_of_their_list(llama):
    plan = make_plan(llama, PROMPTS)
    assert plan.manifest["prompts"]["rendered_hash"] == json_hash(render(PROMPTS, llama.tokenizer))
    assert PROMPTS.hash == json_hash([p.content for p in PROMPTS])
    assert json_list_hash(iter([])) == json_hash([])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_rows_and_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(profile_plan, "BLOCK_ROWS", 20)
    model, other = make_model("llama"), load(make_module("llama").cuda(), tokenizer=word_tokenizer())
    here, there = (
        profile_model(model, PROMPTS, tokens="all"),
        profile_model(other, PROMPTS, tmp_path / "a", tokens="all"),
    )
    for site in here.sites:
        torch.testing.assert_close(here.read(site), there.read(site), atol=1e-3, rtol=1e-3)
    with monkeypatch.context() as patch:
        interrupting(other, patch, after=3)
        with pytest.raises(Stopped):
            profile_model(other, PROMPTS, tmp_path / "b", tokens="all")
    profile_model(other, PROMPTS, tmp_path / "b", tokens="all")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_equal_inputs_make_an_equal_plan(llama):
    assert make_plan(llama, PROMPTS).hash == make_plan(make_model("llama"), PROMPTS).hash
    others = ({"tokens": "all"}, {"sites": [0]}, {"batch_tokens": 10}, {"dtype": "float16"}, {"max_length": 50},
              {"max_length": 50, "stride": 9})  # fmt: skip
    assert len({make_plan(llama, PROMPTS, **o).hash for o in others} | {make_plan(llama, PROMPTS).hash}) == 7
