"""Verbs with --engine: what they leave is what they leave without, and what they refuse is told in one line."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from workbench.cli import app
from workbench.engines import LocalEngine

from ..conftest import make_module, save_folder
from .stand_in import StandIn

PROMPTS = [" ".join(f"w{(7 * i * n + 3) % 150}" for i in range(3 + n % 5)) for n in range(1, 41)]


def workbench(*line: Any) -> Result:
    return CliRunner().invoke(app, [str(part) for part in line])


def good(*line: Any) -> Any:
    result = workbench(*line, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def told(*line: Any) -> str:
    result = workbench(*line)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    return result.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("verbs")
    (home / "p.txt").write_text("\n".join(PROMPTS) + "\n")
    for name, family in (("donor", "llama"), ("recipient", "gpt2")):
        save_folder(make_module(family), home / name)
    return home


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    engine = StandIn()
    monkeypatch.setattr(
        "workbench.engines.open_engine", lambda name, **_: nullcontext(engine if name == "ray" else LocalEngine())
    )
    return engine


def test_generate_answers_the_same(home: Path, counted: StandIn):
    line = ("generate", home / "donor", "--prompts", home / "p.txt", "--max-new-tokens", 4, "--batch-size", 7,
            "--temperature", 3)  # fmt: skip
    assert workbench(*line, "--engine", "ray").stdout == workbench(*line).stdout != ""
    assert counted.tasks == ["run_piece"] * 6


def test_convert_profiles_two_models_and_fits_as_from_their_stores(home: Path, counted: StandIn, tmp_path: Path):
    for side in ("donor", "recipient"):
        good("profile", home / side, "--prompts", home / "p.txt", "--out", tmp_path / side)
    good("convert", tmp_path / "donor", tmp_path / "recipient", "--out", tmp_path / "c")
    two = "convert", home / "donor", home / "recipient", "--prompts", home / "p.txt"
    made = good(*two, "--out", tmp_path / "c2", "--engine", "ray", "--profiles", tmp_path / "kept")
    assert (made["engine"], made["workers"], made["redone"]) == ("ray", 2, 0)
    assert counted.tasks == ["write_piece"] * 2
    assert files(tmp_path / "c2") == files(tmp_path / "c")
    for side in ("donor", "recipient"):
        assert files(tmp_path / "kept" / side) == files(tmp_path / side)
    alone = good(*two, "--out", tmp_path / "c3")
    assert "engine" not in alone
    assert files(tmp_path / "c3") == files(tmp_path / "c")
    mixed = "convert", tmp_path / "donor", home / "recipient", "--prompts", home / "p.txt", "--out", tmp_path / "c4"
    assert good(*mixed)["maps"] == alone["maps"]


def test_transport_makes_the_same_grid(home: Path, counted: StandIn, tmp_path: Path):
    line = ("transport", home / "donor", "--prompts", home / "p.txt", "--layers", "0,2", "--grid-only", "--folds", 2,
            "--shards", 4)  # fmt: skip
    alone = good(*line, "--out", tmp_path / "alone")
    spread = good(*line, "--out", tmp_path / "spread", "--engine", "ray")
    assert (spread["engine"], "engine" in alone) == ("ray", False)
    assert set(counted.tasks) == {"piece_rows"}
    assert spread["grid"] == alone["grid"]
    assert files(tmp_path / "spread" / "grid") == files(tmp_path / "alone" / "grid")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (("convert", "donor", "recipient", "--out", "x", "--engine", "ray"), "--engine is of --prompts, with which both"),
        (("convert", "donor", "recipient", "--out", "x", "--profiles", "y"), "--profiles is of --prompts"),
        (("generate", "donor", "w1", "--stream", "--engine", "ray"), "--stream shows words as they come"),
        (("generate", "donor", "w1", "--workers", "2"), "--workers: of --engine ray alone"),
        (("run", "bundled:demo", "--address", "auto"), "--address: of --engine ray alone"),
        (("transport", "donor", "--prompts", "p.txt", "--out", "x", "--engine", "dask"), "unknown engine 'dask'"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch, line: Any, says: str):
    monkeypatch.chdir(home)
    assert says in told(*line)


def test_routed_positions_stay_here(home: Path, counted: StandIn, tmp_path: Path):
    line = "transport", home / "donor", "--prompts", home / "p.txt", "--out", tmp_path / "x", "--grid-only"
    assert "which no engine spreads; leave the engine out" in told(*line, "--engine", "ray", "--positions", "attention")
