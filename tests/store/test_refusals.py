"""Whatever is not the store that its manifest describes is refused, with a line that says why, and never a traceback."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from workbench.alignment import _lines
from workbench.errors import UserError
from workbench.profile import profile_model
from workbench.prompts import PromptSet
from workbench.store import Store
from workbench.store import checks as store_checks
from workbench.store import tables as store_tables
from workbench.store.exports import export_store
from workbench.store.listing import describe_store
from workbench.store.staging import row_groups

from ..conftest import make_model
from .test_store import N, edit_manifest, make


@pytest.fixture
def store(tmp_path) -> Store:
    return make(tmp_path / "s")


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
        (lambda m: m.update(schema=1), "earlier version .*; profile again"),
        (lambda m: m.update(schema=True), "not a version"),
        (lambda m: m.update(dtype=["float32"]), "damaged"),
        (lambda m: m.update(n_rows=5), "do not add up"),
        (lambda m: m.update(n_rows=-1), "n_rows is -1"),
        (lambda m: m.update(n_rows=True), "n_rows is True"),
        (lambda m: m.update(n_rows=float(N)), "n_rows is 12.0"),
        (lambda m: m.update(n_rows=10**400), "n_rows is 1000"),
        (lambda m: m.update(tokens=3), "tokens is 3"),
        (lambda m: m["model"].update(fingerprint=[]), "fingerprint"),
        (lambda m: m["shards"].pop(), "do not add up"),
        (lambda m: m["shards"][0].update(rows=0), "the rows of shards/00000.safetensors is 0"),
        (lambda m: m["shards"][0].update(rows=10**30), "the rows of shards/00000.safetensors is 1000"),
        (lambda m: m["shards"][0].update(sha256="x"), "the sha256 of shards/00000"),
        (lambda m: m["shards"][0].update(nonfinite={}), "at other sites"),
        (lambda m: m["shards"][0]["nonfinite"].update({"resid_post.0": -1}), "nonfinite of resid_post.0 .* is -1"),
        (
            lambda m: m["shards"][0]["nonfinite"].update({"resid_post.0": False}),
            "nonfinite of resid_post.0 .* is False",
        ),
        (lambda m: m["shards"][0]["nonfinite"].update({"resid_post.0": 25}), "nonfinite of resid_post.0 .* is 25"),
        (lambda m: m.update(sites={}), "names no sites"),
        (lambda m: m["sites"].update({"resid_post": {"width": 6}}), "a site that is none"),
        (lambda m: m["sites"].update({"nose.1": {"width": 6}}), "a site that is none"),
        (lambda m: m["sites"].update({"1": {"width": 6}}), "otherwise than it is called"),
        (lambda m: m["sites"].update({"resid_post.-1": {"width": 6}}), "otherwise than it is called"),
        (lambda m: m["sites"].update({"9" * 9999: {"width": 6}}), "otherwise than it is called"),
        (lambda m: m["sites"]["resid_post.0"].update(width=1.5), "width of resid_post.0 is 1.5"),
        (lambda m: m["sites"]["resid_post.0"].update(width=7), "header says .* of resid_post.0, the manifest means"),
        (lambda m: m.pop("prompts"), "damaged"),
        (lambda m: m["tables"].pop("rows.parquet"), "other tables"),
        (lambda m: m.update(sites={"resid_post.7": {"width": 6}}), "out of range"),
        (_rename_shard("../outside.safetensors"), "not allowed"),
        (_rename_shard("shards/../../outside.safetensors"), "not allowed"),
        (_rename_shard("/etc/passwd"), "not allowed"),
        (_rename_shard("shards/.hidden/../x.safetensors"), "not allowed"),
        (_rename_shard("shards/x.pt"), "not allowed"),
        (_rename_shard("manifest.json"), "not allowed"),
        (_rename_shard(7), "not allowed"),
        (_rename_shard("shards/missing.safetensors"), "is missing"),
        (_rename_shard("shards/00001.safetensors"), "is not allowed"),
    ],
)
def test_a_manifest_that_lies_is_refused(store, change, said):
    edit_manifest(store, change)
    with pytest.raises(UserError, match=said) as caught:
        Store.open(store.path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


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


def test_a_pickle_is_never_loaded(store, tmp_path):
    for name in ("extra.pt", "shards/00003.pkl", "shards/pytorch_model.bin"):
        (store.path / name).write_bytes(b"\x80\x04N.")
        with pytest.raises(UserError, match=rf"{name.split('/')[-1]} is a pickle, which can run code"):
            Store.open(store.path)
        (store.path / name).unlink()
    Store.open(store.path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "activations.pt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"has no manifest.json, so it is no store \(activations.pt in it is a pickle"):
        Store.open(tmp_path / "folder")
    with zipfile.ZipFile(tmp_path / "archive", "w") as archive:  # what torch.save writes
        archive.writestr("data.pkl", bytes(_shard(store).stat().st_size))
    size = _shard(store).stat().st_size
    _shard(store).write_bytes((tmp_path / "archive").read_bytes()[:size])
    with pytest.raises(UserError, match="is a pickle or a zip archive under another name"):
        Store.open(store.path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested too deep"),
        ('{"format": "workbench.store", "format": "workbench.store"}', "has 'format' twice"),
        ('{"n_rows": NaN}', "holds NaN"),
        ('{"n_rows": -Infinity}', "holds -Infinity"),
        ('{"n_rows": 1e999}', "holds 1e999"),
        ('{"n_rows": ' + "9" * 5000 + "}", "damaged"),
        ("[]", "not that of a store"),
        ("\0\0", "not JSON"),
        (b"\xff\xfe", "not JSON"),
    ],
)
def test_a_manifest_that_is_no_manifest_is_refused(store, text, said):
    (store.path / "manifest.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=said):
        Store.open(store.path)


def test_a_manifest_of_gigabytes_is_not_read(store):
    with (store.path / "manifest.json").open("ab") as stream:
        stream.truncate(store_checks.MANIFEST_BYTES + 1)  # a hole: it takes no disk
    with pytest.raises(UserError, match="more than any store's"):
        Store.open(store.path)


def test_links_and_pipes_are_not_followed(store, tmp_path):
    shutil.move(store.path / "shards", tmp_path / "elsewhere")
    (store.path / "shards").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="shards is a link or no folder"):
        Store.open(store.path)
    (store.path / "shards").unlink()
    shutil.move(tmp_path / "elsewhere", store.path / "shards")
    shutil.move(store.path / "rows.parquet", tmp_path / "rows.parquet")
    (store.path / "rows.parquet").symlink_to(tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"rows\.parquet is not a regular file"):
        Store.open(store.path)
    (store.path / "manifest.json").unlink()
    os.mkfifo(store.path / "manifest.json")
    with pytest.raises(UserError, match=r"manifest\.json is not a regular file"):
        Store.open(store.path)
    with pytest.raises(UserError, match="is a file, and a store is a folder"):
        Store.open(tmp_path / "rows.parquet")


def _table(store, name, table, **options):
    """Replaces a table, and lets the manifest know its size: who forges one file can forge two."""
    pq.write_table(table, store.path / name, **options)
    edit_manifest(store, lambda m: m["tables"][name].update(bytes=(store.path / name).stat().st_size))
    return Store.open(store.path)


def test_a_table_of_more_lines_than_the_manifest_counts_is_not_read(store):
    forged = _table(store, "rows.parquet", pa.table({"prompt": [0] * 100_000}))
    with pytest.raises(UserError, match=r"rows\.parquet says that it holds 100000 lines, its manifest.json says 12"):
        forged.rows()
    forged = _table(store, "prompts.parquet", pa.table({"id": ["a"]}))
    with pytest.raises(UserError, match=r"holds 1 lines, .* says 6"):
        forged.prompt_set()


def test_a_zip_bomb_is_not_unpacked(store, monkeypatch):
    monkeypatch.setattr(store_tables, "SMALL", 1 << 20)
    text = ["0" * 4_000_000] * N
    plain = _table(store, "rows.parquet", pa.table({"prompt": [0] * N, "text": text}), compression="gzip",
                   use_dictionary=False)  # fmt: skip
    with pytest.raises(UserError, match=r"rows\.parquet says that its \d+ bytes unpack to \d+, as only a zip bomb"):
        plain.rows()
    named_often = pa.table({"prompt": [0] * N, "text": text})
    shared = _table(store, "rows.parquet", named_often, compression="gzip")
    with pytest.raises(UserError, match=r"unpack to \d+, as only a zip bomb"):
        shared.rows()
    for read in (lambda: describe_store(store.path), lambda: list(row_groups(Store.open(store.path), "rows.parquet"))):
        with pytest.raises(UserError, match=r"unpack to \d+, as only a zip bomb"):
            read()


def test_a_bomb_of_prompts_is_not_unpacked_by_what_reads_them_in_parts(store, monkeypatch):
    monkeypatch.setattr(store_tables, "SMALL", 1 << 20)
    named = {"index": range(6), "text": ["0" * 4_000_000] * 6, "label": ["0" * 4_000_000] * 6, "content": ['""'] * 6}
    bomb = _table(store, "prompts.parquet", pa.table(named), compression="gzip")
    for read in (lambda: describe_store(bomb.path, prompt=0), lambda: next(_lines(bomb, ["text"])),
                 lambda: export_store(bomb, store.path.parent / "e", to="parquet")):  # fmt: skip
        with pytest.raises(UserError, match=r"unpack to \d+, as only a zip bomb"):
            read()


def test_many_copies_of_one_long_prompt_are_no_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(store_tables, "SMALL", 1 << 10)
    prompts = PromptSet.load(["w1 w2 " * 1400] * 300, chat=False)
    found = profile_model(make_model("llama"), prompts, tmp_path / "s", sites=[0], max_length=8)
    assert found.prompt_set() == prompts
    assert len(found.prompts()) == 300


@pytest.mark.parametrize(("start", "stop", "size"), [(0, None, 5), (3, 9, 2), (4, 5, 100), (11, 12, 1), (5, 5, 3)])
def test_lines_of_a_table_are_read_in_parts_across_its_row_groups(store, start, stop, size):
    words = [f"t{i % 3}" for i in range(N)]
    table = pa.table({"prompt": [i // 2 for i in range(N)], "text": words})
    batches = list(_table(store, "rows.parquet", table, row_group_size=4).tables.batches(
        "rows.parquet", ["text"], size, start, stop))  # fmt: skip
    assert [word for batch in batches for word in batch["text"].to_pylist()] == words[start:stop]
    assert all(0 < len(batch) <= size for batch in batches)


@pytest.mark.parametrize("prompt", [["a"] * N, [0.5] * N, [99] * N, [-1] * N, list(range(N))[::-1], [None] * N])
def test_rows_of_prompts_that_there_are_not_are_refused(store, prompt):
    forged = _table(store, "rows.parquet", pa.table({"prompt": prompt}))
    with pytest.raises(UserError, match=r"rows\.parquet is damaged"):
        _ = forged.prompt_index
    with pytest.raises(UserError, match=r"rows\.parquet is damaged"):
        _table(store, "rows.parquet", pa.table({"prompt": prompt}), write_statistics=False).rows_of(0)


def test_a_table_whose_rows_have_no_prompts_is_refused(store):
    for rows, said in (({"text": ["a"] * N}, "has no column prompt"), ({"prompt": [[0]] * N}, "is damaged"),
                       ({"prompt": ["a"] * N}, "is damaged")):  # fmt: skip
        with pytest.raises(UserError, match=rf"rows\.parquet {said}"):
            _table(store, "rows.parquet", pa.table(rows)).rows_of(0)


@pytest.mark.parametrize("content", ["{", "3", '[["role"]]', "[" * 100_000, '"another"', None])
def test_prompts_that_are_not_those_of_the_manifest_are_refused(store, content):
    columns = {
        "id": list("abcdef"),
        "label": [None] * 6,
        "meta": ["{}"] * 6,
        "content": pa.array([content] * 6, pa.string()),
    }
    with pytest.raises(UserError, match=r"prompts\.parquet is damaged"):
        _table(store, "prompts.parquet", pa.table(columns)).prompt_set()


def test_whatever_the_manifest_says_it_is_opened_or_refused(store):
    """Every value of it is replaced by something else, many times over."""
    text, dice = (store.path / "manifest.json").read_text(), random.Random(0)
    others = [None, True, -1, 0, 10**30, 1.5, "x", "../x", [], {}, [1], {"a": 1}, "resid_post.0"]
    said = []
    for _ in range(400):
        manifest = json.loads(text)
        place, keys = manifest, []
        while isinstance(place, (dict, list)) and place and (not keys or dice.random() < 0.8):
            keys.append(dice.choice(list(place) if isinstance(place, dict) else range(len(place))))
            holder, place = place, place[keys[-1]]
        holder[keys[-1]] = dice.choice(others)
        (store.path / "manifest.json").write_text(json.dumps(manifest))
        try:
            opened = Store.open(store.path)
            assert opened.read(opened.sites[0]).shape == (N, opened.width(opened.sites[0])), keys
        except UserError as err:
            said.append(str(err))
    assert len(said) > 200
    assert not [line for line in said if "\n" in line or len(line) > 600]


def test_whatever_a_header_says_it_is_refused(store):
    whole, dice = _shard(store).read_bytes(), random.Random(0)
    length = 8 + struct.unpack("<Q", whole[:8])[0]
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[dice.randrange(length)] ^= 1 << dice.randrange(8)
        _shard(store).write_bytes(damaged)
        with pytest.raises(UserError, match=r"shards/00001\.safetensors"):
            Store.open(store.path)


def test_whatever_a_table_holds_it_is_read_or_refused(store):
    dice, said = random.Random(0), []
    for name, read in (
        ("rows.parquet", lambda s: (s.rows(), s.prompt_index)),
        ("prompts.parquet", lambda s: s.prompt_set()),
    ):
        whole = (store.path / name).read_bytes()
        for _ in range(150):
            damaged = bytearray(whole)
            for _ in range(dice.randrange(1, 4)):
                damaged[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
            (store.path / name).write_bytes(damaged)
            try:
                read(Store.open(store.path))
            except UserError as err:
                said.append(str(err))
        (store.path / name).write_bytes(whole)
    assert said
    assert not [line for line in said if "\n" in line or len(line) > 600]


def test_nothing_is_allocated_for_rows_that_the_files_do_not_hold(store):
    """Counts that agree with one another but not with the files end at the size of the first shard."""

    def huge(manifest):
        manifest["n_rows"] += 10**12
        manifest["shards"][0]["rows"] += 10**12

    edit_manifest(store, huge)
    with pytest.raises(UserError, match="header"):
        Store.open(store.path)
