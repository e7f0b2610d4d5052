"""A folder of work is listed whatever lies in it: every kind and state, damage, links, and more folders than are looked at."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from pathlib import Path

import pytest

from workbench import UserError
from workbench.catalogue import Catalogue, catalogue
from workbench.sites import Site

from .store.made import made_store, noise

TEXTS = ["one two three"] * 4
LAYERS = {Site(0): noise(12, 4)}


def run_folder(path: Path, marker: str = "job.toml", *, done: bool = False) -> Path:
    """A run folder with one step."""
    (path / "steps").mkdir(parents=True)
    (path / marker).write_text('name = "trial"\n[donor]\nmodel = "d"\n')
    (path / "steps" / "profile.json").write_text("{}")
    if done:
        (path / "metrics.json").write_text("{}")
    return path


def listed(folder: Path, **more: int) -> dict[str, tuple[str, str]]:
    return {entry.name: (entry.kind, entry.state) for entry in catalogue(folder, **more).entries}


def test_an_empty_folder_holds_nothing(tmp_path):
    found = catalogue(tmp_path)
    assert (found.folder, found.entries, found.cut) == (tmp_path.resolve(), (), False)


def test_every_kind_and_state_is_listed_by_name(tmp_path):
    run_folder(tmp_path / "runs" / "done", done=True)
    run_folder(tmp_path / "runs" / "stopped")
    run_folder(tmp_path / "grids" / "a", "transport.toml", done=True)
    made_store(tmp_path / "store", LAYERS, TEXTS)
    made_store(tmp_path / "runs" / "done" / "profiles" / "donor", LAYERS, TEXTS)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter.json").write_text(json.dumps({"name": "polite", "base": {"name": "m"}}))
    partial = tmp_path / ".next.partial"
    partial.mkdir()
    (partial / "journal.jsonl").write_text('{"plan": "x"}\n')
    about = {"format": "workbench.profile_moments", "model": {"name": "m"}, "prompts": {"name": "p"}, "n_rows": 3,
             "sites": ["resid_post.0"], "tokens": "all"}  # fmt: skip
    (tmp_path / "moments").mkdir()
    (tmp_path / "moments" / "moments.json").write_text(json.dumps(about))
    assert listed(tmp_path) == {
        ".next.partial": ("unfinished", "unfinished"),
        "adapter": ("adapter", "whole"),
        "grids/a": ("transport", "done"),
        "moments": ("moments", "moments"),
        "runs/done": ("run", "done"),
        "runs/done/profiles/donor": ("store", "whole"),
        "runs/stopped": ("run", "stopped"),
        "store": ("store", "whole"),
    }
    found = catalogue(tmp_path)
    assert list(found.entries) == sorted(found.entries, key=lambda entry: entry.name)
    store, run, adapter = found.get("store"), found.get("runs/done"), found.get("adapter")
    assert (store.facts["rows"], store.facts["sites"], store.facts["dtype"]) == (12, ["resid_post.0"], "float32")
    assert run.facts["job"]["donor"] == {"model": "d"}
    assert run.facts["steps"] == ["profile"]
    assert (adapter.facts["model"], adapter.facts["title"]) == ("m", "polite")
    assert [entry.name for entry in found.of("run", "transport")] == ["grids/a", "runs/done", "runs/stopped"]
    assert found.get("runs/stopped").note == "run the same job again to go on"


def test_a_run_whose_lock_is_held_is_running(tmp_path):
    run = run_folder(tmp_path / "run", done=True)
    with (run / "lock").open("w") as lock:
        assert listed(tmp_path) == {"run": ("run", "done")}, "a lock file that nobody holds means nothing"
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert listed(tmp_path) == {"run": ("run", "running")}


@pytest.mark.parametrize("text", ["name = ", "\x00\x01", "a = " + "[" * 100_000], ids=["cut", "bytes", "nested"])
def test_a_damaged_run_is_an_entry_that_says_so(tmp_path, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "job.toml").write_text(text)
    entry = catalogue(tmp_path).get("run")
    assert (entry.kind, entry.state) == ("run", "damaged")
    assert entry.note.startswith("job.toml cannot be read: ")


@pytest.mark.parametrize("text", ["{", "[]", '"a"', '{"base": 3}', "[" * 100_000],
                         ids=["cut", "list", "text", "base", "nested"])  # fmt: skip
def test_a_damaged_adapter_is_an_entry_that_says_so(tmp_path, text):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter.json").write_text(text)
    entry = catalogue(tmp_path).get("a")
    assert (entry.kind, entry.state) == ("adapter", "damaged")
    assert entry.note.startswith("adapter.json cannot be read: ")


def test_lenses_of_tuned_lens_are_told_from_other_folders_with_its_names(tmp_path):
    config = {
        "base_model_name_or_path": "org/m",
        "d_model": 4,
        "num_hidden_layers": 2,
        "lens_type": "linear_tuned_lens",
    }
    for name, about, params in (("tuned", config, "params.pt"), ("ours", config, "params.safetensors"),
                                ("model", {"d_model": 4}, "params.pt"), ("cut", "{", "params.pt")):  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(about if isinstance(about, str) else json.dumps(about))
        (tmp_path / name / params).write_bytes(b"")
    found = catalogue(tmp_path)
    assert {entry.name: (entry.kind, entry.state) for entry in found.entries} == {
        "ours": ("lens", "whole"), "tuned": ("lens", "whole")}  # fmt: skip
    assert found.get("tuned").facts["base"] == {"name": "org/m"}


def test_saved_probes_are_listed_in_their_run_and_alone(tmp_path):
    header = {"base": {"name": "m"}, "site": "resid_post.1", "label": "l", "classes": ["a", "b"]}
    run_folder(tmp_path / "run", "probe.toml", done=True)
    for name, text in (("run/probes/all/resid_post.1", json.dumps(header)), ("alone", json.dumps(header)), ("cut", "{"),
                       ("odd", '{"base": 3}')):  # fmt: skip
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "probe.json").write_text(text)
    found = catalogue(tmp_path)
    assert {entry.name: (entry.kind, entry.state) for entry in found.entries} == {
        "alone": ("saved probe", "whole"), "cut": ("saved probe", "damaged"), "odd": ("saved probe", "damaged"),
        "run": ("probe", "done"), "run/probes/all/resid_post.1": ("saved probe", "whole")}  # fmt: skip
    assert found.get("alone").facts["site"] == "resid_post.1"
    assert found.get("cut").note.startswith("probe.json cannot be read: ")


def test_damaged_stores_are_entries_that_say_so(tmp_path):
    for name in ("cut", "nested", "shard", "bare"):
        made_store(tmp_path / name, LAYERS, TEXTS)
    manifest = (tmp_path / "cut" / "manifest.json").read_text()
    (tmp_path / "cut" / "manifest.json").write_text(manifest[:200])
    (tmp_path / "nested" / "manifest.json").write_text("[" * 100_000)
    (tmp_path / "shard" / "shards" / "00000.safetensors").unlink()
    (tmp_path / "bare" / "manifest.json").unlink()
    found = catalogue(tmp_path)
    assert {entry.name: (entry.kind, entry.state) for entry in found.entries} == dict.fromkeys(
        ("bare", "cut", "nested", "shard"), ("store", "damaged"))  # fmt: skip
    assert "00000.safetensors is missing" in found.get("shard").note
    assert found.get("bare").note == "has no manifest.json"
    assert "not JSON" in found.get("cut").note


def test_links_are_not_followed(tmp_path):
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    made_store(outside / "store", LAYERS, TEXTS)
    secret = outside / "secret.toml"
    secret.write_text('password = "hidden"\n')
    inside.mkdir()
    (inside / "store").symlink_to(outside / "store")
    (inside / "round").symlink_to(inside)
    for name, marker in (
        ("run", "job.toml"),
        ("adapter", "adapter.json"),
        ("sums", "moments.json"),
        ("s", "manifest.json"),
    ):
        (inside / name).mkdir()
        (inside / name / marker).symlink_to(secret)
    found = catalogue(inside)
    assert "hidden" not in repr(found)
    assert {entry.name: entry.state for entry in found.entries} == {"run": "damaged", "adapter": "damaged"}


def test_a_pipe_in_place_of_a_file_holds_nobody_up(tmp_path):
    for name, marker in (
        ("run", "job.toml"),
        ("adapter", "adapter.json"),
        ("sums", "moments.json"),
        ("s", "manifest.json"),
    ):
        (tmp_path / name).mkdir()
        os.mkfifo(tmp_path / name / marker)
    found: list[Catalogue] = []
    thread = threading.Thread(target=lambda: found.append(catalogue(tmp_path)), daemon=True)
    thread.start()
    thread.join(timeout=30)
    assert found, "it waits for somebody to write into the pipe"
    assert {entry.name: entry.state for entry in found[0].entries} == {"run": "damaged", "adapter": "damaged"}


def test_a_file_far_too_large_is_not_read(tmp_path):
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "job.toml").open("wb") as stream:
        stream.truncate(1 << 40)
    assert "more than any" in catalogue(tmp_path).get("run").note


def test_hidden_folders_are_passed_over_and_unfinished_stores_are_not(tmp_path):
    run_folder(tmp_path / ".hidden" / "run")
    made_store(tmp_path / ".cache", LAYERS, TEXTS)
    assert listed(tmp_path) == {}


def test_of_too_many_folders_some_are_looked_at_and_it_says_so(tmp_path):
    for i in range(30):
        run_folder(tmp_path / f"run{i:02d}")
    found = catalogue(tmp_path, most=11)
    assert found.cut
    assert 0 < len(found.entries) < 30
    assert not catalogue(tmp_path).cut


def test_only_what_was_listed_can_be_opened_by_name(tmp_path):
    run_folder(tmp_path / "folder" / "run")
    run_folder(tmp_path / "other")
    found = catalogue(tmp_path / "folder")
    for name in ("../other", str(tmp_path / "other"), "", "run/", "x" * 1000):
        with pytest.raises(UserError, match=r"no artefact .* in .*folder; there is run"):
            found.get(name)
    with pytest.raises(UserError, match="there is nothing"):
        catalogue(tmp_path / "folder" / "run" / "steps").get("a")


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_a_folder_that_is_not_there_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="no such folder; give the one that holds your runs and stores"):
        catalogue(tmp_path / name)
