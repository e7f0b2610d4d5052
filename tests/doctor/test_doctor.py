"""The doctor: what is fine is said to be fine, and each of the usual faults is found with what to do about it."""

from __future__ import annotations

import json
import os
from collections import namedtuple
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from workbench import doctor as doctors
from workbench.anatomy import proof as proof
from workbench.cli import app
from workbench.doctor import Check, diagnose, machine
from workbench.doctor.check import failed
from workbench.doctor.model import _tokenizer
from workbench.errors import UserError

from ..conftest import LAYERS, WIDTH, make_module, save_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(make_module("llama"), tmp_path_factory.mktemp("doctor") / "llama")


@pytest.fixture
def no_machine(monkeypatch):
    """Of the sources alone: the machine takes the longest to look at."""
    monkeypatch.setattr(doctors, "look_at_machine", lambda folder: [])


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


# -- the machine ------------------------------------------------------------------------------------------------------


def test_the_machine(tmp_path):
    found = by_name(diagnose(folder=tmp_path))
    assert {"python", "packages", "versions", "cpu", "memory", "disk", "hub", "bundled pair"} <= set(found)
    assert "torch 2." in found["packages"].found
    assert str(tmp_path) in found["disk"].found
    assert all(check.fix for check in found.values() if check.status != "OK")


def test_a_torch_for_the_cpu_beside_an_nvidia_driver(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(machine, "_has_driver", lambda: True)
    check = list(machine._devices())[-1]
    assert (check.status, check.name) == ("FAIL", "torch build")
    assert "built for the CPU alone" in check.found
    assert "With a GPU" in check.fix


def test_a_torch_without_kernels_for_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (70 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    check = machine._gpu(0)
    assert (check.status, check.name) == ("FAIL", "torch build")
    assert "compute capability 9.0" in check.found
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    assert machine._gpu(0).status == "OK"


@pytest.mark.parametrize(("visible", "said"), [("-1", "CUDA_VISIBLE_DEVICES is '-1'"), (None, "built for CUDA 13.0")])
def test_no_gpu_is_seen(monkeypatch, visible, said):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    check = machine._unseen("2.13.0", "13.0")
    assert (check.status, check.name) == ("WARN", "gpu")
    assert said in check.found
    assert check.fix


def test_a_package_that_is_missing_or_old(monkeypatch):
    monkeypatch.setattr(machine, "requires", lambda _: ["torch>=2.8", "einops>99", "gone>=1", "nosuch; extra == 'dev'"])

    def version(name: str) -> str:
        if name == "gone":
            raise PackageNotFoundError(name)
        return "2.13.0"

    monkeypatch.setattr(machine, "version", version)
    checks = list(machine._packages())
    assert [(c.status, c.fix) for c in checks] == [
        ("WARN", "run `pip install 'einops>99'`"),
        ("FAIL", "run `pip install 'gone>=1'`"),
    ]


def test_versions_that_clash_with_one_another(monkeypatch):
    asked = {"workbench": ["a", "b>=1"], "a": ["b<2", "gone", "c; extra == 'x'"], "b": []}
    monkeypatch.setattr(machine, "requires", lambda name: asked[name])
    monkeypatch.setattr(machine, "version", lambda name: {"a": "1.0", "b": "2.5"}.get(name) or _absent(name))
    checks = list(machine._clashes())
    assert [c.status for c in checks] == ["WARN", "WARN"]
    assert "a 1.0 asks for b<2 and 2.5 is installed" in checks[0].found
    assert "a asks for gone, which is not installed" in checks[1].found
    asked["a"] = ["b<3"]
    assert [c.status for c in machine._clashes()] == ["OK"]


def _absent(name: str) -> str:
    raise PackageNotFoundError(name)


@pytest.mark.parametrize(("free", "status"), [(100 << 30, "OK"), (1 << 30, "WARN"), (1 << 20, "FAIL")])
def test_the_disk(tmp_path, monkeypatch, free, status):
    monkeypatch.setattr("shutil.disk_usage", lambda _: namedtuple("U", "total used free")(0, 0, free))
    check = machine._disk("disk", tmp_path, "elsewhere")
    assert check.status == status
    assert bool(check.fix) == (status != "OK")


def test_a_disk_without_room_for_more_files_and_one_that_is_read_only(tmp_path, monkeypatch):
    free = dict(f_bavail=10**9, f_frsize=4096, f_blocks=10**9, f_bfree=10**9, f_files=10**6, f_favail=3)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=0, **free))
    check = machine._disk("disk", tmp_path, "elsewhere")
    assert (check.status, "room for 3 files" in check.found) == ("FAIL", True)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_RDONLY, **free))
    assert "cannot be written to" in machine._disk("disk", tmp_path, "elsewhere").found


def test_a_full_disk_of_temporary_files_is_told_where_it_is_another(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_device", lambda folder: hash(str(folder)))
    monkeypatch.setattr("shutil.disk_usage", lambda _: namedtuple("U", "total used free")(0, 0, 1 << 20))
    found = by_name(list(machine._disks(tmp_path)))
    assert {name: check.status for name, check in found.items()} == dict.fromkeys(
        ("disk", "temporary", "hub cache"), "FAIL"
    )
    assert "TMPDIR" in found["temporary"].fix
    assert "HF_HOME" in found["hub cache"].fix


def test_an_offline_hub(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check = machine._hub()
    assert (check.status, check.fix) == ("WARN", "unset it to fetch models")


# -- a model ----------------------------------------------------------------------------------------------------------


def test_a_model_is_proved_at_every_site(folder, no_machine):
    found = by_name(diagnose(str(folder)))
    assert {found[name].status for name in ("model", "sites", "chat template", "tokenizer", "fingerprint")} == {"OK"}
    assert f"llama, {LAYERS} layers, width {WIDTH}" in found["model"].found
    assert f"resid_post.0 to resid_post.{LAYERS - 1} proved at model.layers" in found["sites"].found
    assert found["sites"].found.endswith("so resid_mid, attn_out, mlp_out, mlp_act")


def test_every_layer_is_written_to(folder, monkeypatch, no_machine):
    written = []
    prove_write = proof._prove_write
    monkeypatch.setattr(
        proof, "_prove_write", lambda model, site, *rest: written.append(site.layer) or prove_write(model, site, *rest)
    )
    diagnose(str(folder))
    assert written == list(range(LAYERS))


def test_a_model_that_cannot_be_loaded_fails(tmp_path, no_machine):
    check = by_name(diagnose(str(tmp_path / "nowhere")))["model"]
    assert check.status == "FAIL"
    assert "nowhere" in check.found
    assert "hub id" in check.fix


def _of_the_hub(name: str) -> Exception:
    import httpx
    from huggingface_hub import errors

    kind: Any = getattr(errors, name)
    try:
        return kind("401 Client Error", response=httpx.Response(401, request=httpx.Request("GET", "https://hub")))
    except TypeError:
        return kind("not there")


@pytest.mark.parametrize(
    ("error", "found", "fix"),
    [
        ("GatedRepoError", "'owner/name' is gated", "log in with `hf auth login`"),
        ("RepositoryNotFoundError", "neither a local folder nor on the hub", "check the name"),
        ("RevisionNotFoundError", "no revision", "a branch, a tag or a commit"),
        ("LocalEntryNotFoundError", "the hub cannot be reached", "check the network"),
    ],
)
def test_a_model_that_the_hub_does_not_give(monkeypatch, error, found, fix, no_machine):
    from huggingface_hub import constants

    def refuse(*_: Any, **__: Any) -> None:
        raise _of_the_hub(error)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    check = by_name(diagnose("owner/name"))["model"]
    assert check.status == "FAIL"
    assert found in check.found
    assert fix in check.fix


def test_a_model_that_is_asked_for_offline(monkeypatch, no_machine):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check = by_name(diagnose("owner/name"))["model"]
    assert "HF_HUB_OFFLINE is set" in check.found
    assert "hf download owner/name" in check.fix


def test_a_disk_that_a_model_does_not_fit(monkeypatch, no_machine):
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    assert "set HF_HOME" in by_name(diagnose("owner/name"))["model"].fix


def test_a_family_whose_blocks_cannot_be_told(folder, tmp_path, monkeypatch, no_machine):
    def unknown(module: Any, override: Any = None) -> Any:
        raise UserError(
            "cannot tell the blocks of Odd (lists of 4 modules: none); pass blocks='path.to.the.ModuleList'"
        )

    monkeypatch.setattr("workbench.models.find_blocks", unknown)
    check = by_name(diagnose(str(folder)))["model"]
    assert (check.status, check.found) == ("FAIL", "cannot tell the blocks of Odd (lists of 4 modules: none)")
    assert check.fix == "pass blocks='path.to.the.ModuleList'"


def test_a_family_that_is_no_decoder(tmp_path, no_machine):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=200)
    check = by_name(diagnose(str(save_folder(T5ForConditionalGeneration(config), tmp_path / "t5"))))["model"]
    assert check.status == "FAIL"
    assert "t5" in check.found.lower()
    assert check.fix


def test_a_site_that_fails_is_named(folder, monkeypatch, no_machine):
    monkeypatch.setattr("workbench.anatomy.proof.torch.equal", lambda *_: False)
    check = by_name(diagnose(str(folder)))["sites"]
    assert check.status == "FAIL"
    assert "resid_post.0" in check.found


def test_a_tokenizer_without_a_template_and_one_of_another_model():
    model = namedtuple("Fake", "tokenizer module end_ids")
    tokenizer = type("T", (), {"chat_template": None, "bos_token_id": None, "__len__": lambda self: 500})()
    weight = namedtuple("E", "weight")(namedtuple("W", "shape")((199, WIDTH)))
    module = type("M", (), {"get_input_embeddings": lambda self: weight})()
    found = by_name(list(_tokenizer(model(tokenizer, module, []))))
    assert (found["chat template"].status, found["tokenizer"].status) == ("WARN", "FAIL")
    assert "500 tokens and the model 199" in found["tokenizer"].found


def test_the_last_clause_of_an_error_is_what_to_do():
    assert failed("x", UserError("a; b; do c"), "d") == Check("FAIL", "x", "a; b", "do c")
    assert failed("x", UserError("a"), "d") == Check("FAIL", "x", "a", "d")


def test_the_command_exits_with_1_where_something_is_wrong(folder, tmp_path):
    good = CliRunner().invoke(app, ["doctor", str(folder)])
    assert good.exit_code == 0, good.output
    assert all(line.split()[0] in ("OK", "WARN") for line in good.stdout.splitlines())
    bad = CliRunner().invoke(app, ["doctor", str(tmp_path / "nowhere"), "--json"])
    assert bad.exit_code == 1
    assert json.loads(bad.stdout)[-1]["status"] == "FAIL"
