"""`workbench slurm`: the batch script of a job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

_UsageError: Any = typer.BadParameter.__mro__[1]  # click's, wherever this release of typer keeps it


def _check_words(words: list[str]) -> None:
    """UserError for arguments and options that the verb does not take: better heard now than when the nodes are there."""
    from .cli import app
    from .errors import UserError

    verb: Any = typer.main.get_command(app).commands[words[0]]  # type: ignore[attr-defined]
    try:
        verb.make_context(words[0], [*words[1:], "--engine", "ray"])
    except _UsageError as err:
        told = err.format_message().rstrip(".")
        raise UserError(f"workbench {words[0]}: {told}; options of the script stand before the --") from err


def slurm(
    command: Annotated[
        list[str], typer.Argument(metavar="JOB | VERB ...", help="a job.toml, or after -- a verb with its options")
    ],
    nodes: Annotated[int, typer.Option(help="nodes to ask for")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of each; 0 for nodes that have none")] = 1,
    cpus_per_node: Annotated[int, typer.Option(help="CPUs of each")] = 8,
    gpus_per_worker: Annotated[int | None, typer.Option(help="GPUs that one replica of a model takes [1]")] = None,
    time: Annotated[str, typer.Option(help="minutes, HH:MM:SS or D-HH:MM:SS")] = "04:00:00",
    name: Annotated[str | None, typer.Option(help="of the job [that of the file]")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="a further #SBATCH option, --option=--partition=long say")
    ] = None,
    setup: Annotated[str, typer.Option(help="shell lines before it: modules, an environment")] = "",
    out: Annotated[Path | None, typer.Option(help="file to write [stdout]")] = None,
) -> None:
    """Writes an sbatch file that starts Ray on an allocation and runs a job there.

    `workbench slurm job.toml --nodes 4 --gpus-per-node 8 --out job.sbatch`, or of another verb
    `workbench slurm -- profile MODEL --prompts FILE --out STORE`. Two minutes before its time is up the run is asked to
    stop; submitted again, it goes on with what is finished.
    """
    from .atomic import write_text
    from .slurm import sbatch_script

    words = command if command[0] and len(command) > 1 else ["run", *command]
    script = sbatch_script(
        words, nodes=nodes, gpus_per_node=gpus_per_node, cpus_per_node=cpus_per_node, gpus_per_worker=gpus_per_worker,
        time=time, name=name, options=option or (), setup=setup,
    )  # fmt: skip
    _check_words(words)
    if len(words) == 2 and words[0] == "run":
        from .job_options import open_job

        open_job(words[1])  # a mistake in it is better heard now than when the nodes are there
    if out is None:
        typer.echo(script, nl=False)
    else:
        write_text(out, script)
        typer.echo(f"{out}: submit it with `sbatch {out}`", err=True)
