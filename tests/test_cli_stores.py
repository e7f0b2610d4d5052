"""`workbench stores`: what each verb prints and makes, its exit codes, and how bad input is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from workbench.sites import Site
from workbench.store import Store
from workbench.store.writer import StoreWriter

from .store.test_exports import make
from .test_cli import good, told, workbench


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A folder with a store `s`; temporary files lie elsewhere."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    make(tmp_path / "home" / "s")
    return tmp_path / "home"


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def test_ls(home):
    result = good("stores", "ls", home)
    for word in ("s", "m", "18", "mlp_act.1", "float32"):
        assert word in result.stdout
    (one,) = json.loads(good("stores", "ls", home, "--json").stdout)
    assert (one["path"], one["state"], one["rows"]) == (str(home / "s"), "whole", 18)
    assert one["sites"] == ["mlp_act.1", "resid_post.0", "resid_post.2"]
    (home / "s" / "rows.parquet").unlink()
    assert f"damaged: {home / 's'}: rows.parquet is missing" in good("stores", "ls", home).stdout
    (home / "none").mkdir()
    assert "no stores; make one with `workbench profile`" in good("stores", "ls", home / "none").stdout
    told(workbench("stores", "ls", home / "gone"), "no such folder")


def test_ls_looks_in_the_working_folder_and_takes_no_name_for_markup(home, monkeypatch):
    shutil.copytree(home / "s", home / "[red]x[/red]")
    monkeypatch.chdir(home)
    assert "[red]x[/red]" in good("stores", "ls").stdout


def test_a_table_in_a_pipe_has_no_padding(home):
    lines = good("stores", "ls", home).stdout.splitlines()
    assert all(line == line.rstrip() for line in lines)
    assert max(map(len, lines)) < 200


def test_moments_are_told_from_stores(home):
    about = {"format": "workbench.profile_moments", "model": {"name": "mine"}, "prompts": {"name": "p"}, "n_rows": 77,
             "sites": {"resid_post.1": {"width": 3}}, "tokens": "last"}  # fmt: skip
    (home / "m").mkdir()
    (home / "m" / "moments.json").write_text(json.dumps(about))
    (one,) = (one for one in json.loads(good("stores", "ls", home, "--json").stdout) if one["state"] == "moments")
    assert (one["rows"], one["sites"], one["model"]) == (77, ["resid_post.1"], "mine")
    assert f"moments: {home / 'm'}: open it with workbench.load_moments" in good("stores", "ls", home).stdout
    told(workbench("stores", "show", home / "m"), "holds moments (moments.json)", "workbench.load_moments")
    assert "workbench.load_moments" in workbench("stores", "verify", home / "m").stdout
    (home / "m" / "moments.json").write_text("{}")
    assert "moments" not in good("stores", "ls", home).stdout


def test_show(home):
    shown = good("stores", "show", home / "s").stdout
    for word in ("m (f, 3 layers), basis raw", "tokenizer: t", "p: 6", "18, tokens all", "mlp_act.1, resid_post.0,2",
                 "width 5, 8", "not finite none", "'t4'"):  # fmt: skip
        assert word in shown
    one = good("stores", "show", home / "s", "--prompt", 2, "--rows", 2).stdout
    assert "'w2'" in one
    assert "'t6'" in one
    assert "'t8'" not in one
    assert json.loads(good("stores", "show", home / "s", "--json").stdout)["manifest"]["n_rows"] == 18
    told(workbench("stores", "show", home / "s", "--prompt", 6), "prompts 0 to 5; got 6")
    told(workbench("stores", "show", home / "gone"), "no such folder")


def test_verify_tells_of_each_store_and_exits_with_1(home):
    shutil.copytree(home / "s", home / "t")
    assert good("stores", "verify", home / "s", home / "t").stdout.count(": whole\n") == 2
    flip(home / "t" / "shards" / "00001.safetensors")
    result = workbench("stores", "verify", home / "s", home / "t", home / "gone")
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[0] == f"{home / 's'}: whole"
    assert lines[1] == f"store {home / 't'}: damaged shards/00001.safetensors"
    assert "no such folder" in lines[2]
    found = workbench("stores", "verify", home / "s", home / "t", "--json")
    assert found.exit_code == 1
    assert [one["whole"] for one in json.loads(found.stdout)] == [True, False]


def test_repair_says_what_is_left_and_what_to_give(home):
    assert good("stores", "repair", home / "s").stdout == f"{home / 's'}: whole\n"
    (home / "s" / "stray").touch()
    result = workbench("stores", "repair", home / "s")
    assert result.exit_code == 1
    assert "foreign stray" in result.stdout
    assert "--yes" in result.stderr
    assert "removed stray" in good("stores", "repair", home / "s", "--yes").stdout
    flip(home / "s" / "shards" / "00000.safetensors")
    result = workbench("stores", "repair", home / "s")
    assert result.exit_code == 1
    assert "--model MODEL" in result.stderr
    assert json.loads(workbench("stores", "repair", home / "s", "--json").stdout)["damaged"] == [
        "shards/00000.safetensors"
    ]
    told(workbench("stores", "repair", home / "s", "--model", "bundled:donor"), "not by one profile")
    told(workbench("stores", "repair", home / "gone"), "no such folder")


def test_gc_removes_only_when_told(home):
    with StoreWriter(home / "t", "plan") as writer:
        writer.write({Site(0): torch.zeros(2, 3)}, {Site(0): 0})
    result = good("stores", "gc", home)
    assert "unfinished store" in result.stdout
    assert "1 can go" in result.stdout
    assert (home / ".t.partial").exists()
    (one,) = json.loads(good("stores", "gc", home, "--json").stdout)
    assert (one["removed"], one["kept"]) == (False, "")
    assert "1 removed" in good("stores", "gc", home, "--yes").stdout
    assert {f.name for f in home.iterdir()} == {"s"}
    assert good("stores", "gc", home).stdout == "0 can go, 0 B\n"
    told(workbench("stores", "gc", home / "gone"), "no such folder")


def test_merge(home):
    line = ("stores", "merge", home / "s", home / "s", "--out", home / "m")
    told(workbench(*line), "both have prompt '0'", "--allow-duplicates")
    assert "36 rows at mlp_act.1, resid_post.0,2" in good(*line, "--allow-duplicates").stdout
    told(workbench(*line, "--allow-duplicates"), "exists already")
    assert json.loads(good(*line, "--allow-duplicates", "--overwrite", "--json").stdout)["rows"] == 36
    Store.open(home / "m").verify()
    flip(home / "m" / "shards" / "00000.safetensors")
    told(
        workbench("stores", "merge", home / "s", home / "m", "--out", home / "n"),
        "damaged shards/00000",
        "stores repair",
    )


def test_export(home):
    good("stores", "export", home / "s", "--to", "numpy", "--out", home / "e", "--sites", "resid_post.0, mlp_act.1")
    assert {f.suffix for f in (home / "e").iterdir()} == {".npy", ".parquet", ".json", ".md"}
    told(
        workbench("stores", "export", home / "s", "--to", "csv", "--out", home / "f"),
        "'csv'",
        "dataset, numpy, parquet",
    )
    told(workbench("stores", "export", home / "s", "--to", "numpy", "--out", home / "f", "--sites", "9"), "layer 9")
    flip(home / "s" / "rows.parquet")
    told(workbench("stores", "export", home / "s", "--to", "numpy", "--out", home / "f"), "damaged rows.parquet")
    assert not (home / "f").exists()


def test_import(home):
    save_file({"model.layers.0": torch.ones(3, 4)}, home / "p.safetensors")
    (home / "prompts.txt").write_text("a\nb\nc\n")
    line = ("stores", "import", home / "p.safetensors", "--out", home / "i", "--model", "mine")
    said = json.loads(good(*line, "--prompts", home / "prompts.txt", "--json").stdout)
    assert (said["rows"], said["sites"]) == (3, ["resid_post.0"])
    assert "fingerprint unknown" in good("stores", "show", home / "i").stdout
    (home / "p.pt").write_bytes(b"\x80\x04N.")
    told(workbench("stores", "import", home / "p.pt", "--out", home / "j"), "never loaded")
    told(workbench("stores", "import", home / "p.safetensors", "--out", home / "j", "--format", "x"), "'x'", "saelens")
    assert not (home / "j").exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["stores", "nonsense"], ["nonsense", "stores --help"]),
        (["stores", "export", "s"], ["--to"]),
        (["stores", "verify"], ["STORE"]),
    ],
)
def test_a_line_that_cannot_be_read(line, words):
    told(workbench(*line), *words)


def test_every_verb_has_its_help():
    for verb in ("ls", "show", "verify", "repair", "gc", "merge", "export", "import"):
        assert verb in good("stores", "--help").stdout
        assert "Usage:" in good("stores", verb, "--help").stdout
    assert "stores" in good("--help").stdout
