"""The doctor: what is fine is said to be fine, and what is not comes with what to do."""

from __future__ import annotations

import json
from collections import namedtuple
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from typer.testing import CliRunner

from workbench import doctor
from workbench.anatomy import proof as proof
from workbench.cli import app
from workbench.doctor import Check, diagnose

from .conftest import LAYERS, WIDTH, make_module, save_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(make_module("llama"), tmp_path_factory.mktemp("doctor") / "llama")


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_the_machine(tmp_path):
    found = by_name(diagnose(folder=tmp_path))
    assert {"python", "packages", "cpu", "gpu", "memory", "disk", "bundled pair"} <= set(found)
    assert "torch 2." in found["packages"].found
    assert str(tmp_path) in found["disk"].found
    assert all(check.fix for check in found.values() if check.status != "OK")


def test_a_model_is_proved_at_every_site(folder):
    found = by_name(diagnose(str(folder)))
    assert {found[name].status for name in ("model", "sites", "chat template", "tokenizer", "fingerprint")} == {"OK"}
    assert f"llama, {LAYERS} layers, width {WIDTH}" in found["model"].found
    assert f"resid_post.0 to resid_post.{LAYERS - 1} proved at model.layers" in found["sites"].found
    assert found["sites"].found.endswith("so resid_mid, attn_out, mlp_out, mlp_act")


def test_every_layer_is_written_to(folder, monkeypatch):
    written = []
    prove_write = proof._prove_write
    monkeypatch.setattr(
        proof, "_prove_write", lambda model, site, *rest: written.append(site.layer) or prove_write(model, site, *rest)
    )
    diagnose(str(folder))
    assert written == list(range(LAYERS))


def test_a_model_that_cannot_be_loaded_fails(tmp_path):
    check = by_name(diagnose(str(tmp_path / "nowhere")))["model"]
    assert check.status == "FAIL"
    assert "nowhere" in check.found


def test_a_site_that_fails_is_named(folder, monkeypatch):
    monkeypatch.setattr("workbench.anatomy.proof.torch.equal", lambda *_: False)
    check = by_name(diagnose(str(folder)))["sites"]
    assert check.status == "FAIL"
    assert "resid_post.0" in check.found


def test_a_tokenizer_without_a_template_and_one_of_another_model(folder, monkeypatch):
    model = namedtuple("Fake", "tokenizer module end_ids")
    tokenizer = type("T", (), {"chat_template": None, "bos_token_id": None, "__len__": lambda self: 500})()
    weight = namedtuple("E", "weight")(namedtuple("W", "shape")((199, WIDTH)))
    module = type("M", (), {"get_input_embeddings": lambda self: weight})()
    found = by_name(list(doctor._tokenizer(model(tokenizer, module, []))))
    assert (found["chat template"].status, found["tokenizer"].status) == ("WARN", "FAIL")
    assert "500 tokens and the model 199" in found["tokenizer"].found


@pytest.mark.parametrize(("free", "status"), [(100 << 30, "OK"), (1 << 30, "WARN"), (1 << 20, "FAIL")])
def test_the_disk(tmp_path, monkeypatch, free, status):
    monkeypatch.setattr("shutil.disk_usage", lambda _: namedtuple("U", "total used free")(0, 0, free))
    check = doctor._disk(tmp_path)
    assert check.status == status
    assert bool(check.fix) == (status != "OK")


def test_a_package_that_is_missing_or_old(monkeypatch):
    monkeypatch.setattr(doctor, "requires", lambda _: ["torch>=2.8", "einops>99", "gone>=1", "nosuch; extra == 'dev'"])

    def version(name: str) -> str:
        if name == "gone":
            raise PackageNotFoundError(name)
        return "2.13.0"

    monkeypatch.setattr(doctor, "version", version)
    checks = list(doctor._packages())
    assert [(c.status, c.fix) for c in checks] == [
        ("WARN", "run `pip install 'einops>99'`"),
        ("FAIL", "run `pip install 'gone>=1'`"),
    ]


def test_the_command_exits_with_1_where_something_is_wrong(folder, tmp_path):
    good = CliRunner().invoke(app, ["doctor", str(folder)])
    assert good.exit_code == 0, good.output
    assert all(line.split()[0] in ("OK", "WARN") for line in good.stdout.splitlines())
    bad = CliRunner().invoke(app, ["doctor", str(tmp_path / "nowhere"), "--json"])
    assert bad.exit_code == 1
    assert json.loads(bad.stdout)[-1]["status"] == "FAIL"
