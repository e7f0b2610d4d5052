"""The command line: each verb parses its arguments, calls the function of the same name, and prints what it returned.

Results go to stdout, progress and the log to stderr. Nothing heavy is imported before a verb runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from .cli_adapters import adapters
from .cli_compare import compare
from .cli_convert import convert
from .cli_depth import depth
from .cli_engine import Address, CpusPerWorker, EngineName, GpusPerWorker, Workers, engine_of
from .cli_errors import FLAGS, guarded
from .cli_fold import fold
from .cli_forecast import forecast
from .cli_generate import chat, generate
from .cli_geometry import geometry
from .cli_grade import grade
from .cli_lens import lens
from .cli_options import MODEL_HELP, Device, Dtype, Json, Plugin
from .cli_paste import paste
from .cli_plan import plan
from .cli_probe import probe
from .cli_profile import profile
from .cli_similarity import similarity
from .cli_slurm import slurm
from .cli_stores import stores
from .cli_train import train
from .cli_transport import transport
from .cli_ui import ui
from .cli_values import layer_list
from .cli_values import printed_json as _json
from .cli_values import printed_table as _table
from .errors import UserError

if TYPE_CHECKING:
    from .engines import Engine


class _Group(TyperGroup):
    """The verbs; errors come out as one line, and the global flags may stand anywhere on the line."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        end = given.index("--") if "--" in given else len(given)
        flags = [a for a in given[:end] if a in FLAGS]
        line = flags + [a for a in given[:end] if a not in FLAGS] + given[end:]
        parse = super().main
        sys.exit(guarded(lambda: parse(line, prog_name, complete_var, False, windows_expand_args, **extra), flags))


app = typer.Typer(
    cls=_Group, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None, add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


def main() -> None:
    """The console command."""
    # OpenMP's threads spin while they wait: beside any other busy process that made a run several times as slow
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a sign shows a question mark
    app(prog_name="workbench")


def _version(wanted: bool) -> bool:
    if wanted:
        from . import __version__

        typer.echo(f"workbench {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _global(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress, and only warnings in the log")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="and exit")] = False,
) -> None:
    """Move what one language model does into another, and measure how much arrived. Start with `workbench demo`."""


Seed = Annotated[int | None, typer.Option(help="of everything random, in place of the job's")]
Donor = Annotated[str | None, typer.Option(metavar="MODEL", help=f"donor in place of the job's: {MODEL_HELP}")]
Recipient = Annotated[str | None, typer.Option(metavar="MODEL", help=f"recipient in place of the job's: {MODEL_HELP}")]
SEVERAL = f"recipient in place of the job's; given again, one run for each, with one profile of the donor: {MODEL_HELP}"
Recipients = Annotated[list[str] | None, typer.Option("--recipient", metavar="MODEL", help=SEVERAL)]
Quick = Annotated[bool, typer.Option("--quick", help="fewer prompts: shows that it runs; the numbers mean little")]


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="folder in which the run folder is made [runs]")] = None,
    quick: Quick = False,
    donor: Donor = None,
    recipient: Recipient = None,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Runs the bundled job and prints its result.

    Takes an adapter from the bundled donor to the bundled recipient and measures what arrived beside its controls; the
    path of the report comes last. Run it again to go on after a stop.
    """
    _run(
        "bundled:demo", [recipient] if recipient else [], donor=donor, out=out, seed=seed, quick=quick, as_json=as_json
    )


@app.command()
def run(
    job: Annotated[str, typer.Argument(metavar="JOB", help="job.toml, or bundled:demo")],
    donor: Donor = None,
    recipient: Recipients = None,
    out: Annotated[
        Path | None, typer.Option(help="folder in which the run folder is made, in place of the job's")
    ] = None,
    seed: Seed = None,
    quick: Quick = False,
    plugin: Plugin = None,
    engine: EngineName = "local",
    address: Address = None,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = None,
    cpus_per_worker: CpusPerWorker = None,
    as_json: Json = False,
) -> None:
    """Runs a job file. Steps already done with the same inputs are kept; run it again to go on after a stop.

    With --engine ray, workers make the profiles, answers and log-odds; adapters are trained, forecasts made and converters
    fitted in this process, which loads both models too. The metrics and artefacts are the same.
    """
    if plugin is not None:
        from .evaluate.plugins import load_plugin

        load_plugin(plugin)
    with engine_of(engine, address, workers, gpus_per_worker, cpus_per_worker) as opened:
        _run(job, recipient or [], opened, donor=donor, out=out, seed=seed, quick=quick, as_json=as_json)


def _run(
    source: str, recipients: list[str], engine: Engine | None = None, *, as_json: bool, **changes: Any
) -> None:  # fmt: skip
    from .job_options import open_jobs
    from .jobs import run_job
    from .replicas import noted

    done: list[Path] = []
    for job in open_jobs(source, recipients, **changes):
        done.append(run_job(job, like=done, engine=engine).folder)
        if not as_json:
            _told(done[-1])
    if as_json:
        from .summary import load_metrics

        found = [{**load_metrics(folder), **noted(engine)} for folder in done]
        _json(found[0] if len(recipients) < 2 else found)


def _told(folder: Path) -> None:
    """The result of a run, and where its report is."""
    from .summary import load_metrics, result_table

    metrics = load_metrics(folder)
    _table(result_table(metrics))
    for warning in metrics.get("warnings", []):
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"report: {folder / 'report.html'}")


@app.command()
def job(
    path: Annotated[str | None, typer.Argument(metavar="[JOB]", help="job.toml, or bundled:demo")] = None,
    reference: Annotated[bool, typer.Option("--reference", help="print docs/jobs.md: every key of a job file")] = False,
) -> None:
    """Checks a job file and prints it with its defaults."""
    if reference:
        from .jobs_docs import reference as text

        return typer.echo(text(), nl=False)
    if path is None:
        raise UserError("no job file given; give one to check, or --reference for every key that it may have")
    from .job_options import open_job

    typer.echo(open_job(path).text, nl=False)


app.command()(plan)
app.command()(profile)
app.command()(train)


app.command()(convert)
app.command()(forecast)
app.command()(paste)
app.command()(generate)
app.command()(chat)
app.command()(grade)
app.command()(slurm)
app.command()(compare)


@app.command()
def doctor(
    what: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL | FOLDER]...", help=f"models to prove ({MODEL_HELP}), folders to look through"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Checks this machine, models, and folders of stores, adapters and runs.

    Versions and what they ask of one another, torch's build, devices, memory, disks, the hub; of a model, that it loads
    and that every site is proved; of what lies in a folder, that it is whole, finished and of the model that it names.
    With a model and a store, a few rows are computed again, which tells states in another basis. Exit code 1 where
    something is wrong.
    """
    from dataclasses import asdict

    from .doctor import diagnose

    checks = diagnose(*(what or []))
    if as_json:
        _json([asdict(c) for c in checks])
    else:
        typer.echo("\n".join(map(str, checks)))
    if any(c.status == "FAIL" for c in checks):
        raise typer.Exit(1)


@app.command()
def verify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    layers: Annotated[str | None, typer.Option(help="such as 0,4,8-12 or -1 [all]")] = None,
    backends: Annotated[str, typer.Option(help="which to compare")] = "hooks,nnsight,transformer-lens",
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Compares the backends with the model itself and with one another, layer by layer.

    Shown are the differences in what they read and in what an edit does, the points that each has, and what a pass with
    each costs. Exit code 1 where they disagree by more than the dtype allows: 1e-5 in float32.
    """
    chosen = None if layers is None else layer_list(layers)
    from .verification import verify_backends
    from .verification_table import agreement_table, summary_lines

    names = [name.strip() for name in backends.split(",")]
    found = verify_backends(model, layers=chosen, backends=names, dtype=dtype, device=device)
    if as_json:
        _json(found.to_dict())
    else:
        _table(agreement_table(found))
        typer.echo("\n".join(summary_lines(found)))
    if not found.agrees:
        raise typer.Exit(1)


app.command()(transport)
app.command()(lens)
app.command()(probe)
app.command()(similarity)
app.command()(geometry)
app.command()(depth)
app.command()(fold)
app.command()(ui)
app.add_typer(stores, name="stores")
app.add_typer(adapters, name="adapters")
