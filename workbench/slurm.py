"""A batch script that starts Ray on the nodes of a Slurm allocation and runs one command of the workbench there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from .errors import UserError

SPREAD = ("profile", "transport", "convert", "generate", "run")
"""the verbs that take an engine"""
WARNED = 120
"""seconds before the time is up at which a run is asked to stop, so that it keeps what it has and can go on"""

_SCRIPT = r"""#!/bin/bash
{directives}
# Written by `workbench slurm`: Ray on every node of the allocation, then one command. Submit it again and it goes on.
set -euo pipefail
{setup}
cd "${{SLURM_SUBMIT_DIR:-.}}"
export RAY_USAGE_STATS_ENABLED=0
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
on() {{ exec srun --overlap --nodes=1 --ntasks=1 --nodelist="$1" "${{@:2}}"; }}
# whoever reaches the ports of a Ray without a token can run code there; srun hands the environment on
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN="$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')"
head_ip=$(on "${{nodes[0]}}" hostname -I | tr ' ' '\n' | grep -E '^[0-9]+(\.[0-9]+){{3}}$' | grep -v -m1 '^127\.' || true)
[[ -n $head_ip ]] || {{ echo "${{nodes[0]}} has no IPv4 address that other nodes reach" >&2; exit 1; }}
address="$head_ip:$((20000 + SLURM_JOB_ID % 20000))"
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

on "${{nodes[0]}}" ray start --head --node-ip-address="$head_ip" --port="${{address##*:}}" {resources} \
  --include-dashboard=false --temp-dir="/tmp/ray-$SLURM_JOB_ID" --block &
for _ in {{1..60}}; do ray status --address "$address" >/dev/null 2>&1 && break; sleep 2; done
for node in "${{nodes[@]:1}}"; do
  on "$node" ray start --address="$address" {resources} --block &
done

set -m  # or bash would start it deaf to interrupts
workbench {command} --engine ray --address "$address" --workers {workers} {per_worker} &
run=$!
set +m
trap 'kill -INT $run 2>/dev/null || true' USR1 TERM  # it ends the step at hand and says how to go on
status=0
wait $run || status=$?
while kill -0 $run 2>/dev/null; do wait $run && status=0 || status=$?; done
exit $status
"""


def sbatch_script(
    command: Sequence[str],
    *,
    nodes: int = 1,
    gpus_per_node: int = 1,
    cpus_per_node: int = 8,
    gpus_per_worker: int | None = None,
    time: str = "04:00:00",
    name: str | None = None,
    options: Sequence[str] = (),
    setup: str = "",
) -> str:
    """The text of an sbatch file.

    command: of the workbench, without engine options: ["run", "job.toml"], or profile, transport or convert with theirs.
    gpus_per_worker: of one replica of the model, which accelerate spreads over them; 1, or none where a node has none.
    time: as Slurm reads it: minutes, HH:MM:SS or D-HH:MM:SS. options: further `#SBATCH` options, such as
    "--partition=long". setup: shell lines that make `workbench` and `ray` commands: modules, an environment.
    Two minutes before its time is up the run is sent a SIGINT: it keeps what is finished, and goes on when it is submitted
    again. Raises UserError for another command, counts below one, replicas that do not fit a node, and what Slurm would
    not read.

    >>> "--nodes=2" in sbatch_script(["run", "job.toml"], nodes=2)
    True
    """
    if not command or command[0] not in SPREAD:
        raise UserError(
            f"the command {' '.join(command)[:80]!r} is not spread over machines; allowed: {', '.join(SPREAD)}"
        )
    if taken := [
        word for word in command if word.split("=")[0] in ("--engine", "--address", "--workers", "--gpus-per-worker")
    ]:
        raise UserError(f"{taken[0]} is set by the script itself; leave it out")
    if nodes < 1 or cpus_per_node < 1 or gpus_per_node < 0:
        raise UserError(f"nodes={nodes}, cpus_per_node={cpus_per_node}, gpus_per_node={gpus_per_node}: give 1 node, 1 CPU "
                        "and 0 GPUs or more")  # fmt: skip
    each = min(1, gpus_per_node) if gpus_per_worker is None else gpus_per_worker
    if each > gpus_per_node or each < 0 or (gpus_per_node and not each):
        raise UserError(f"gpus_per_worker={each} does not fit nodes of {gpus_per_node} GPUs; give 1 to {gpus_per_node}, or "
                        "more GPUs to a node")  # fmt: skip
    if not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", time):
        raise UserError(f"time {time!r} is not one that Slurm reads; give minutes, HH:MM:SS or D-HH:MM:SS")
    called = name or Path(command[1]).stem.removeprefix("bundled:") if len(command) > 1 else command[0]
    extra = [option.strip() for option in options]
    for value in (called, *extra):
        if not re.fullmatch(r"[\w.,:=@%/+\-\[\]]+", value):
            raise UserError(
                f"{value[:80]!r} holds what cannot stand in an #SBATCH line; give letters, digits and . , : = - /"
            )
    if wrong := next((option for option in extra if not option.startswith("-")), None):
        raise UserError(f"the Slurm option {wrong!r} does not begin with a dash; give --partition=NAME")
    directives = [f"--job-name={called}", f"--nodes={nodes}", "--ntasks-per-node=1", f"--cpus-per-task={cpus_per_node}",
                  *([f"--gpus-per-node={gpus_per_node}"] if gpus_per_node else []), f"--time={time}",
                  "--output=%x-%j.log", f"--signal=B:USR1@{WARNED}", *extra]  # fmt: skip
    workers = nodes * (gpus_per_node // each) if each else nodes
    per = f"--gpus-per-worker {each}" if each else f"--gpus-per-worker 0 --cpus-per-worker {cpus_per_node}"
    return _SCRIPT.format(
        directives="\n".join(f"#SBATCH {one}" for one in directives), setup=setup.strip() or "# what makes the commands: "
        "module load ..., source .venv/bin/activate", command=shlex.join(command), workers=workers, per_worker=per,
        resources=f"--num-cpus={cpus_per_node} --num-gpus={gpus_per_node}",
    )  # fmt: skip
