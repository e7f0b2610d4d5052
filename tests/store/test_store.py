"""A store reads back what was written, lazily, and refuses every folder that is not what its manifest says."""

from __future__ import annotations

import copy
import inspect
import json
import random
import shutil
import threading
import time
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from workbench.errors import UserError
from workbench.prompts import PromptSet
from workbench.sites import Site
from workbench.store import Store, check_pair
from workbench.store import batches as store_batches
from workbench.store.checks import manifest_text
from workbench.store.rows import RowFiles
from workbench.store.writer import StoreWriter

from ..benchmarks.store_bench import make_hollow_store

BLOCKS = (4, 3, 5)
N = sum(BLOCKS)
WIDTHS = {Site(2, "mlp_act"): 9, Site(0): 6, Site(2): 6}
SITES = list(WIDTHS)


PROMPTS = PromptSet.load([f"prompt {i}" for i in range(N // 2)])


def values(site: Site, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(N, WIDTHS[site], generator=torch.Generator().manual_seed(WIDTHS[site] + site.layer)).to(dtype)


def write_tables(folder):
    rows = {"row": list(range(N)), "prompt": [i // 2 for i in range(N)], "text": ["x"] * N}
    pq.write_table(pa.table(rows), folder / "rows.parquet")
    lines = [{"index": i, "id": p.id, "text": "x", "label": p.label, "meta": "{}", "content": json.dumps(p.content)}
             for i, p in enumerate(PROMPTS)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(lines), folder / "prompts.parquet")


def make(path, dtype="float32", **changes) -> Store:
    manifest = {
        "format": "workbench.store", "schema": 2, "basis": "raw", "dtype": dtype, "tokens": "last", "n_rows": N,
        "model": {"name": "m", "n_layers": 3, "width": 6, "fingerprint": {"tokenizer": "t"}},
        "prompts": {"name": "p", "count": N // 2, "hash": PROMPTS.hash, "rendered_hash": "r"},
        "sites": {str(site): {"width": width} for site, width in WIDTHS.items()}, **changes,
    }  # fmt: skip
    with StoreWriter(path, "plan") as writer:
        start = 0
        for n in BLOCKS:
            block = {site: values(site, getattr(torch, dtype))[start : start + n] for site in SITES}
            writer.write(block, dict.fromkeys(SITES, 0))
            start += n
        writer.finish(manifest, write_tables)
    return Store.open(path)


@pytest.fixture
def store(tmp_path) -> Store:
    return make(tmp_path / "s")


def edit_manifest(store: Store, change) -> None:
    manifest = json.loads((store.path / "manifest.json").read_text())
    change(manifest)
    (store.path / "manifest.json").write_text(manifest_text(manifest))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_read_is_what_was_written(tmp_path, dtype):
    store = make(tmp_path / "s", dtype)
    for site in SITES:
        x = values(site, getattr(torch, dtype))
        assert torch.equal(store.read(site), x)
        assert torch.equal(store.read(str(site), dtype=torch.float32), x.float())
        for rows in (slice(1, 3), slice(3, 9), slice(None, None, 3), slice(5, 5), slice(2, 99)):
            assert torch.equal(store.read(site, rows), x[rows])
        for rows in ([11, 0, 5, 5, -1], torch.tensor([4, 3]), [], range(2, 7), range(9, 1, -2)):
            assert torch.equal(store.read(site, rows), x[torch.as_tensor(list(rows), dtype=torch.int64)])
        mask = torch.arange(N) % 3 == 1
        assert torch.equal(store.read(site, mask), x[mask])
        assert torch.equal(torch.cat(list(store.iter_batches(site, 5))), x)
    assert [store.width(site) for site in SITES] == [9, 6, 6]
    assert len(store) == N
    store.verify()


def test_tables_and_description(store):
    assert store.prompt_index.tolist() == [i // 2 for i in range(N)]
    assert list(store.rows(["row"]).columns) == ["row"]
    assert len(store.prompts()) == N // 2
    assert (store.tokens, store.prompt_hash, store.name, store.sites) == ("last", PROMPTS.hash, "m", SITES)
    assert "12 rows" in repr(store)


def test_reading_within_a_shard_is_a_map_and_writing_to_it_changes_no_file(store):
    rows = store.read(0, slice(0, 4))
    rows += 1
    store.verify()
    assert torch.equal(store.read(0), values(Site(0)))


def test_a_prompt_is_found_with_its_rows(store):
    assert [list(store.rows_of(i)) for i in range(N // 2)] == [[2 * i, 2 * i + 1] for i in range(N // 2)]
    before = [store.rows_of(i) for i in range(N // 2)]
    assert store.prompt_index.shape == (N,)
    assert [store.rows_of(i) for i in range(N // 2)] == before  # also once the whole table is in memory
    assert store.prompt_set() == PromptSet(PROMPTS.prompts, "p")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_shard_is_what_safetensors_writes_and_reads(tmp_path, dtype):
    store = make(tmp_path / "s", dtype)
    start = 0
    for shard, n in zip(store.shards, BLOCKS, strict=True):
        block = {str(site): values(site, getattr(torch, dtype))[start : start + n] for site in SITES}
        assert (store.path / shard["file"]).read_bytes() == save({k: v.contiguous() for k, v in block.items()})
        with safe_open(store.path / shard["file"], "pt") as file:
            assert file.keys() == sorted(block)
            assert all(torch.equal(file.get_tensor(name), rows) for name, rows in block.items())
        start += n


@pytest.fixture
def cold(monkeypatch):
    """Nothing is in the system's memory."""
    monkeypatch.setattr(RowFiles, "at_hand", lambda *_: False)


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("group", [1, 100, 1 << 20])
@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_batches_are_the_rows_in_order(store, monkeypatch, size, group, warm):
    monkeypatch.setattr(RowFiles, "at_hand", lambda *_: warm)
    monkeypatch.setattr(store_batches, "GROUP", group)
    x = values(Site(0))
    for rows in (None, slice(2, 9), range(3, 12), [7, 0, 7, 11], slice(None, None, -2), torch.arange(N) % 3 == 0, []):
        want = x if rows is None else store.read(0, rows)
        found = list(store.iter_batches(0, size, rows))
        assert [len(batch) for batch in found[:-1]] == [size] * (len(found) - 1)
        assert torch.equal(torch.cat([*found, x[:0]]), want)
        several = list(store.iter_batches([0, Site(2, "mlp_act")], size, rows, dtype=torch.float64))
        assert all(list(batch) == [Site(0), Site(2, "mlp_act")] for batch in several)
        assert torch.equal(torch.cat([*(batch[Site(0)] for batch in several), x[:0]]), want.double())


def test_shuffled_batches_are_all_the_rows_the_same_way_for_a_seed(store):
    one, again, other = (torch.cat(list(store.iter_batches(0, 5, seed=seed))) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(one.sort(0).values, store.read(0).sort(0).values)
    together = list(store.iter_batches(["resid_post.0", "resid_post.2"], 5, seed=0))
    assert torch.equal(torch.cat([batch[Site(2)] for batch in together]), store.read(2)[order_of(one, store.read(0))])


def order_of(shuffled, x):
    return torch.tensor([int((x == row).all(1).nonzero()) for row in shuffled])


def test_no_thread_is_started_for_rows_that_are_in_memory(store, monkeypatch):
    monkeypatch.setattr(RowFiles, "at_hand", lambda *_: True)
    batches = store.iter_batches(0, 4)
    next(batches)
    assert not reading_threads()
    assert len(list(batches)) == 2


def test_a_batch_is_the_readers_own(store):
    for batch in store.iter_batches(0, 3):
        batch.zero_()
    store.verify()
    assert torch.equal(store.read(0), values(Site(0)))


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_memory_is_lent_again_only_when_no_batch_uses_it(store, monkeypatch, dtype):
    monkeypatch.setattr(store_batches, "GROUP", 1)
    x = values(Site(0)).to(dtype or torch.float32)
    rows = torch.stack([batch[0, :3] for batch in store.iter_batches(0, 1, dtype=dtype)])  # a copy, at once
    views = [batch[0, :3] for batch in store.iter_batches(0, 1, dtype=dtype)]  # parts of the batches, kept
    assert torch.equal(rows, x[:, :3])
    assert torch.equal(torch.stack(views), x[:, :3])
    assert len({view.data_ptr() for view in views}) == N
    used = {batch.data_ptr() for batch in store.iter_batches(0, 1, dtype=dtype)}
    assert len(used) < N


def reading_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("store-batches")]


@pytest.mark.usefixtures("cold")
def test_the_reading_thread_ends_with_the_iterator(store, monkeypatch):
    monkeypatch.setattr(store_batches, "GROUP", 1)
    batches = store.iter_batches(0, 1)
    next(batches)
    assert reading_threads()
    batches.close()
    assert not reading_threads()
    batches = store.iter_batches(0, 1)
    next(batches)
    gone = store.path.rename(store.path.with_name("gone"))  # at once: the thread reads ahead meanwhile
    shutil.rmtree(gone)
    with pytest.raises(UserError, match="was replaced or removed"):
        list(batches)
    assert not reading_threads()


@pytest.mark.usefixtures("cold")
def test_no_more_is_read_ahead_than_said(store, monkeypatch):
    monkeypatch.setattr(store_batches, "GROUP", 1)
    read = []
    real = RowFiles.read_into
    monkeypatch.setattr(RowFiles, "read_into", lambda *args: (read.append(1), real(*args))[1])
    batches = store.iter_batches(0, 1)
    next(batches)
    time.sleep(0.1)
    assert len(read) <= store_batches.AHEAD + 1
    assert len(list(batches)) == N - 1


def test_any_row_of_a_store_larger_than_memory_is_at_hand(tmp_path):
    """Ten million rows at 32 sites are terabytes; of holes, here. What is read is as large as what was asked for."""
    store = Store.open(make_hollow_store(tmp_path / "s", 10_000_000, n_sites=32, block=16384))
    assert store.n_bytes > 2**41
    assert (len(store), len(store.sites), len(store.shards)) == (10_000_000, 32, 611)
    rows = store.read(31, [9_999_999, 0, 5_000_000])
    assert rows.shape == (3, 4096)
    assert not rows.any()
    assert next(store.iter_batches([0, 31], 8, slice(16380, None)))[Site(31)].shape == (8, 4096)
    assert len(store.rows_of(0)) == 10_000_000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("group", [1, 1 << 20])
def test_a_gpu_gets_the_same_rows(store, monkeypatch, group):
    monkeypatch.setattr(store_batches, "GROUP", group)
    x = store.read(0)
    for rows in (None, slice(2, 9), [7, 0, 11]):
        want = x if rows is None else store.read(0, rows)
        found = list(store.iter_batches(0, 2, rows, device="cuda", dtype=torch.float64))
        assert all(batch.is_cuda for batch in found)
        assert torch.equal(torch.cat(found).cpu(), want.double())
        assert torch.equal(store.read(0, rows, device="cuda", dtype=torch.float64).cpu(), want.double())
    total = torch.zeros(6, device="cuda")
    for batch in store.iter_batches([0, 2], 1, device="cuda"):
        total += batch[Site(0)].sum(0)  # at once, on the stream in use
    torch.testing.assert_close(total.cpu(), x.sum(0))


def test_a_store_is_opened_anew_in_another_process(store):
    again = copy.deepcopy(store)  # as a worker process gets it: by what it is made of
    assert torch.equal(again.read(0), store.read(0))


def test_what_the_store_does_not_have_is_named(store):
    with pytest.raises(UserError, match=r"has no resid_post\.1; it has mlp_act\.2, resid_post\.0, resid_post\.2"):
        store.read(1)
    with pytest.raises(UserError, match="out of range"):
        store.read(3)
    with pytest.raises(UserError, match="rows 0 to 11"):
        store.read(0, [12])
    with pytest.raises(UserError, match="mask of 3"):
        store.read(0, torch.ones(3, dtype=torch.bool))
    with pytest.raises(UserError, match="at least one"):
        store.iter_batches(0, 0)
    with pytest.raises(UserError, match="no sites to iterate"):
        store.iter_batches([], 4)
    with pytest.raises(UserError, match="whole numbers"):
        store.read(0, torch.tensor([0.5]))
    with pytest.raises(UserError, match=r"no column nonsense; it has row"):
        store.rows(["nonsense"])
    with pytest.raises(UserError, match="prompts 0 to 5; got -1"):
        store.rows_of(-1)


def test_verify_catches_any_flipped_byte_and_foreign_files(store):
    store.verify()
    dice = random.Random(0)
    files = sorted(f for f in store.path.rglob("*") if f.is_file())
    for _ in range(1000):
        file = dice.choice(files)
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=file.name):
            store.verify()
        file.write_bytes(whole)
    store.verify()
    (store.path / "stray.pkl").write_bytes(b"x")
    with pytest.raises(UserError, match=r"stray\.pkl"):
        store.verify()


def test_a_store_that_was_replaced_must_be_opened_again(store, tmp_path):
    other = make(tmp_path / "other")
    shutil.rmtree(store.path)
    shutil.move(other.path, store.path)
    with pytest.raises(UserError, match="open it again"):
        store.read(0)


def test_pairs(tmp_path):
    a, b = make(tmp_path / "a"), make(tmp_path / "b")
    check_pair(a, b)
    prompts = {"name": "q", "count": 6, "hash": "another", "rendered_hash": "r"}
    other = make(tmp_path / "c", prompts=prompts, tokens="all")
    with pytest.raises(
        UserError,
        match=r"/a and .*/c do not pair: .*prompts \(p, [0-9a-f]{12} and q, another\); tokens \(last and all\)",
    ):
        check_pair(a, other)
    model = {"name": "m", "n_layers": 3, "width": 6, "fingerprint": {"tokenizer": "u"}}
    wordy = [make(tmp_path / "d", tokens="all"), make(tmp_path / "e", tokens="all", model=model)]
    check_pair(wordy[0], wordy[0])
    with pytest.raises(
        UserError,
        match=r"differ in tokenizers, with .* take the rows that do with workbench\.alignment\.pair_rows",
    ):
        check_pair(*wordy)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda s: wild(s.read)("0", 5), r"a mask; got 5; one row is \[5\]"),
        (lambda s: wild(s.read)("0", "abc"), "one list of whole numbers, or a mask; got 'abc'"),
        (lambda s: wild(s.read)("0", slice("a", 2)), r"a mask; got slice\('a', 2, None\)"),
        (lambda s: s.read("0", torch.ones(2, 12, dtype=torch.bool)), "2 dimensions of torch.bool"),
        (lambda s: s.read("0", dtype="int8"), "unknown dtype 'int8' of rows; allowed: float32"),
        (lambda s: s.read("0", device="cuda:99"), "device 'cuda:99' is not there: this machine shows"),
        (lambda s: s.read("0", device="abacus"), "unknown device 'abacus'; give cpu"),
        (lambda s: wild(s.rows_of)("0"), "the index of a prompt must be a whole number; got '0'"),
        (lambda s: wild(s.iter_batches)("0", 100.5), "the size of a batch must be a whole number; got 100.5"),
    ],
)
def test_what_cannot_be_asked_for_is_told(store, call, said):
    with pytest.raises(UserError, match=said):
        call(store)


def wild(method):
    """A method without the type checks that only the tests put around it."""
    return partial(inspect.unwrap(method.__func__), method.__self__)


def test_dtypes_have_names(store):
    assert store.read("0", dtype="float16").dtype == torch.float16
    assert {b.dtype for b in store.iter_batches("0", 5, dtype="bfloat16")} == {torch.bfloat16}
