"""The batch script: it is valid bash, starts Ray on every node before the run, and hands an interrupt on."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from workbench.cli import app
from workbench.errors import UserError
from workbench.slurm import sbatch_script

SRUN = """while [[ $1 == --* ]]; do [[ $1 == --nodelist=* ]] && node=${1#*=}; shift; done
echo "$node: $* (token of ${#RAY_AUTH_TOKEN})" >> "$CALLS"
exec "$@"
"""
SLOW = """import os, signal, sys, time

def told(word):
    with open(os.environ["CALLS"], "a") as calls:
        calls.write(word + "\\n")

def stopped(*_):
    told("stopped")
    sys.exit(130)

signal.signal(signal.SIGINT, stopped)
told("begun")
while True:
    time.sleep(0.05)
"""  # no shell script: bash may forget an interrupt that comes while it waits for a child


@pytest.fixture
def allocation(tmp_path: Path) -> dict[str, str]:
    """Commands in place of Slurm's and Ray's, which write down how they are called."""
    commands = {
        "srun": SRUN,
        "scontrol": "printf 'n1\\nn2\\nn3\\n'",
        "hostname": "echo 'fe80::1 127.0.1.1 10.0.0.7 10.0.0.8'",
        "ray": "[[ $1 == status ]] || exec sleep 30",
        "workbench": f'[[ $2 != slow.toml ]] || exec {shlex.quote(sys.executable)} {shlex.quote(str(tmp_path / "slow"))}; '
        'echo "workbench $*" >> "$CALLS"; [[ $2 != my* ]] || '
        'until [[ $(grep -c "ray start" "$CALLS") -ge 3 ]]; do sleep 0.02; done; exit 3',
    }  # fmt: skip
    (tmp_path / "slow").write_text(SLOW)
    (tmp_path / "bin").mkdir()
    for name, body in commands.items():
        file = tmp_path / "bin" / name
        file.write_text(f"#!/bin/bash\n{body}\n")
        file.chmod(0o755)
    return {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "SLURM_JOB_ID": "12345",
            "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_SUBMIT_DIR": str(tmp_path), "HOME": str(tmp_path)}  # fmt: skip


def calls(allocation: dict[str, str]) -> list[str]:
    file = Path(allocation["CALLS"])
    return file.read_text().splitlines() if file.exists() else []


def catches(process: int, number: int) -> bool:
    """Whether a process has set a handler of its own for a signal."""
    status = Path(f"/proc/{process}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


bash = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@bash
def test_ray_is_started_on_every_node_and_then_the_run(allocation):
    script = sbatch_script(["run", "my job.toml"], nodes=3, gpus_per_node=4, gpus_per_worker=2, name="j")
    done = subprocess.run(["bash", "-c", script], env=allocation, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3, done.stderr  # the run's own
    seen = calls(allocation)
    started = [line for line in seen if "ray start" in line]
    assert sorted(line[:2] for line in started) == ["n1", "n2", "n3"]
    assert all(line.endswith("(token of 64)") for line in started)
    head = next(line for line in started if "--head" in line)
    assert head.startswith("n1: ")
    assert "--node-ip-address=10.0.0.7 --port=32345 --num-cpus=8 --num-gpus=4" in head
    assert all("--address=10.0.0.7:32345" in line for line in started if line != head)
    (run,) = [line for line in seen if line.startswith("workbench ")]
    assert run == "workbench run my job.toml --engine ray --address 10.0.0.7:32345 --workers 6 --gpus-per-worker 2"


@bash
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads signal handlers from /proc")
def test_the_run_is_interrupted_before_its_time_is_up_and_ends_by_itself(allocation):
    script = sbatch_script(["run", "slow.toml"])
    running = subprocess.Popen(["bash", "-c", script], env=allocation, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 100
    while not ("begun" in calls(allocation) and catches(running.pid, signal.SIGUSR1)):
        assert time.monotonic() < until
        time.sleep(0.02)
    running.send_signal(signal.SIGUSR1)
    assert running.wait(timeout=100) == 130
    assert calls(allocation)[-1] == "stopped"


def test_what_slurm_is_asked_for():
    script = sbatch_script(
        ["profile", "m", "--prompts", "p q.txt"], nodes=2, gpus_per_node=0, options=["--partition=long"]
    )
    directives = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --partition=long" in directives
    assert not any("gpus" in line for line in directives)
    assert "--prompts 'p q.txt' --engine ray" in script
    assert "--workers 2 --gpus-per-worker 0 --cpus-per-worker 8" in script


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        ([], {}, "allowed: profile, transport"),
        (["chat", "m"], {}, "is not spread over machines"),
        (["run", "j.toml", "--engine", "ray"], {}, "--engine is set by the script"),
        (["run", "j.toml"], {"nodes": 0}, "give 1 node"),
        (["run", "j.toml"], {"gpus_per_node": 2, "gpus_per_worker": 4}, "does not fit nodes of 2 GPUs"),
        (["run", "j.toml"], {"time": "soon"}, "D-HH:MM:SS"),
        (["run", "j.toml"], {"options": ["partition"]}, "does not begin with a dash"),
        (["run", "j.toml"], {"options": ["--mem=1\nrm -rf x"]}, "cannot stand in an #SBATCH line"),
        (["run", "j.toml"], {"name": "a b"}, "cannot stand in an #SBATCH line"),
    ],
)
def test_what_cannot_be_run_is_refused(command, options, said):
    with pytest.raises(UserError, match=said):
        sbatch_script(command, **options)


def test_the_command_writes_a_file_and_checks_the_job(tmp_path):
    out = tmp_path / "demo.sbatch"
    made = CliRunner().invoke(app, ["slurm", "bundled:demo", "--out", str(out), "--option=--partition=long"])
    assert made.exit_code == 0, made.output
    assert "#SBATCH --job-name=demo\n" in out.read_text()
    other = CliRunner().invoke(
        app, ["slurm", "--", "profile", "bundled:donor", "--prompts", "bundled:profile", "--out", "s"]
    )
    assert "workbench profile bundled:donor --prompts bundled:profile --out s --engine ray" in other.stdout
    wrong = CliRunner().invoke(app, ["slurm", "--", "profile", "m", "--prompts", "p", "--out", "s", "--nodes", "2"])
    assert wrong.exit_code != 0
    assert "workbench profile: No such option: --nodes" in wrong.output
    (tmp_path / "bad.toml").write_text("x = 1\n")
    assert CliRunner().invoke(app, ["slurm", str(tmp_path / "bad.toml")]).exit_code != 0
