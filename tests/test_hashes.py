"""Hashes of weights that are large: read once while the file stays as it is, and again whenever it may have changed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from workbench import hashes
from workbench.hashes import weights_hash


@pytest.fixture
def read(tmp_path: Path, monkeypatch) -> list[Path]:
    """The files that are read, with a cache of their own and every file large."""
    seen: list[Path] = []
    plain = hashes.file_hash
    monkeypatch.setattr(hashes, "LARGE", 0)
    monkeypatch.setattr(hashes, "SETTLED", 0.0)
    monkeypatch.setattr(hashes, "file_hash", lambda path: seen.append(path) or plain(path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return seen


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_file_is_read_once_until_it_changes(tmp_path, read):
    file = tmp_path / "w.safetensors"
    file.write_text("one")
    assert weights_hash(file) == weights_hash(file) == sha("one")
    assert len(read) == 1
    times = file.stat().st_mtime_ns
    file.write_text("two")
    os.utime(file, ns=(times, times))  # a clock set back, a copy that keeps times
    assert weights_hash(file) == sha("two")
    other = tmp_path / "x.safetensors"
    other.write_text("six")
    os.replace(other, file)
    assert weights_hash(file) == sha("six")
    assert len(read) == 3


def test_a_file_that_was_only_just_written_is_read_again(tmp_path, read, monkeypatch):
    monkeypatch.setattr(hashes, "SETTLED", 60.0)
    file = tmp_path / "w.safetensors"
    file.write_text("one")
    assert weights_hash(file) == weights_hash(file) == sha("one")
    assert len(read) == 2


@pytest.mark.parametrize("kept", ["", "[1]", "not json", json.dumps({"x": 1})])
def test_a_cache_that_is_damaged_is_as_none(tmp_path, read, kept):
    file = tmp_path / "w.safetensors"
    file.write_text("one")
    (tmp_path / "cache" / "workbench").mkdir(parents=True)
    (tmp_path / "cache" / "workbench" / "hashes.json").write_text(kept)
    assert weights_hash(file) == weights_hash(file) == sha("one")
    assert len(read) == 1


def test_small_files_and_a_home_that_cannot_be_written(tmp_path, read, monkeypatch):
    file = tmp_path / "w.safetensors"
    file.write_text("one")
    (tmp_path / "plain").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "plain"))
    assert weights_hash(file) == weights_hash(file) == sha("one")
    monkeypatch.setattr(hashes, "LARGE", 10)
    assert weights_hash(file) == sha("one")
    assert len(read) == 3
