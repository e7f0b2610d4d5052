"""A profile is the plain forward pass, row for row, however it is batched, interrupted and resumed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from workbench.errors import UserError
from workbench.models import load
from workbench.profile import plan as profile_plan
from workbench.profile import profile_model, spool
from workbench.profile.plan import make_plan
from workbench.prompts import PromptSet, encode
from workbench.sites import Site
from workbench.store import check_pair
from workbench.store import shards as store_shards
from workbench.store import writer as store_writer

from ..conftest import make_model

LENGTHS = [3, 17, 1, 9, 30, 2, 9, 5, 12, 1, 25, 8]
PROMPTS = PromptSet.load([" ".join(f"w{(7 * i + 3 * j) % 150}" for j in range(n)) for i, n in enumerate(LENGTHS)])


def plain_hidden(model, ids):
    """hidden_states of an ordinary forward pass of one prompt; [l + 1] is block l's output, but for the last."""
    with torch.inference_mode():
        return model.module(torch.tensor([ids]), output_hidden_states=True).hidden_states


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules())


def test_the_last_token_is_that_of_a_plain_forward(small_model):
    store = profile_model(small_model, PROMPTS)
    assert store.n_rows == len(PROMPTS)
    assert store.sites == [Site(layer) for layer in range(small_model.n_layers)]
    for i, ids in enumerate(encode(PROMPTS, small_model.tokenizer)):
        assert ids.count(small_model.tokenizer.bos_token_id) == 1
        hidden = plain_hidden(small_model, ids)
        for layer in range(small_model.n_layers - 1):
            torch.testing.assert_close(store.read(layer, [i])[0], hidden[layer + 1][0, -1], atol=1e-4, rtol=1e-4)


def test_all_tokens_are_those_of_a_plain_forward_and_the_table_says_which(llama):
    store = profile_model(llama, PROMPTS, tokens="all", sites=["blocks.1.hook_resid_post"])
    rows, prompts = store.rows(), store.prompts()
    special = set(llama.tokenizer.all_special_ids)
    at = 0
    for i, ids in enumerate(encode(PROMPTS, llama.tokenizer)):
        hidden = plain_hidden(llama, ids)[2][0]
        for position in [p for p, token in enumerate(ids) if token not in special]:
            row = rows.iloc[at]
            assert (row["row"], row["prompt"], row["position"], row["token_id"]) == (at, i, position, ids[position])
            assert prompts["text"][i][row["char_start"] : row["char_end"]] == row["text"]
            torch.testing.assert_close(store.read(1, [at])[0], hidden[position], atol=1e-4, rtol=1e-4)
            at += 1
    assert at == store.n_rows


@pytest.mark.parametrize("batch_tokens", [1, 40, 100])
@pytest.mark.parametrize("tokens", ["last", "first:2"])
def test_batching_changes_nothing_but_float_noise(small_model, batch_tokens, tokens):
    one, other = (profile_model(small_model, PROMPTS, tokens=tokens, batch_tokens=n) for n in (8192, batch_tokens))
    assert one.rows().equals(other.rows())
    for site in one.sites:
        torch.testing.assert_close(one.read(site), other.read(site), atol=1e-4, rtol=1e-4)


def test_batches_keep_to_their_budget(llama):
    plan = make_plan(llama, PROMPTS, batch_tokens=60)
    batches = list(plan.batches(plan.blocks[0]))
    assert sorted(i for b in batches for i in b) == list(range(len(PROMPTS)))
    assert all(len(b) * max(plan.spool.lengths[b]) <= 60 for b in batches)
    assert plan.n_bytes == len(PROMPTS) * llama.n_layers * llama.width * 4


def test_only_the_wanted_blocks_run_and_the_head_never_does(llama):
    ran = []
    head = llama.module.get_output_embeddings()
    handles = [llama.block(i).register_forward_hook(lambda *_, i=i: ran.append(i)) for i in range(llama.n_layers)]
    handles.append(head.register_forward_hook(lambda *_: ran.append("head")))
    profile_model(llama, PROMPTS, sites=[1])
    assert set(ran) == {0, 1}
    for handle in handles:
        handle.remove()


def test_no_hook_is_left_behind(llama, monkeypatch):
    before = hooks(llama)
    profile_model(llama, PROMPTS)
    assert hooks(llama) == before
    monkeypatch.setattr(llama, "run", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        profile_model(llama, PROMPTS)
    assert hooks(llama) == before


class Killed(BaseException):
    pass


def interrupt_after(model, monkeypatch, n):
    calls, run = [0], model.run

    def counted(*args, **kwargs):
        calls[0] += 1
        if calls[0] > n:
            raise Killed
        return run(*args, **kwargs)

    monkeypatch.setattr(model, "run", counted)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(profile_plan, "BLOCK_ROWS", 3)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("after", [0, 1, 4, 7])
def test_interrupted_and_started_again_ends_with_the_same_bytes(gpt2, tmp_path, monkeypatch, after):
    options = {"batch_tokens": 20, "tokens": "first:3"}
    profile_model(gpt2, PROMPTS, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        interrupt_after(gpt2, patch, after)
        with pytest.raises(Killed):
            profile_model(gpt2, PROMPTS, tmp_path / "again", **options)
        assert not (tmp_path / "again").exists()
    journal = tmp_path / ".again.partial" / "journal.jsonl"
    done = len(journal.read_text().splitlines()) - 1
    with journal.open("a") as stream:
        stream.write('{"torn')
    calls, run = [], gpt2.run
    monkeypatch.setattr(gpt2, "run", lambda *a, **k: (calls.append(1), run(*a, **k)))
    profile_model(gpt2, PROMPTS, tmp_path / "again", **options)
    plan = make_plan(gpt2, PROMPTS, **options)
    assert len(calls) == sum(len(list(plan.batches(block))) for block in plan.blocks[done:])
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "whole"]


@pytest.mark.usefixtures("small_blocks")
def test_a_finished_block_that_was_damaged_since_is_computed_again(gpt2, tmp_path, monkeypatch):
    options = {"batch_tokens": 20, "tokens": "first:3"}
    profile_model(gpt2, PROMPTS, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        interrupt_after(gpt2, patch, 7)
        with pytest.raises(Killed):
            profile_model(gpt2, PROMPTS, tmp_path / "again", **options)
    shard = sorted((tmp_path / ".again.partial" / "store" / "shards").iterdir())[0]
    data = bytearray(shard.read_bytes())
    data[-9] ^= 4
    shard.write_bytes(data)
    profile_model(gpt2, PROMPTS, tmp_path / "again", **options)
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


def test_where_a_model_lies_is_no_other_profile(llama):
    plan = make_plan(llama, PROMPTS)
    llama.name = "elsewhere/"
    assert make_plan(llama, PROMPTS).hash == plan.hash
    assert make_plan(make_model("llama", seed=1), PROMPTS).hash != plan.hash


@pytest.mark.usefixtures("small_blocks")
def test_another_plan_is_refused_what_a_run_has_kept_unless_told(llama, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(llama, patch, 2)
        with pytest.raises(Killed):
            profile_model(llama, PROMPTS, tmp_path / "s")
    with pytest.raises(UserError, match=r"holds \d+ finished blocks \(\d+ bytes\) of a run with other arguments"):
        profile_model(llama, PROMPTS, tmp_path / "s", dtype="bfloat16")
    store = profile_model(llama, PROMPTS, tmp_path / "s", dtype="bfloat16", overwrite=True)
    assert torch.equal(store.read(1), profile_model(llama, PROMPTS).read(1).bfloat16())
    store.verify()


@pytest.mark.slow
def test_killed_by_the_system_and_started_again(tmp_path):
    script = textwrap.dedent("""
        import os, signal, sys
        from tests.profile.test_profile import PROMPTS
        from tests.conftest import make_model
        from workbench.profile import plan as profile_plan
        from workbench.store import shards as store_shards
        from workbench.store import writer as store_writer
        from workbench.profile import profile_model
        profile_plan.BLOCK_ROWS = 3
        folder, left, write = sys.argv[1], [int(sys.argv[2])], store_shards.write_synced
        def killing(path, *parts):
            left[0] -= 1
            if left[0] == 0:
                path.write_bytes(parts[0][: len(parts[0]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            write(path, *parts)
        store_shards.write_synced = store_writer.write_synced = killing
        profile_model(make_model("llama"), PROMPTS, folder + "/killed")
        profile_model(make_model("llama"), PROMPTS, folder + "/whole")
    """)
    root = Path(__file__).resolve().parents[2]
    # 4 shards and a manifest: killed in the second shard, then in the manifest (the fourth of what was left)
    for after, status in ((2, -signal.SIGKILL), (4, -signal.SIGKILL), (0, 0)):
        command = [sys.executable, "-c", script, str(tmp_path), str(after)]
        found = subprocess.run(
            command, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        assert found.returncode == status, found.stderr
        assert (tmp_path / "killed").exists() == (status == 0)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed", "whole"]


def test_a_full_disk_is_one_line_and_is_gone_on_from(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(profile_plan, "BLOCK_ROWS", 3)
    write = store_shards.write_synced

    def full(path, *parts):
        if path.name == "00002.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, *parts)

    monkeypatch.setattr(store_shards, "write_synced", full)
    with pytest.raises(UserError, match="No space left on device; 2 blocks are kept"):
        profile_model(llama, PROMPTS, tmp_path / "s")
    assert not (tmp_path / "s").exists()
    monkeypatch.setattr(store_shards, "write_synced", write)
    profile_model(llama, PROMPTS, tmp_path / "s").verify()


def test_values_that_are_not_finite_are_refused_or_counted(llama, tmp_path):
    with torch.no_grad():
        llama.module.get_input_embeddings().weight[100] *= 1e6
    tok = llama.tokenizer
    prompts = PromptSet.load([{"id": "good", "prompt": "w1 w2"}, {"id": "bad", "prompt": f"w1 {tok.decode([100])}"}])
    with pytest.raises(
        UserError, match=r"resid_post\.0: \d+ values are NaN or infinite in float16, first in prompt 'bad'"
    ):
        profile_model(llama, prompts, tmp_path / "s", dtype="float16", tokens="all")
    store = profile_model(llama, prompts, tmp_path / "s", dtype="float16", tokens="all", allow_nonfinite=True)
    bad = ~torch.isfinite(store.read(0))
    assert set(store.prompt_index[bad.any(1)].tolist()) == {1}
    assert store.shards[0]["nonfinite"]["resid_post.0"] == int(bad.sum())


def test_targets_that_cannot_be_written(llama, tmp_path):
    store = profile_model(llama, PROMPTS, tmp_path / "s", sites=[0])
    with pytest.raises(UserError, match="exists already"):
        profile_model(llama, PROMPTS, tmp_path / "s")
    assert len(profile_model(llama, PROMPTS, tmp_path / "s", overwrite=True).sites) == llama.n_layers
    with pytest.raises(UserError, match="open it again"):
        store.read(0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not a store, so it is not overwritten"):
        profile_model(llama, PROMPTS, tmp_path / "mine", overwrite=True)
    with pytest.raises(UserError, match="cannot write"):
        profile_model(llama, PROMPTS, tmp_path / "mine" / "thesis.txt" / "s")
    with store_writer.StoreWriter(tmp_path / "busy", "plan"):
        with pytest.raises(UserError, match="another run"):
            profile_model(llama, PROMPTS, tmp_path / "busy")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tokens": "lst"}, "unknown tokens 'lst'"),
        ({"sites": [9]}, "layers 0 to 2"),
        ({"sites": []}, "no sites"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"batch_tokens": 0}, "batch_tokens=0"),
        ({"max_length": 4096}, "max_length=4096"),
        ({"max_length": 2}, "leaves nothing of prompt"),
        ({"prompts": []}, "no prompts"),
    ],
)
def test_bad_arguments_are_named(llama, options, said):
    with pytest.raises(UserError, match=said):
        profile_model(llama, **{"prompts": PROMPTS, **options})


def test_long_prompts_are_cut_to_the_context_and_counted(llama):
    store = profile_model(llama, ["w1 " * 300 + "w2", "w3"])
    assert store.prompts()["n_tokens"].tolist()[0] == llama.max_length
    assert store.prompts()["cut"].tolist()[0] > 0 == store.prompts()["cut"].tolist()[1]
    assert store.manifest["prompts"]["truncated"] == 1


def test_a_profile_without_a_folder_goes_with_its_store(llama):
    store = profile_model(llama, PROMPTS)
    assert store.path.exists()
    store.close()
    assert not store.path.exists()


def test_a_fork_that_ends_leaves_the_profile_to_its_parent(llama):
    with profile_model(llama, PROMPTS) as store:
        finalizer = store._remove
        pid = os.fork()
        if pid == 0:
            finalizer()
            os._exit(0)
        os.waitpid(pid, 0)
        assert store.path.exists()
    assert not store.path.exists()


def test_two_models_pair_over_the_same_prompts_in_the_same_order_alone(llama, gpt2):
    a, b = profile_model(llama, PROMPTS), profile_model(gpt2, PROMPTS)
    check_pair(a, b)
    for other in (PROMPTS.subset([1, 0, *range(2, len(PROMPTS))]), PROMPTS[:5], PromptSet.load(["w1"] * len(PROMPTS))):
        with pytest.raises(UserError, match="do not pair: they differ in prompts"):
            check_pair(a, profile_model(gpt2, other))
    with pytest.raises(UserError, match=r"tokens \(last and last:1\)"):
        check_pair(a, profile_model(gpt2, PROMPTS, tokens="last:1"))


def test_the_manifest_says_what_was_profiled(llama):
    manifest = profile_model(llama, PROMPTS, sites=[1]).manifest
    assert manifest["model"]["fingerprint"] == llama.fingerprint
    assert manifest["prompts"]["hash"] == PROMPTS.hash
    assert manifest["template"]["text"] == llama.tokenizer.chat_template
    assert (manifest["basis"], manifest["tokens"], manifest["n_rows"]) == ("raw", "last", len(PROMPTS))


def test_labels_and_meta_come_through(llama):
    rows = [{"id": "q1", "prompt": "w1", "label": "sum", "gold": "7"}, {"prompt": "w2"}]
    table = profile_model(llama, rows, sites=[0]).prompts()
    assert table["id"].tolist() == ["q1", "1"]
    assert table["label"].tolist()[0] == "sum"
    assert table["meta"].tolist() == ['{"gold": "7"}', "{}"]


def test_the_prompts_come_back_as_they_were_given(llama):
    rows = [{"id": "q1", "prompt": "w1", "label": "sum", "gold": "7"}, {"text": "w2"},
            {"messages": [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4", "name": "x"}]}]  # fmt: skip
    prompts = PromptSet.load(rows)
    found = profile_model(llama, prompts, sites=[0]).prompt_set()
    assert found == prompts
    assert (found.hash, found.full_hash) == (prompts.hash, prompts.full_hash)


def test_the_rows_of_a_prompt_are_those_that_the_table_gives_it(llama, monkeypatch):
    monkeypatch.setattr(profile_plan, "BLOCK_ROWS", 20)
    store = profile_model(llama, PROMPTS, sites=[0], tokens="all")
    assert len(store.shards) > 1
    owner = store.rows(["prompt"])["prompt"]
    for i in range(len(PROMPTS)):
        assert list(store.rows_of(i)) == owner.index[owner == i].tolist()
    assert torch.equal(torch.cat([store.read(0, store.rows_of(i)) for i in range(len(PROMPTS))]), store.read(0))
    with pytest.raises(UserError, match="prompts 0 to 11; got 12"):
        store.rows_of(12)


def test_a_real_model_with_a_real_tokenizer(shared):
    model = load(shared / "models" / "stories260k")
    stories = PromptSet.load(shared / "text" / "tinystories.jsonl", limit=8)
    store = profile_model(model, stories, tokens="all", sites=[2])
    ids = encode(stories, model.tokenizer)[5]
    mine = store.prompt_index == 5
    torch.testing.assert_close(store.read(2, mine), plain_hidden(model, ids)[3][0, 1:], atol=1e-4, rtol=1e-4)
    text = "".join(store.rows()["text"][mine.numpy()])
    assert text.split() == stories[5].text.split()


def test_the_result_does_not_depend_on_what_ran_before():
    one, other = (profile_model(make_model("gpt2"), PROMPTS) for _ in range(2))
    assert contents(one.path) == contents(other.path)


def test_rows_of_other_tokens_do_not_pair(llama):
    long = [" ".join(f"w{(7 * i + 3 * j) % 150}" for j in range(60)) for i in range(4)]
    options = {"sites": [0], "tokens": "first:3"}
    a, cut = profile_model(llama, long, **options), profile_model(llama, long, max_length=20, **options)
    check_pair(a, profile_model(llama, long, batch_tokens=70, **{**options, "sites": [1]}))
    with pytest.raises(UserError, match=r"differ in rows, with tokens=first:3: row i of one is not the token"):
        check_pair(a, cut)
    spans = [[{"text": text, "spans": [[at, at + 2]]} for text in long] for at in (0, 12)]
    with pytest.raises(UserError, match=r"differ in rows, with tokens=spans"):
        check_pair(*(profile_model(llama, part, sites=[0], tokens="spans") for part in spans))


def test_a_model_in_float64_is_kept_in_float32(caplog):
    model = load(make_model("llama").module.double(), tokenizer=make_model("llama").tokenizer)
    with caplog.at_level("WARNING", "workbench"):
        store = profile_model(model, PROMPTS, dtype="auto", sites=[0])
    assert store.dtype == "float32"
    assert "the model is in float64, which a store cannot hold" in caplog.text
    with pytest.raises(UserError, match="unknown dtype 'float64'"):
        profile_model(model, PROMPTS, dtype="float64")


def test_no_room_for_temporary_files_is_one_line(llama, tmp_path, monkeypatch):
    def full(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(spool.tempfile, "TemporaryFile", full)
    with pytest.raises(UserError, match=r"tokens to /.*: No space left on device; make room there, or set TMPDIR"):
        profile_model(llama, PROMPTS, tmp_path / "s")
    monkeypatch.undo()
    monkeypatch.setattr(spool.tempfile, "TemporaryFile", lambda **_: open("/dev/full", "r+b", 0))  # noqa: SIM115
    with pytest.raises(UserError, match="No space left on device"):
        profile_model(llama, PROMPTS, tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_a_point_that_is_not_there_is_told_before_the_prompts_are_read(llama, tmp_path, monkeypatch):
    parts = [part.without(["resid_mid"], "planted") for part in llama.anatomy]
    monkeypatch.setattr(llama, "anatomy", parts)
    monkeypatch.setattr(profile_plan, "_spool", lambda *_: pytest.fail("the prompts were read"))
    with pytest.raises(UserError, match=r"has no resid_mid\.0: planted"):
        profile_model(llama, PROMPTS, tmp_path / "s", sites=["resid_mid.0"])
    assert list(tmp_path.iterdir()) == []
