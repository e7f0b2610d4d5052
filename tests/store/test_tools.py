"""Stores are found, checked, mended, cleared up after and merged; and nothing is touched that should not be."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import shutil
import tempfile
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workbench.errors import UserError
from workbench.profile import plan as profile_plan
from workbench.profile import profile_model
from workbench.profile import run as profile_run
from workbench.profile.repair import repair_store
from workbench.profile.sums import profile_moments
from workbench.prompts import PromptSet
from workbench.sites import Site
from workbench.store import Store
from workbench.store.checks import manifest_text
from workbench.store.checkup import find_damage, verify_stores
from workbench.store.leftovers import clear_after, find_leftovers, remove_leftovers
from workbench.store.listing import compact_sites, describe_store, find_stores
from workbench.store.locks import claim_shared, held, is_held
from workbench.store.merge import merge_stores
from workbench.store.writer import StoreWriter

from ..conftest import LAYERS, make_model

TEXTS = [" ".join(f"w{(7 * i + 3 * j) % 150}" for j in range(3 + i % 5)) for i in range(13)]
PROMPTS = PromptSet.load([{"id": f"p{i}", "prompt": text, "label": "ab"[i % 2]} for i, text in enumerate(TEXTS)])


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


@pytest.fixture(scope="module")
def home(tmp_path_factory, model):
    """Profiles of parts of the prompts and of parts of the sites, in blocks of a few rows; not to be changed."""
    home = tmp_path_factory.mktemp("stores")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile_plan, "BLOCK_ROWS", 4)
        options = {"tokens": "first:2", "batch_tokens": 64}
        profile_model(model, PROMPTS, home / "whole", **options)
        for name, part in (("a", slice(0, 5)), ("b", slice(5, 6)), ("c", slice(6, 13))):
            profile_model(model, PROMPTS[part], home / name, **options)
        profile_model(model, PROMPTS, home / "low", sites=[0], **options)
        patch.setattr(profile_plan, "BLOCK_ROWS", 7)
        profile_model(model, PROMPTS, home / "high", sites=[1, 2], **options)
        patch.setattr(profile_plan, "BLOCK_ROWS", 4)
        profile_model(model, PROMPTS, home / "last")
        profile_model(model, PROMPTS[:5], home / "half", dtype="float16", **options)
    return home


@pytest.fixture
def store(home, tmp_path):
    """A store that a test may damage."""
    shutil.copytree(home / "whole", tmp_path / "s")
    return tmp_path / "s"


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def flip(file: Path, at: int = -5) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def shard(store: Path, number: int) -> Path:
    return store / json.loads((store / "manifest.json").read_text())["shards"][number]["file"]


def rename_as_interrupted(store: Path, *, new: bool) -> Path:
    """What a run leaves that was killed between its last two renames: the old store aside, the new one unnamed."""
    partial = store.parent / f".{store.name}.partial"
    partial.mkdir()
    (partial / "journal.jsonl").write_text('{"plan": "x"}\n')
    (partial / "lock").touch()
    if new:
        shutil.copytree(store, partial / "store")
    store.rename(partial / "old")
    return partial


# -- listing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sites", "said"),
    [
        ([0, 1, 2], "resid_post.0-2"),
        ([5, 3, 1, 2], "resid_post.1-3,5"),
        (["mlp_out.7", 4], "mlp_out.7, resid_post.4"),
        ([Site(0), Site(0)], "resid_post.0"),
        ([], ""),
    ],
)
def test_sites_are_shown_as_runs(sites, said):
    assert compact_sites(sites) == said


@given(st.sets(st.integers(0, 60), min_size=1))
def test_runs_name_every_layer_and_no_other(layers):
    shown = compact_sites(layers).removeprefix("resid_post.")
    runs = [list(map(int, run.split("-"))) for run in shown.split(",")]
    assert sorted(layers) == [i for run in runs for i in range(run[0], run[-1] + 1)]


def test_stores_are_found_wherever_they_lie_and_links_are_not_followed(home, tmp_path):
    deep = tmp_path / "x" / "y" / "s"
    shutil.copytree(home / "half", deep)
    (tmp_path / "x" / "link").symlink_to(deep)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"format": "something else"}')
    (found,) = find_stores(tmp_path)
    assert (found.path, found.state, found.rows, found.dtype, found.tokens) == (deep, "whole", 10, "float16", "first:2")
    assert found.sites == [f"resid_post.{i}" for i in range(LAYERS)]
    assert found.n_bytes == sum(f.stat().st_size for f in deep.rglob("*") if f.is_file())
    assert [one.path for one in find_stores(home)] == sorted(p for p in home.iterdir())
    assert [one.path for one in find_stores(deep)] == [deep]


def test_damaged_and_unfinished_stores_are_listed_with_what_is_wrong(home, tmp_path):
    for name in ("cut", "headless", "garbled"):
        shutil.copytree(home / "a", tmp_path / name)
    with shard(tmp_path / "cut", 0).open("ab") as stream:
        stream.write(b"x")
    (tmp_path / "headless" / "manifest.json").unlink()
    (tmp_path / "garbled" / "manifest.json").write_text("{")
    with StoreWriter(tmp_path / "running", "plan") as writer:
        writer.write({Site(0): torch.zeros(2, 3)}, {Site(0): 0})
        writer._settle()
        found = {one.path.name: (one.state, one.note) for one in find_stores(tmp_path)}
    assert found[".running.partial"] == ("unfinished", "1 block of running, being written")
    assert "run the same profile again" in find_stores(tmp_path)[0].note
    assert {name: state for name, (state, _) in found.items() if name[0] != "."} == dict.fromkeys(
        ("cut", "headless", "garbled"), "damaged"
    )
    assert "bytes, its manifest.json says" in found["cut"][1]
    assert found["headless"][1] == "has no manifest.json"
    assert "not JSON" in found["garbled"][1]
    with pytest.raises(UserError, match="no such folder; give the one that holds"):
        find_stores(tmp_path / "none")


def test_a_store_is_described_by_its_manifest_and_first_rows(home):
    shown = describe_store(home / "whole", rows=3)
    assert shown["manifest"]["n_rows"] == 26
    assert shown["n_shards"] == 7
    assert shown["nonfinite"] == {f"resid_post.{i}": 0 for i in range(LAYERS)}
    assert [row["row"] for row in shown["rows"]] == [0, 1, 2]
    assert shown["rows"][0]["text"]
    one = describe_store(home / "whole", prompt=7)
    assert {row["prompt"] for row in one["rows"]} == {7}
    assert [row["row"] for row in one["rows"]] == list(Store.open(home / "whole").rows_of(7))
    assert one["prompt"]["id"] == "p7"
    assert describe_store(home / "whole", rows=0)["rows"] == []
    json.dumps(shown)
    with pytest.raises(UserError, match="has prompts 0 to 12; got 13"):
        describe_store(home / "whole", prompt=13)


# -- verify -----------------------------------------------------------------------------------------------------------


def test_every_kind_of_damage_is_named(store):
    assert not find_damage(store)
    assert str(find_damage(store)).endswith("whole")
    flip(shard(store, 2))
    shard(store, 3).unlink()
    flip(store / "rows.parquet")
    (store / "shards" / "stray.bin").write_bytes(b"x")
    (store / "link").symlink_to("/etc")
    damage = find_damage(store)
    assert damage.damaged == ["rows.parquet", "shards/00002.safetensors"]
    assert damage.missing == ["shards/00003.safetensors"]
    assert damage.foreign == ["link", "shards/stray.bin"]
    for word in ("damaged rows.parquet", "missing shards/00003", "foreign link"):
        assert word in str(damage)
    assert find_damage(store, quick=True).damaged == []


def test_every_flipped_bit_is_found(store):
    draw = random.Random(0)
    files = [f for f in sorted(store.rglob("*")) if f.is_file()]
    for _ in range(25):
        file = draw.choice(files)
        data = bytearray(file.read_bytes())
        kept = bytes(data)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(data)
        damage = find_damage(store)
        assert damage.unreadable or str(file.relative_to(store)) in damage.damaged
        file.write_bytes(kept)
    assert not find_damage(store)


def test_a_manifest_that_was_changed_or_names_other_files_is_told(store):
    manifest = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").write_text(json.dumps({**manifest, "tokens": "all"}))
    assert find_damage(store).damaged == ["manifest.json"]
    manifest["shards"][0]["file"] = "../outside.safetensors"
    (store / "manifest.json").write_text(manifest_text(manifest))
    assert "not allowed" in find_damage(store).unreadable
    assert "no such folder" in verify_stores([store, store.parent / "gone"])[1].unreadable


# -- repair -----------------------------------------------------------------------------------------------------------


def test_a_replacement_that_was_stopped_is_finished(store):
    before = tree(store)
    partial = rename_as_interrupted(store, new=True)
    flip(shard(partial / "old", 0))  # what was replaced is not looked at
    made = repair_store(store)
    assert "gave the finished store its name" in made.done[0]
    assert made.whole
    assert tree(store) == before
    assert not partial.exists()


def test_a_store_that_was_set_aside_comes_back_where_the_new_one_is_not_whole(store):
    before = tree(store)
    partial = rename_as_interrupted(store, new=True)
    flip(shard(partial / "store", 0))
    assert "put back" in repair_store(store).done[0]
    assert tree(store) == before
    assert repair_store(store).done == []


def test_repair_waits_for_nobody_and_invents_no_store(store, tmp_path):
    partial = rename_as_interrupted(store, new=False)
    with held(partial), pytest.raises(UserError, match="is being written by another run"):
        repair_store(store)
    with StoreWriter(tmp_path / "new", "plan"):
        pass
    with pytest.raises(UserError, match="is unfinished; run the same profile again"):
        repair_store(tmp_path / "new")
    with pytest.raises(UserError, match="no such folder"):
        repair_store(tmp_path / "gone")


def test_foreign_files_go_only_when_asked(store):
    before = tree(store)
    (store / "deep").mkdir()
    (store / "deep" / "stray").write_text("x")
    (store / "shards" / "link").symlink_to(store / "rows.parquet")
    left = repair_store(store)
    assert left.left.foreign == ["deep/stray", "shards/link"]
    assert not left.whole
    assert (store / "deep" / "stray").exists()
    assert repair_store(store, remove_foreign=True).whole
    assert tree(store) == before


def test_nothing_is_removed_where_the_manifest_is_what_is_damaged(store):
    manifest = store / "manifest.json"
    name = json.loads(manifest.read_text())["shards"][1]["file"]
    manifest.write_text(manifest.read_text().replace(name, name.replace("0000", "0001")))
    before = tree(store)
    assert find_damage(store).foreign == [name]
    with pytest.raises(UserError, match=r"was changed .*nothing else says what the store held"):
        repair_store(store, remove_foreign=True)
    assert tree(store) == before


def test_a_link_in_place_of_the_shards_is_refused_and_stays(store, tmp_path):
    (store / "shards").rename(tmp_path / "elsewhere")
    (store / "shards").symlink_to(tmp_path / "elsewhere")
    assert "its shards is a link or no folder; put the folder" in find_damage(store).unreadable
    with pytest.raises(
        UserError, match=r"its shards is a link or no folder; put the folder of its shards in that place$"
    ):
        repair_store(store, remove_foreign=True)
    assert (store / "shards").is_symlink()
    assert len(list((tmp_path / "elsewhere").iterdir())) == 7


def test_a_damaged_manifest_is_not_mended(store):
    manifest = json.loads((store / "manifest.json").read_text())
    for text, said in ((json.dumps(manifest), "was changed"), ("{", "not JSON")):
        (store / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=f"{said}.*nothing else says what the store held: restore it"):
            repair_store(store, model=lambda: pytest.fail("the model was loaded"))


@pytest.mark.parametrize(
    "names", [["shards/00002.safetensors"], ["rows.parquet"], ["shards/00006.safetensors", "rows.parquet"]]
)
def test_what_is_damaged_is_computed_again_to_the_byte(store, model, monkeypatch, names):
    monkeypatch.setattr(profile_plan, "BLOCK_ROWS", 4)
    before = tree(store)
    for name in names:
        flip(store / name)
    assert repair_store(store).left.damaged == sorted(names)
    shard(store, 0).unlink()
    made = repair_store(store, model=lambda: model)
    assert made.whole
    assert len(made.done) == len(names) + 1
    assert tree(store) == before
    assert set(store.parent.iterdir()) == {store}


def test_damaged_prompts_are_mended_with_the_very_prompts(store, model, monkeypatch):
    monkeypatch.setattr(profile_plan, "BLOCK_ROWS", 4)
    before = tree(store)
    flip(store / "prompts.parquet")
    with pytest.raises(UserError, match=r"held the prompts; give those that were profiled \('prompts', 13 of them\)"):
        repair_store(store, model=model)
    with pytest.raises(UserError, match="give the very ones, in their order"):
        repair_store(store, model=model, prompts=PROMPTS[:4])
    assert repair_store(store, model=model, prompts=PROMPTS).whole
    assert tree(store) == before


def test_another_model_or_other_bits_leave_the_store_as_it_was(store, model, monkeypatch):
    flip(shard(store, 1))
    before = tree(store)
    with pytest.raises(UserError, match=r"another kind of device .* or this version cuts its blocks otherwise"):
        repair_store(store, model=model)
    monkeypatch.setattr(profile_plan, "BLOCK_ROWS", 4)
    with pytest.raises(UserError, match=r"would make another profile: it differs in .*model\.fingerprint\.weights"):
        repair_store(store, model=make_model("llama", seed=1))
    blocks = profile_run.run_blocks

    def noisy(*args):
        for number, rows, bad in blocks(*args):
            yield number, {site: x + 1e-6 for site, x in rows.items()}, bad

    monkeypatch.setattr(profile_run, "run_blocks", noisy)
    with pytest.raises(UserError, match=r"shards/00001\.safetensors came out with other bytes .* left as it was"):
        repair_store(store, model=model)
    assert tree(store) == before
    assert set(store.parent.iterdir()) == {store}


def test_what_no_profile_made_is_not_computed_again(home, tmp_path, model):
    merge_stores([home / "a", home / "b"], tmp_path / "m")
    flip(shard(tmp_path / "m", 0))
    with pytest.raises(UserError, match="made by merge and not by one profile; make it again from its sources"):
        repair_store(tmp_path / "m", model=lambda: pytest.fail("the model was loaded"))


# -- leftovers --------------------------------------------------------------------------------------------------------


def unfinished(out: Path) -> Path:
    with StoreWriter(out, "plan") as writer:
        writer.write({Site(0): torch.zeros(2, 3)}, {Site(0): 0})
        writer._settle()
        return writer.partial


def test_leftovers_of_dead_runs_go_and_those_of_living_ones_stay(tmp_path):
    dead, living = unfinished(tmp_path / "dead"), unfinished(tmp_path / "deep" / "living")
    export = tmp_path / ".e.partial-abcdefgh"
    export.mkdir()
    (export / "lock").touch()
    with held(living):
        found = {one.path: one for one in find_leftovers(tmp_path, temporary=False)}
        assert found.keys() == {dead, living, export}
        assert found[living].kept == "a process is using it"
        assert found[dead].n_bytes == sum(f.stat().st_size for f in dead.rglob("*") if f.is_file())
        done = remove_leftovers(list(found.values()))
        assert {one.path for one in done if not one.kept} == {dead, export}
        assert living.exists()
        assert not dead.exists()
    assert set(tmp_path.iterdir()) == {tmp_path / "deep"}
    with pytest.raises(UserError, match="no such folder"):
        find_leftovers(tmp_path / "gone")


def test_one_that_is_taken_up_after_it_was_listed_stays(tmp_path):
    partial = unfinished(tmp_path / "s")
    listed = find_leftovers(tmp_path, temporary=False)
    assert not listed[0].kept
    with held(partial):
        (done,) = remove_leftovers(listed)
    assert done.kept
    assert partial.exists()


def test_what_is_left_of_a_finished_store_goes_when_its_name_is_refused_again(store, model):
    partial = store.parent / f".{store.name}.partial"
    for names, stays in ((["journal.jsonl", "lock"], False), ([], False), (["journal.jsonl", "store"], True),
                         (["old"], True), (["parts/a/.marker"], False), (["parts/a/00001.json"], True),
                         (["lock", "mine.txt"], True)):  # fmt: skip
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name in names:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).touch()
        with pytest.raises(UserError, match="exists already"):
            profile_model(model, PROMPTS, store)
        assert partial.exists() == stays, names
    (partial / "mine.txt").unlink()
    with held(partial):
        clear_after(store)
        assert partial.exists()
    clear_after(store)
    assert not partial.exists()


def test_a_shared_lock_hides_no_error_of_the_work_that_is_done_under_it(tmp_path):
    for error in (FileNotFoundError("gone"), PermissionError("not yours")):
        with pytest.raises(type(error)), claim_shared(tmp_path / ".s.partial", tmp_path / "s"):
            raise error


def test_saved_sums_go_only_beside_the_moments_that_they_were_of(tmp_path, model):
    out, partial = tmp_path / "m", tmp_path / ".m.moments-partial"
    profile_moments(model, PROMPTS, out)
    key = json.loads((out / "moments.json").read_text())["key"]
    parts = f"parts/{key[:16]}"
    for names, now, stays in ((["lock"], None, False), (["lock", "after-3"], key, False), (["after-3"], "other", True),
                              (["mine.txt"], key, True), (["after-3"], None, False), (["lock", parts], None, False),
                              (["lock", parts, "parts/other"], None, True), ([parts], "other", True),
                              (["parts/other"], key, True)):  # fmt: skip
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name in names:
            (partial / name).mkdir(parents=True) if "/" in name else (partial / name).touch()
        if now is not None:
            (partial / "now.json").write_text(json.dumps({"key": now}))
        with pytest.raises(UserError, match="exists already"):
            profile_moments(model, PROMPTS, out)
        assert partial.exists() == stays, names
    (out / "fold-0.safetensors").write_bytes(b"damaged")
    for now in ("[", json.dumps({"key": key})):
        (partial / "now.json").write_text(now)
        clear_after(out)
        assert partial.exists()


def test_the_only_copy_of_a_store_is_no_leftover(store):
    partial = rename_as_interrupted(store, new=False)
    (found,) = find_leftovers(store.parent, temporary=False)
    assert "holds the only copy of s: run `workbench stores repair" in found.kept
    assert remove_leftovers([found]) == [found]
    assert partial.exists()
    repair_store(store)
    shutil.copytree(store, partial / "store")
    store.rename(partial.parent / "aside")
    assert "complete but for its name" in find_leftovers(store.parent, temporary=False)[0].kept


def test_nothing_is_listed_that_only_looks_like_ours(tmp_path):
    for name in (".a.partial", ".b.partial", ".c.partial-abcdefgh", "d.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / ".a.partial" / "thesis.doc").write_text("x")
    (tmp_path / ".b.partial" / "lock").touch()
    (tmp_path / ".b.partial" / "thesis.doc").write_text("x")
    (tmp_path / ".l.partial").symlink_to(unfinished(tmp_path / "deep" / "s"))
    assert [one.path.name for one in find_leftovers(tmp_path, temporary=False)] == [".s.partial"]


def test_what_killed_runs_of_every_kind_leave_is_found(tmp_path):
    made = {".m.moments-partial": ["lock", "now.json", "after-3/fold-0.safetensors"], ".s.repair-abcdefgh": ["lock", "shard"],
            ".x.partial.removed-abcdefgh": ["store/shards/00001.safetensors"], ".e.partial-abcdefgh": ["export.json"],
            ".e.old-abcdefgh": ["was/data.npy"], ".f.old-abcdefgh": ["was/data.npy"], "f": ["data.npy"],
            ".t.old-abcdefgh": ["thesis.tex"], ".u.partial.removed-abcdefgh": ["thesis.tex"],
            ".v.repair-abcdefgh": ["lock", "thesis.tex"], ".w.partial": ["lock", "now.json", "thesis.tex"]}  # fmt: skip
    for folder, files in made.items():
        for name in files:
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).write_text("x")
    with held(tmp_path / ".m.moments-partial"):
        assert {one.path.name: one.kept for one in find_leftovers(tmp_path, temporary=False)}[".m.moments-partial"]
    (tmp_path / ".m.moments-partial" / "lock").touch()
    done = {one.path.name: (one.kind, one.kept) for one in remove_leftovers(find_leftovers(tmp_path, temporary=False))}
    kept = {".e.old-abcdefgh", ".e.partial-abcdefgh"}
    assert {name for name, (_, why) in done.items() if why} == kept
    assert "holds the only copy of e: rename" in done[".e.old-abcdefgh"][1]
    gone = {".m.moments-partial", ".s.repair-abcdefgh", ".x.partial.removed-abcdefgh", ".f.old-abcdefgh"}
    assert done.keys() == kept | gone
    assert {p.name for p in tmp_path.iterdir()} == made.keys() - gone


def test_temporary_stores_go_once_no_process_uses_them(tmp_path, model, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "workbench-whatever").mkdir()
    with profile_model(model, PROMPTS[:2]) as used:
        (found,) = find_leftovers(tmp_path / "t")
        assert (found.path, found.kept) == (used.path.parent, "a process is using it")
        assert remove_leftovers([found]) == [found]
        shutil.copytree(found.path, tmp_path / "t" / "workbench-deadbeef")
    (found,) = find_leftovers(tmp_path / "t")
    assert (found.path.name, found.kept) == ("workbench-deadbeef", "")
    (found.path / "lock").unlink()
    assert find_leftovers(tmp_path / "t")[0].kept == "no lock says whether it is used"
    shutil.rmtree(found.path)
    assert find_leftovers(tmp_path / "t") == []
    dead = tmp_path / "t" / "workbench-abcdefgh"
    unfinished(dead / "profile")
    (found,) = find_leftovers(tmp_path / "t")
    assert (found.path, found.kind, found.kept) == (dead, "temporary store", "")
    remove_leftovers([found])
    assert not dead.exists()


def test_looking_for_a_lock_leaves_the_folder_as_it_is(tmp_path):
    assert not is_held(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with held(tmp_path):
        assert is_held(tmp_path)
        with pytest.raises(UserError, match="is being written by another run"), held(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []
    handle = os.open(tmp_path / "lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_SH)
    assert not is_held(tmp_path)  # another reader that looks at the same moment
    os.close(handle)


# -- merge ------------------------------------------------------------------------------------------------------------


def test_merged_by_rows_is_one_profile_of_the_joint_prompts(home, tmp_path):
    made = merge_stores([home / "a", home / "b", Store.open(home / "c")], tmp_path / "m")
    whole = Store.open(home / "whole")
    assert not find_damage(made.path)
    assert (made.prompt_hash, made.rendered_hash) == (whole.prompt_hash, whole.rendered_hash)
    assert made.rows().equals(whole.rows())
    assert made.prompts().equals(whole.prompts())
    assert [(p.content, p.id, p.label) for p in made.prompt_set()] == [(p.content, p.id, p.label) for p in PROMPTS]
    for site in whole.sites:
        torch.testing.assert_close(made.read(site), whole.read(site), atol=1e-4, rtol=1e-4)
        parts = [Store.open(home / name).read(site) for name in "abc"]
        assert torch.equal(made.read(site), torch.cat(parts))
    assert made.rows_of(6) == whole.rows_of(6)
    assert [origin["name"] for origin in made.manifest["source"]["stores"]] == ["a", "b", "c"]


def test_merged_by_sites_has_the_sites_of_both(home, tmp_path):
    low, high = Store.open(home / "low"), Store.open(home / "high")
    made = merge_stores([high, low], tmp_path / "m")
    assert not find_damage(made.path)
    assert made.sites == [Site(0), Site(1), Site(2)]
    assert made.rows().equals(low.rows())
    for site in made.sites:
        assert torch.equal(made.read(site), (low if site == Site(0) else high).read(site))
    cuts = {end for s in (low, high) for end in accumulate(x["rows"] for x in s.shards)}
    assert {end for end in accumulate(x["rows"] for x in made.shards)} == cuts


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations("abc"))
def test_the_order_of_the_rows_is_that_of_the_stores(home, tmp_path, order):
    stores = [Store.open(home / name) for name in order]
    made = merge_stores(stores, tmp_path / "m", overwrite=True)
    assert made.prompt_hash == PromptSet(tuple(p for s in stores for p in s.prompt_set())).hash
    assert torch.equal(made.read(1), torch.cat([s.read(1) for s in stores]))
    starts = [0, *accumulate(len(s.prompt_set()) for s in stores)]
    for (start, stop), one in zip(pairwise(starts), stores, strict=True):
        for i in range(start, stop):
            assert torch.equal(made.read(2, made.rows_of(i)), one.read(2, one.rows_of(i - start)))


@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        (["a"], {}, "takes two stores or more"),
        (["a", "b"], {"by": "columns"}, "cannot merge by 'columns'; allowed: auto, rows, sites"),
        (["a", "a"], {}, "both have prompt 'p0'; leave one of them out"),
        (["whole", "b"], {}, "both have prompt 'p5'"),
        (["a", "half"], {}, r"differ in dtype \(float32 and float16\)"),
        (["a", "last"], {}, r"differ in tokens \(first:2 and last\); options: tokens \(first:2 and last\)$"),
        (["a", "low"], {}, "neither the same sites .* nor the same prompts"),
        (["a", "b"], {"by": "sites"}, r"cannot be merged by sites: they differ in prompts .*; rows \(10 and 2\)"),
        (["low", "high"], {"by": "rows"}, r"cannot be merged by rows: they differ in sites"),
        (["whole", "low"], {"by": "sites"}, r"both have resid_post\.0"),
    ],
)
def test_what_cannot_be_merged_is_refused(home, tmp_path, names, options, said):
    with pytest.raises(UserError, match=said):
        merge_stores([home / name for name in names], tmp_path / "m", **options)
    assert list(tmp_path.iterdir()) == []


def test_stores_of_another_model_do_not_merge(home, tmp_path):
    profile_model(make_model("llama", seed=1), PROMPTS[:2], tmp_path / "other", tokens="first:2", batch_tokens=64)
    with pytest.raises(UserError, match="differ in fingerprint"):
        merge_stores([home / "b", tmp_path / "other"], tmp_path / "m")


def test_duplicates_are_merged_when_allowed_and_ids_that_a_source_gave_are_names(home, tmp_path, model):
    made = merge_stores([home / "a", home / "a"], tmp_path / "m", allow_duplicates=True)
    assert made.n_rows == 2 * Store.open(home / "a").n_rows
    options = {"tokens": "first:2", "batch_tokens": 64}
    numbers = [profile_model(model, [f"w{i}"], tmp_path / f"n{i}", **options) for i in range(2)]
    assert merge_stores(numbers, tmp_path / "k").n_rows == 2 * numbers[0].n_rows  # both have the id 0, their place
    named = profile_model(model, [{"id": "p1", "prompt": "w9 w8"}], tmp_path / "n", **options)
    with pytest.raises(UserError, match="both have the id 'p1'"):
        merge_stores([home / "a", named], tmp_path / "j")


def full_after(monkeypatch, n: int) -> None:
    """Every sync to the disk but the first n fails, as it does when the disk is full."""
    calls, sync = [0], os.fsync

    def fsync(handle: int) -> None:
        calls[0] += 1
        if calls[0] > n:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("after", range(12))
def test_a_full_disk_leaves_nothing_of_a_merge(home, tmp_path, after):
    with pytest.MonkeyPatch.context() as patch:
        full_after(patch, after)
        with pytest.raises(UserError, match="No space left on device; nothing of it was kept: make room"):
            merge_stores([home / "a", home / "b"], tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
    shutil.copytree(home / "half", tmp_path / "m")
    before = tree(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        full_after(patch, after)
        with pytest.raises(UserError, match="No space left"):
            merge_stores([home / "a", home / "b"], tmp_path / "m", overwrite=True)
    assert tree(tmp_path) == before
    with pytest.raises(UserError, match="exists already"):
        merge_stores([home / "a", home / "b"], tmp_path / "m")


def test_a_merge_that_was_killed_goes_on_where_it_was(home, tmp_path, monkeypatch):
    merge_stores([home / "a", home / "b"], tmp_path / "whole")
    written = []
    write = StoreWriter.write

    def killed(self, *args):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(1)
        write(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            merge_stores([home / "a", home / "b"], tmp_path / "m")
    assert (tmp_path / ".m.partial").exists()
    merge_stores([home / "a", home / "b"], tmp_path / "m")
    assert tree(tmp_path / "m") == tree(tmp_path / "whole")
