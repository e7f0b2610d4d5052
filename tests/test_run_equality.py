"""Two runs compared: planted differences are found and named, and nothing else is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from workbench.errors import UserError
from workbench.run_equality import equality_of
from workbench.timings import is_timing

from .metrics_example import metrics
from .test_cli import told, workbench


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs that are equal but for what is set apart."""
    for i, name in enumerate("ab"):
        run = tmp_path / name / "demo"
        found = metrics() | {"seconds": 12.5 + i, "environment": {"date": f"2026-01-0{i + 1}", "threads": 1 + i}}
        write(run / "metrics.json", found)
        write(run / "environment.json", found["environment"])
        paste = {"fit": 0.1 + i, "fold": 0.2 + i, "flops": 100.0}
        write(run / "steps" / "paste-x.json",
              {"key": "k", "seconds": float(i), "result": paste, "files": {}, "sha256": f"{i}"})  # fmt: skip
        (run / "job.toml").write_text(f'name = "demo"\nout = "{run.parent}"\nseed = 0\n')
        for text in ("log.txt", "report.html"):
            (run / text).write_text(f"run {i}")
        save_file({"w": torch.arange(6.0)}, run / "w.safetensors")
    return tmp_path / "a" / "demo", tmp_path / "b" / "demo"


def test_runs_that_differ_in_timings_and_places_alone_are_equal(runs):
    found = equality_of(*runs)
    assert found.equal
    assert found.frame().empty
    assert {"seconds", "fit", "fold"} <= set(found.timing_names)
    assert {(c.file, c.name) for c in found.circumstances} == {
        ("metrics.json", "environment.date"), ("metrics.json", "environment.threads"), ("environment.json", "date"),
        ("environment.json", "threads"), ("job.toml", "out"),
    }  # fmt: skip
    assert "0 differ" in found._repr_html_()


def test_a_run_is_equal_to_its_copy_and_comparing_is_symmetric(runs, tmp_path):
    copy = shutil.copytree(runs[0], tmp_path / "copy")
    assert equality_of(runs[0], copy).equal
    (copy / "w.safetensors").write_bytes(b"")
    there, back = equality_of(runs[0], copy), equality_of(copy, runs[0])
    assert [(d.file, d.a, d.b) for d in there.differences] == [(d.file, d.b, d.a) for d in back.differences]
    assert there.figures == back.figures


def change(file: Path, *keys: Any, to: Any) -> None:
    tree = top = json.loads(file.read_text())
    for key in keys[:-1]:
        tree = tree[key]
    if to is None:
        del tree[keys[-1]]
    else:
        tree[keys[-1]] = to
    file.write_text(json.dumps(top))


def test_every_planted_difference_is_found_and_no_other(runs):
    b = runs[1]
    name = next(iter(json.loads((b / "metrics.json").read_text())["behaviours"]))
    change(b / "metrics.json", "behaviours", name, "n", to=301)
    change(b / "metrics.json", "warnings", to=["new"])
    change(b / "steps" / "paste-x.json", "result", "flops", to=100.0000001)
    change(b / "steps" / "paste-x.json", "key", to="other")
    (b / "job.toml").write_text((b / "job.toml").read_text().replace("seed = 0", "seed = 1"))
    save_file({"w": torch.arange(6.0) * 1.5}, b / "w.safetensors")
    (b / ".left.partial-abcdefgh").write_text("")
    (runs[0] / "answers.jsonl").write_text("{}\n")
    found = equality_of(*runs)
    assert not found.equal
    named = {(d.file, d.name) for d in found.differences}
    assert {n for n in named if not n[1].startswith("warnings")} == {
        ("metrics.json", f"behaviours.{name}.n"), ("steps/paste-x.json", "result.flops"), ("steps/paste-x.json", "key"),
        ("job.toml", "seed"), ("w.safetensors", ""), (".left.partial-abcdefgh", ""), ("answers.jsonl", ""),
    }  # fmt: skip
    assert any(n[1].startswith("warnings") for n in named)
    by_name = {(d.file, d.name): d for d in found.differences}
    assert by_name["w.safetensors", ""].relative == pytest.approx(0.5)
    assert by_name["steps/paste-x.json", "result.flops"].relative == pytest.approx(1e-9)
    assert (by_name["answers.jsonl", ""].a, by_name["answers.jsonl", ""].b) == ("there", "–")
    assert len(found.frame()) == len(found.differences)


def test_an_integer_a_number_and_a_truth_are_three_things(runs):
    for to in (300.0, True, "300"):
        name = next(iter(json.loads((runs[1] / "metrics.json").read_text())["behaviours"]))
        change(runs[1] / "metrics.json", "behaviours", name, "n", to=to)
        assert [d.name for d in equality_of(*runs).differences] == [f"behaviours.{name}.n"]


@pytest.mark.parametrize("key", ["n", "arms", "forecast"])
def test_a_figure_that_is_missing_is_a_difference_on_either_side(runs, key):
    name = next(iter(json.loads((runs[1] / "metrics.json").read_text())["behaviours"]))
    change(runs[1] / "metrics.json", "behaviours", name, key, to=None)
    for pair in (runs, runs[::-1]):
        found = equality_of(*pair).differences
        assert found
        assert all(d.name.startswith(f"behaviours.{name}.{key}") for d in found)


def test_a_link_is_compared_as_a_link_and_never_followed(runs, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "x").write_text("1")
    for run in runs:
        (run / "link").symlink_to(tmp_path / "secret")
    found = equality_of(*runs)
    assert found.equal
    (runs[1] / "link").unlink()
    (runs[1] / "link").symlink_to(tmp_path)
    assert [d.file for d in equality_of(*runs).differences] == ["link"]


def test_a_damaged_file_of_figures_is_a_difference(runs):
    (runs[1] / "metrics.json").write_text('{"seconds": ')
    assert [d.file for d in equality_of(*runs).differences] == ["metrics.json"]


def test_what_is_no_folder_and_what_is_empty_are_refused(runs, tmp_path):
    with pytest.raises(UserError, match="gone: no such folder; give two run folders"):
        equality_of(runs[0], tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds nothing"):
        equality_of(tmp_path / "empty", runs[0])


@pytest.mark.parametrize(
    ("path", "is_one"),
    [
        (["seconds"], True), (["profiles", "donor", "seconds"], True), (["cost", "ratio_seconds_with_forecast"], True),
        (["cost", "paste_parts", "gradients"], True), (["result", "fold"], True), (["fold"], False), (["gradients"], False),
        (["seconds", "n"], False), (["steps"], False), ([], False),
    ],
)  # fmt: skip
def test_timings_are_told_by_their_names(path, is_one):
    assert is_timing(path) == is_one


def test_the_verb_prints_a_table_and_its_exit_code_says_whether_they_are_equal(runs):
    same = workbench("compare", *runs)
    assert same.exit_code == 0
    assert "0 differ" in same.stdout
    assert "apart: environment.threads: 1 and 2" in same.stdout
    change(runs[1] / "steps" / "paste-x.json", "result", "flops", to="\x1b[31mred")
    other = workbench("compare", *runs, "--timings")
    assert other.exit_code == 1
    assert "result.flops" in other.stdout
    assert "\x1b" not in other.stdout
    assert "steps/paste-x.json" in other.stdout
    cut = workbench("compare", *runs, "--rows", 0)
    assert "and 1 more: --rows 1 shows all" in cut.stdout
    said = json.loads(workbench("compare", *runs, "--json").stdout)
    assert (said["equal"], len(said["differences"])) == (False, 1)
    told(workbench("compare", runs[0], runs[0] / "gone"), "no such folder")
