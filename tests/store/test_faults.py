"""A store survives SIGKILL at any moment, a full disk, and being replaced while it is read."""

from __future__ import annotations

import errno
import os
import subprocess

import pytest
import torch

from workbench.errors import UserError
from workbench.profile import plan as profile_plan
from workbench.profile import profile_model
from workbench.prompts import PromptSet
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
        "workbench.profile.profile._check_room", lambda *_: None
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
