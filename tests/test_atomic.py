"""What is written appears whole or not at all, and overwrites nothing but its own kind."""

import os

import pytest

from workbench.atomic import staged_folder, write_text
from workbench.errors import UserError


def fill(path, text="new", **options):
    with staged_folder(path, marker="mark.json", **options) as folder:
        (folder / "mark.json").write_text(text)


def test_a_folder_appears_at_the_end_and_not_after_an_exception(tmp_path):
    def stop_halfway():
        with staged_folder(tmp_path / "a", marker="m") as folder:
            (folder / "m").write_text("half")
            assert not (tmp_path / "a").exists()
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        stop_halfway()
    assert list(tmp_path.iterdir()) == []
    fill(tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_only_its_own_kind_is_overwritten(tmp_path):
    fill(tmp_path / "a", "old")
    with pytest.raises(UserError, match="exists already"):
        fill(tmp_path / "a")
    fill(tmp_path / "a", overwrite=True)
    assert (tmp_path / "a" / "mark.json").read_text() == "new"
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds no mark.json"):
        fill(tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


def test_a_failed_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    fill(tmp_path / "a", "old")
    rename = os.rename

    def fail(source, target):
        if ".partial-" in str(source):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    monkeypatch.setattr("workbench.atomic.exchange", lambda *_: False)  # as where the system cannot
    with pytest.raises(UserError, match="No space left"):
        fill(tmp_path / "a", overwrite=True)
    assert (tmp_path / "a" / "mark.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_path_below_a_file_is_named(tmp_path):
    write_text(tmp_path / "file", "x")
    with pytest.raises(UserError, match="cannot write to"):
        write_text(tmp_path / "file" / "below", "y")
    assert (tmp_path / "file").read_text() == "x"


def test_a_folder_is_replaced_where_a_link_leads_and_leaves_nothing_beside(tmp_path):
    fill(tmp_path / "disk" / "a", "old")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "a")
    fill(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "a" / "mark.json").read_text() == "new"
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["a"]
