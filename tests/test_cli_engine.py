"""`--engine` and `--part` on the command line: how they are read and refused, and what `workbench profile` makes with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from workbench.cli import app
from workbench.cli_engine import load_for
from workbench.cli_values import own_device, part_of
from workbench.engines import Engine, LocalEngine
from workbench.errors import UserError
from workbench.profile import plan as plans

PROMPTS = [" ".join(f"w{(7 * i + j) % 180}" for j in range(1 + i % 9)) for i in range(40)]


@pytest.fixture
def line(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A profile of several blocks, all but where it goes."""
    monkeypatch.setattr(plans, "BLOCK_ROWS", 30)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return ["profile", str(model_folder), "--prompts", str(tmp_path / "prompts.txt"), "--tokens", "all"]


def run(*line: Any) -> Result:
    return CliRunner().invoke(app, [str(part) for part in line])


def told(result: Result) -> str:
    assert result.exit_code == 2, result.output
    return [text for text in result.stderr.splitlines() if not text.startswith("loaded ")][-1]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_parts_run_by_any_scheduler_make_the_store_of_one(
    line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert run(*line, "--out", tmp_path / "one").exit_code == 0
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        made = run(*line, "--out", tmp_path / "two", "--part", "env", "--json")
        assert made.exit_code == 0, made.output
        assert json.loads(made.stdout)["part"] == int(rank)
    assert not (tmp_path / "two").exists()
    assert run(*line, "--out", tmp_path / "two").exit_code == 0
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_url_is_written_and_fetched(line: list[str], tmp_path: Path):
    url = (tmp_path / "far").as_uri()
    made = run(*line, "--out", url, "--json")
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["store"] == url
    assert run("stores", "fetch", url, tmp_path / "near").exit_code == 0
    assert contents(tmp_path / "near") == contents(tmp_path / "far")


def test_a_process_of_several_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert own_device("auto", "env", {"LOCAL_RANK": "3"}) == "cuda:3"
    assert own_device("auto", "env", {"SLURM_LOCALID": "5"}) == "cuda:1"
    assert own_device("cuda:0", "env", {"LOCAL_RANK": "3"}) == "cuda:0"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # the scheduler shows each process its own
    assert own_device("auto", "env", {"LOCAL_RANK": "3"}) == "auto"


def test_how_parts_are_read():
    slurm = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "3"}
    assert part_of("env", slurm) == (2, 4)
    assert part_of("env", {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}) == (1, 2)
    stepped = {**slurm, "SLURM_ARRAY_TASK_ID": "23", "SLURM_ARRAY_TASK_STEP": "10"}  # --array=3-33:10
    assert part_of("env", stepped) == (2, 4)
    with pytest.raises(UserError, match="neither torchrun"):
        part_of("env", {})
    with pytest.raises(UserError, match="RANK='x' is no number"):
        part_of("env", {"RANK": "x", "WORLD_SIZE": "2"})
    with pytest.raises(UserError, match="write I/N with I from 0"):
        part_of("env", {"RANK": "5", "WORLD_SIZE": "2"})
    for bad in ("2/2", "1", "-1/4", "a/b", "0/0"):
        with pytest.raises(UserError, match="write I/N with I from 0"):
            part_of(bad)


def test_options_that_do_not_go_together_are_refused(line: list[str], tmp_path: Path, model_folder: Path):
    out = ["--out", tmp_path / "x"]
    assert "--workers, --cpus-per-worker: of --engine ray alone" in told(
        run(*line, *out, "--workers", 2, "--cpus-per-worker", 1)
    )
    assert "unknown engine 'dask'; allowed: local, ray" in told(run(*line, *out, "--engine", "dask"))
    assert "--part is of a store in a folder and of the local engine" in told(
        run(*line, *out, "--part", "0/2", "--moments")
    )
    assert "moments are written to a folder" in told(run(*line, "--out", "s3://bucket/x", "--moments"))

    class Far(LocalEngine):
        name, device = "ray", "cuda"

    with pytest.raises(UserError, match=r"--device cpu: the workers of --engine ray compute on cuda"):
        load_for(Far(), str(model_folder), device="cpu")
    assert load_for(Far(), str(model_folder)).is_skeleton


@pytest.mark.xdist_group("ray")
@pytest.mark.parametrize("kind", [[], pytest.param(["--moments", "--folds", "2"], marks=pytest.mark.slow)])
def test_ray_on_the_command_line(line: list[str], two_workers: Engine, tmp_path: Path, kind: list[str]):
    # the workers of the session hold two of the cluster's three CPUs
    made = run(*line, "--out", tmp_path / "ray", "--engine", "ray", "--workers", 1, "--json", *kind)
    assert made.exit_code == 0, made.output
    found = json.loads(made.stdout)
    assert (found["engine"], found["workers"], found["redone"]) == ("ray", 1, 0)
    assert found["rows"] == sum(len(prompt.split()) + 2 for prompt in PROMPTS)  # and the template's two roles
