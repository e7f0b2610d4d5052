"""Stored artefacts under the doctor: stale, unfinished, damaged, and in another basis than the model's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from workbench import doctor as doctors
from workbench import load, profile_model
from workbench.adapters.adapter import vector
from workbench.basis import CENTRED, EARLIER, LATER, NORMED, OTHER, RAW, SCALED, bases_of
from workbench.doctor import Check, artefacts, diagnose
from workbench.models import Model
from workbench.prompts import PromptSet
from workbench.sites import Site
from workbench.store import Store

from ..conftest import LAYERS, WIDTH, make_module, save_folder

PROMPTS = [f"w{i} w{i + 1} w{2 * i} w3" for i in range(12)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and a store of it below `runs`."""
    place = tmp_path_factory.mktemp("artefacts")
    model = load(str(save_folder(make_module("llama"), place / "llama")))
    (place / "prompts.txt").write_text("\n".join(PROMPTS))
    profile_model(model, str(place / "prompts.txt"), place / "runs" / "store", tokens="all")
    return place


@pytest.fixture(autouse=True)
def no_machine(monkeypatch):
    monkeypatch.setattr(doctors, "look_at_machine", lambda folder: [])


def of(checks: list[Check], name: str) -> list[Check]:
    return [check for check in checks if check.name == name]


def test_a_store_beside_its_model_is_whole_of_it_and_raw(place):
    checks = diagnose(str(place / "llama"), place / "runs")
    assert {check.status for check in checks} == {"OK"}
    (basis,) = of(checks, "basis")
    assert "raw; " in basis.found
    assert "computed again" in basis.found


def test_a_store_of_a_model_that_was_not_named_says_so(place):
    checks = of(diagnose("bundled:donor", place / "runs"), "store")
    assert [check.status for check in checks] == ["OK", "WARN"]
    assert "was compared with nothing" in checks[1].found


def test_a_store_whose_model_has_other_weights_now_is_stale(place, tmp_path):
    changed = tmp_path / "llama"
    changed.symlink_to(save_folder(make_module("llama", seed=1), tmp_path / "other"))
    check = of(diagnose(str(changed), place / "runs"), "stale store")[0]
    assert check.status == "FAIL"
    assert "weights" in check.found


def test_weights_that_changed_are_noticed_without_loading_the_model(place, tmp_path):
    model = save_folder(make_module("llama"), tmp_path / "llama")
    profile_model(load(str(model)), PROMPTS, tmp_path / "runs" / "store")
    assert not of(diagnose(tmp_path / "runs"), "stale store")
    save_folder(make_module("llama", seed=1), tmp_path / "llama")
    assert "other weights" in of(diagnose(tmp_path / "runs"), "stale store")[0].found


def test_prompts_that_changed_since():
    whole = PromptSet.load("bundled:evaluation_style")
    for held, stale in ((whole, False), (whole[:5], False), (whole[1:], True)):
        prompts = {"name": "bundled:evaluation_style", "count": len(held)}
        store = SimpleNamespace(path="s", prompt_hash=held.hash, manifest={"prompts": prompts})
        assert bool(artefacts._prompts(store)) == stale


def test_an_adapter_of_another_tokenizer(place, tmp_path):
    model = load(str(place / "llama"))
    base = {**model.fingerprint, "tokenizer": "0" * 64}
    replace(vector(Site(1), torch.ones(WIDTH)), base=base).save(tmp_path / "adapter")
    check = of(diagnose(str(place / "llama"), tmp_path), "adapter")[0]
    assert (check.status, "tokenizer" in check.found) == ("WARN", True)


def test_a_store_that_is_damaged_and_one_that_is_not_finished(place, tmp_path):
    import shutil

    shutil.copytree(place / "runs" / "store", tmp_path / "store")
    shard = next((tmp_path / "store" / "shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:-8])
    (tmp_path / ".half.partial").mkdir()
    (tmp_path / ".half.partial" / "journal.jsonl").write_text('{"plan": "x"}\n')
    checks = of(diagnose(tmp_path), "store")
    assert sorted(check.status for check in checks) == ["FAIL", "WARN"]
    assert all(check.fix for check in checks)


def test_one_flipped_bit_is_found_and_a_store_that_is_not_read_says_so(place, tmp_path, monkeypatch):
    import shutil

    shutil.copytree(place / "runs" / "store", tmp_path / "store")
    shard = next((tmp_path / "store" / "shards").iterdir())
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    (check,) = of(diagnose(tmp_path), "store")
    assert (check.status, "damaged" in check.found) == ("FAIL", True)
    monkeypatch.setattr(artefacts, "READ", 10)
    (check,) = of(diagnose(tmp_path), "store")
    assert (check.status, "workbench stores verify" in check.found) == ("OK", True)


def test_what_is_fine_is_one_line_where_it_would_be_many(tmp_path):
    for i in range(artefacts.SHOWN + 1):
        vector(Site(1), torch.ones(WIDTH)).save(tmp_path / f"a{i}")
    (check,) = diagnose(tmp_path)
    assert (check.status, check.found) == ("OK", f"{artefacts.SHOWN + 1} below {tmp_path} are as they should be")


def test_a_folder_that_is_not_there_and_one_that_holds_nothing(tmp_path):
    assert of(diagnose(tmp_path), "artefacts")[0].status == "WARN"


# -- the basis --------------------------------------------------------------------------------------------------------


def rewritten(store: Store, folder: Path, change: object) -> Store:
    """A store with other states under the same names."""
    from workbench.store.writer import StoreWriter

    rows = {site: change(site, store.read(site).clone()) for site in store.sites}  # type: ignore[operator]
    with StoreWriter(folder, "planted") as writer:
        writer.write(rows, dict.fromkeys(rows, 0))
        manifest = {key: value for key, value in store.manifest.items() if key not in ("shards", "tables", "checksum")}

        def tables(where: Path) -> None:
            for name in ("rows.parquet", "prompts.parquet"):
                (where / name).write_bytes((store.path / name).read_bytes())

        writer.finish(manifest, tables)
    return Store.open(folder)


@pytest.fixture(scope="module")
def pair(place: Path) -> tuple[Model, Store]:
    return load(str(place / "llama")), Store.open(place / "runs" / "store")


@pytest.mark.parametrize("planted", [RAW, CENTRED, NORMED, SCALED, EARLIER, LATER, OTHER])
def test_each_basis_is_told(pair, tmp_path, planted):
    model, store = pair
    norm = model.decoder.norm

    @torch.no_grad()
    def change(site: Site, h: torch.Tensor) -> torch.Tensor:
        layer = site.layer + {EARLIER: -1, LATER: 1}.get(planted, 0)
        if planted in (EARLIER, LATER):
            return store.read(Site(min(max(layer, 0), LAYERS - 1))).clone()
        made = {RAW: lambda: h, CENTRED: lambda: h - h.mean(-1, keepdim=True), NORMED: lambda: norm(h),
                SCALED: lambda: h / h.norm(dim=-1, keepdim=True), OTHER: lambda: h.roll(1, -1)}  # fmt: skip
        return made[planted]().contiguous()

    found = bases_of(rewritten(store, tmp_path / "store", change), model, [Site(1)])
    assert [one.found for one in found] == [planted]


def test_the_doctor_says_of_a_store_in_another_basis(pair, place, tmp_path):
    _, store = pair
    rewritten(store, tmp_path / "runs" / "store", lambda site, h: (h - h.mean(-1, keepdim=True)).contiguous())
    check = of(diagnose(str(place / "llama"), tmp_path / "runs"), "basis")[0]
    assert check.status == "FAIL"
    assert "resid_post.0 centred" in check.found


def test_a_store_that_does_not_say_its_basis(pair, tmp_path, monkeypatch):
    _, store = pair
    unknown = dict(store.manifest, basis="unknown")
    monkeypatch.setattr(store, "manifest", unknown)
    (check,) = artefacts._basis(store, [])
    assert (check.status, "name its model too" in check.fix) == ("WARN", True)
