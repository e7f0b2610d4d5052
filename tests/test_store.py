"""A store reads back what was written, lazily, and refuses every folder that is not what its manifest says."""

from __future__ import annotations

import json
import random
import shutil
import struct

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from workbench.errors import UserError
from workbench.prompts import PromptSet
from workbench.sites import Site
from workbench.store import Store, check_pair
from workbench.store_checks import manifest_text
from workbench.store_writer import StoreWriter

WIDTH, BLOCKS = 6, (4, 3, 5)
N = sum(BLOCKS)
SITES = [Site(0), Site(2)]


PROMPTS = PromptSet.load([f"prompt {i}" for i in range(N // 2)])


def values(site: Site, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(site.layer)).to(dtype)


def write_tables(folder):
    rows = {"row": list(range(N)), "prompt": [i // 2 for i in range(N)], "text": ["x"] * N}
    pq.write_table(pa.table(rows), folder / "rows.parquet")
    lines = [{"index": i, "id": p.id, "text": "x", "label": p.label, "meta": "{}", "content": json.dumps(p.content)}
             for i, p in enumerate(PROMPTS)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(lines), folder / "prompts.parquet")


def make(path, dtype="float32", **changes) -> Store:
    manifest = {
        "format": "workbench.store", "schema": 2, "basis": "raw", "dtype": dtype, "tokens": "last", "n_rows": N,
        "model": {"name": "m", "n_layers": 3, "width": WIDTH, "fingerprint": {"tokenizer": "t"}},
        "prompts": {"name": "p", "count": N // 2, "hash": PROMPTS.hash, "rendered_hash": "r"},
        "sites": {str(site): {"width": WIDTH} for site in SITES}, **changes,
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
    assert store.width(2) == WIDTH
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


def test_what_the_store_does_not_have_is_named(store):
    with pytest.raises(UserError, match=r"has no resid_post\.1; it has resid_post\.0, resid_post\.2"):
        store.read(1)
    with pytest.raises(UserError, match="out of range"):
        store.read(3)
    with pytest.raises(UserError, match="rows 0 to 11"):
        store.read(0, [12])
    with pytest.raises(UserError, match="mask of 3"):
        store.read(0, torch.ones(3, dtype=torch.bool))
    with pytest.raises(UserError, match="at least one"):
        next(store.iter_batches(0, 0))


def _rename_shard(name):
    def change(manifest):
        manifest["shards"][0]["file"] = name

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update(schema=99), "later version"),
        (lambda m: m.update(schema="1"), "not a version"),
        (lambda m: m.update(format="other"), "not that of a store"),
        (lambda m: m.update(dtype="int8"), "unknown dtype"),
        (lambda m: m.update(n_rows=5), "do not add up"),
        (lambda m: m.pop("prompts"), "damaged"),
        (lambda m: m["tables"].pop("rows.parquet"), "other tables"),
        (lambda m: m.update(sites={"resid_post.7": {"width": 6}}), "out of range"),
        (_rename_shard("../outside.safetensors"), "not allowed"),
        (_rename_shard("shards/../../outside.safetensors"), "not allowed"),
        (_rename_shard("/etc/passwd"), "not allowed"),
        (_rename_shard("shards/missing.safetensors"), "is missing"),
        (_rename_shard("shards/00001.safetensors"), "is not allowed"),
    ],
)
def test_a_manifest_that_lies_is_refused(store, change, said):
    edit_manifest(store, change)
    with pytest.raises(UserError, match=said):
        Store.open(store.path)


def test_folders_that_are_no_stores_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        Store.open(tmp_path / "none")
    with pytest.raises(UserError, match="no manifest"):
        Store.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        Store.open(tmp_path)


def _shard(store):
    return store.path / "shards" / "00001.safetensors"


def test_a_shard_of_another_size_is_refused(store):
    with _shard(store).open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(UserError, match=r"bytes, its manifest\.json says"):
        Store.open(store.path)
    with pytest.raises(UserError, match="changed since"):
        store.read(0)


def test_a_shard_that_is_a_link_is_refused(store, tmp_path):
    shutil.move(_shard(store), tmp_path / "elsewhere")
    _shard(store).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="not a regular file"):
        Store.open(store.path)


@pytest.mark.parametrize("lie", ["shape", "offset", "dtype", "length", "pickle"])
def test_a_shard_with_a_lying_header_is_refused(store, lie):
    data = _shard(store).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    one = header["resid_post.0"]
    one.update(
        {"shape": {"shape": [6, 3]}, "offset": {"data_offsets": [8, 80]}, "dtype": {"dtype": "I32"}}.get(lie, {})
    )
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    new = struct.pack("<Q", length) + text + data[8 + length :]
    new = {"length": struct.pack("<Q", 1 << 60) + new[8:], "pickle": b"\x80\x04" + bytes(len(data) - 2)}.get(lie, new)
    assert len(new) == len(data)
    _shard(store).write_bytes(new)
    with pytest.raises(UserError, match=r"its header says|not a safetensors file|is a pickle"):
        Store.open(store.path)


def test_verify_catches_any_flipped_byte_and_foreign_files(store):
    store.verify()
    dice = random.Random(0)
    files = sorted(f for f in store.path.rglob("*") if f.is_file())
    for _ in range(200):
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
    model = {"name": "m", "n_layers": 3, "width": WIDTH, "fingerprint": {"tokenizer": "u"}}
    wordy = [make(tmp_path / "d", tokens="all"), make(tmp_path / "e", tokens="all", model=model)]
    check_pair(wordy[0], wordy[0])
    with pytest.raises(UserError, match="differ in tokenizers"):
        check_pair(*wordy)
