"""A store survives SIGKILL at any moment, a full disk, and being replaced while it is read."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import threading

import pytest
import torch

from workbench.errors import UserError
from workbench.profile import plan as profile_plan
from workbench.profile import profile_model
from workbench.prompts import PromptSet
from workbench.sites import Site
from workbench.store import Store
from workbench.store.writer import StoreWriter

from ..benchmarks.store_faults import contents, kills, races
from ..conftest import make_model

PROMPTS = PromptSet.load([" ".join(f"w{(7 * i + 3 * j) % 150}" for j in range(20)) for i in range(60)])


@pytest.mark.parametrize("n", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_gone_on_with_it_ends_with_the_same_bytes(tmp_path, n):
    seen = kills(tmp_path, n)
    assert (seen["equal"], seen["torn"]) == (n, 0)
    if n > 3:
        assert seen["killed"] > n // 2
        assert seen["blocks"] > 0  # some were killed in the middle


def test_two_readers_and_a_writer_at_once(tmp_path):
    seen = races(tmp_path, 1.5)
    assert seen["ended"] == [0, 0, 0]  # no bus error, no other error
    assert seen["wrong"] == 0
    assert seen["right"] > 0


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 512 KiB, and how to make it larger; skips where it may not be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    yield place, lambda: subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_disk_that_is_really_full_stops_with_a_line_and_is_gone_on_from(small_disk, tmp_path, monkeypatch):
    place, enlarge = small_disk
    monkeypatch.setattr(profile_plan, "BLOCK_ROWS", 100)
    monkeypatch.setattr(
        "workbench.profile.profile.check_room", lambda *_: None
    )  # the disk fills up once the profile runs
    model = make_model("llama")
    profile_model(model, PROMPTS, tmp_path / "whole", tokens="all")
    for _ in range(2):  # the second time nothing has changed
        with pytest.raises(UserError, match=r"No space left on device; \d+ blocks are kept in \.s\.partial: make room"):
            profile_model(model, PROMPTS, place / "s", tokens="all")
        assert not (place / "s").exists()
    assert list((place / ".s.partial" / "store" / "shards").iterdir())
    enlarge()
    profile_model(model, PROMPTS, place / "s", tokens="all").verify()
    assert contents(place / "s") == contents(tmp_path / "whole")
    assert [p.name for p in place.iterdir()] == ["s"]


def test_two_writers_at_one_place(tmp_path):
    with StoreWriter(tmp_path / "s", "plan"):
        with pytest.raises(UserError, match="is being written by another run"):
            StoreWriter(tmp_path / "s", "plan")
    model = make_model("llama")
    profile_model(model, PROMPTS[:2], tmp_path / "s")
    with pytest.raises(UserError, match="exists already"):
        StoreWriter(tmp_path / "s", "plan")


def test_a_writer_that_cannot_begin_leaves_the_place_free(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device") as kept:
            StoreWriter(tmp_path / "s", "plan")
    with StoreWriter(tmp_path / "s", "plan") as writer:
        assert writer.blocks == []
    assert kept.value


def test_a_run_killed_just_after_the_stores_changed_places_does_not_take_the_old_rows_for_new(tmp_path, monkeypatch):
    """The old store then lies where the new one was written, under a journal that knows its names and sizes."""
    monkeypatch.setattr(profile_plan, "BLOCK_ROWS", 10)
    old, new = make_model("llama", seed=1), make_model("llama")
    profile_model(old, PROMPTS[:20], tmp_path / "s")
    profile_model(new, PROMPTS[:20], tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("workbench.store.writer.shutil.rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            profile_model(new, PROMPTS[:20], tmp_path / "s", overwrite=True)
    assert (tmp_path / ".s.partial" / "journal.jsonl").exists()
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")
    profile_model(new, PROMPTS[:20], tmp_path / "s", overwrite=True)
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")
    assert torch.equal(Store.open(tmp_path / "s").read(0), Store.open(tmp_path / "whole").read(0))


@pytest.mark.parametrize("where", ["", "store", "store/shards"])
def test_a_link_in_the_unfinished_folder_is_refused_and_what_it_leads_to_is_left(tmp_path, where):
    (tmp_path / "mine" / "sub").mkdir(parents=True)
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    link = tmp_path / ".s.partial" / where
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="is a link, and unfinished work lies in folders of its own; remove the link"):
        StoreWriter(tmp_path / "s", "plan")
    assert {p.name for p in (tmp_path / "mine").iterdir()} == {"sub", "thesis.tex"}


def test_a_lock_that_is_a_link_is_not_opened(tmp_path):
    (tmp_path / ".s.partial").mkdir()
    (tmp_path / ".s.partial" / "lock").symlink_to(tmp_path / "made")
    with pytest.raises(UserError, match="cannot write to"):
        StoreWriter(tmp_path / "s", "plan")
    assert not (tmp_path / "made").exists()


def test_a_store_is_replaced_where_a_link_leads(tmp_path):
    model = make_model("llama")
    (tmp_path / "disk").mkdir()
    profile_model(model, PROMPTS[:2], tmp_path / "disk" / "s")
    (tmp_path / "s").symlink_to(tmp_path / "disk" / "s")
    assert profile_model(model, PROMPTS[:3], tmp_path / "s", overwrite=True).n_rows == 3
    assert (tmp_path / "s").is_symlink()
    assert Store.open(tmp_path / "disk" / "s").n_rows == 3
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["s"]


def test_finished_blocks_of_another_plan_are_not_discarded_without_a_word(tmp_path):
    with StoreWriter(tmp_path / "s", "plan") as writer:
        for _ in range(2):
            writer.write({Site(0): torch.zeros(2, 3)}, {Site(0): 0})
        writer._settle()
        size = writer.n_bytes
    with pytest.raises(
        UserError, match=rf"holds 2 finished blocks \({size} bytes\) of a run with other arguments: the same"
    ):
        StoreWriter(tmp_path / "s", "other")
    with StoreWriter(tmp_path / "s", "plan") as writer:
        assert len(writer.blocks) == 2
    with StoreWriter(tmp_path / "s", "other", overwrite=True) as writer:
        assert writer.blocks == []
    with StoreWriter(tmp_path / "s", "third") as writer:  # nothing was finished
        assert writer.blocks == []


def test_a_writer_outlasts_whoever_only_looks_at_its_lock(tmp_path):
    with StoreWriter(tmp_path / "s", "plan") as writer:
        folder = writer.partial
    handle = os.open(folder / "lock", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)
    timer = threading.Timer(0.1, os.close, [handle])
    timer.start()
    with StoreWriter(tmp_path / "s", "plan"):
        timer.join()
