"""What is written appears whole or not at all, and overwrites nothing but its own kind."""

import os
import signal
from pathlib import Path

import pytest

from workbench.atomic import clear_abandoned, staged_folder, write_text
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


def killed_while_writing(path: Path, kind: str) -> None:
    """What a process leaves that is killed in the midst of writing `path`."""
    pid = os.fork()
    if pid == 0:
        if kind == "file":
            os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
            write_text(path, "half")
        with staged_folder(path, marker="mark.json", overwrite=True) as folder:
            (folder / "mark.json").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_writer_left_goes_when_the_next_one_writes(tmp_path, kind):
    for _ in range(2):
        killed_while_writing(tmp_path / "a", kind)
        assert [p.name.startswith(".a.partial-") for p in tmp_path.iterdir()] == [True]
    (tmp_path / ".a.partial-notes").write_text("somebody's own")
    (tmp_path / ".ab.partial-abcdefgh").write_text("of another name")
    write_text(tmp_path / "a", "new") if kind == "file" else fill(tmp_path / "a")
    assert {p.name for p in tmp_path.iterdir()} == {"a", ".a.partial-notes", ".ab.partial-abcdefgh"}


def test_what_another_writer_is_busy_with_stays(tmp_path):
    with staged_folder(tmp_path / "a", marker="mark.json") as first:
        (first / "mark.json").write_text("first")
        fill(tmp_path / "a", "second")
        assert first.exists()
        (tmp_path / "a" / "mark.json").unlink()
        (tmp_path / "a").rmdir()
    assert (tmp_path / "a" / "mark.json").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_was_being_replaced_when_its_writer_was_killed_is_put_back(tmp_path):
    fill(tmp_path / "a", "old")
    aside = tmp_path / ".a.old-abcdefgh"
    aside.mkdir()
    (tmp_path / "a").rename(aside / "was")  # where the system cannot exchange two names
    clear_abandoned(tmp_path / "a")
    assert (tmp_path / "a" / "mark.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_ctrl_c_leaves_no_file_behind(tmp_path, monkeypatch):
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "a", "new")
    assert list(tmp_path.iterdir()) == []
