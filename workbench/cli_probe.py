"""`workbench probe`: what stored activations say of a label, layer by layer, beside controls that can know nothing of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import Json, Overwrite
from .cli_values import names_of, printed_json, printed_table, site_list
from .errors import UserError

KINDS_HELP = "logistic, ridge, mass_mean, mass_mean_cov, sparse"
POSITIONS_HELP = "all, last, first, first:n, last:n, every:n, -1; several with commas"


def probe(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="profile that `workbench profile` made")],
    label: Annotated[
        str, typer.Option(help="column of its prompts or rows, or text:WORD,WORD for tokens that are one of these")
    ],
    out: Annotated[Path | None, typer.Option(help="run folder to make [nothing is written]")] = None,
    kind: Annotated[str, typer.Option(help=KINDS_HELP)] = "logistic",
    layers: Annotated[str | None, typer.Option(help="such as 0,4,8-12 or -1: resid_post of these [all]")] = None,
    sites: Annotated[str | None, typer.Option(help="such as resid_pre.0,resid_post.4, in place of --layers")] = None,
    positions: Annotated[str, typer.Option(help=POSITIONS_HELP)] = "all",
    classes: Annotated[str, typer.Option(help="these alone, with commas; one stands against all others [all]")] = "",
    quantity: Annotated[bool, typer.Option("--quantity", help="the label is a number to be predicted")] = False,
    groups: Annotated[str, typer.Option(help="column of what must not be split [the prompt]")] = "",
    towards: Annotated[str, typer.Option(help="a class: directions to it, and an eraser of the label, too")] = "",
    penalty: Annotated[float | None, typer.Option(help="in units of the mean loss [by kind]")] = None,
    holdout: Annotated[float, typer.Option(help="share of the prompts that no probe sees")] = 0.25,
    max_rows: Annotated[int, typer.Option(min=8, help="rows looked at; of more, so many are drawn")] = 20_000,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="of the split and the draws")] = 0,
    no_controls: Annotated[bool, typer.Option("--no-controls", help="no control task, shuffled labels, words")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N")] = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Trains linear probes of a label on stored activations.

    Accuracy, AUROC and calibration on prompts that no probe has seen, beside a control task, shuffled labels and the words
    alone; with --out a run folder with the probes, a table and a report.
    """
    named = site_list(sites, layers)
    if penalty is not None and not penalty >= 0:
        raise UserError(f"--penalty {penalty:g} is out of range: a number of 0 or more is needed; 0.01 is usual")
    from probes.probe_run import ProbeJob, run_probe

    job = ProbeJob(
        str(store.expanduser().resolve()), label, kind, tuple(names_of(positions)), tuple(map(str, named or ())),
        tuple(names_of(classes)) if classes else (), quantity, groups, penalty, holdout, max_rows, seed, not no_controls,
        towards, "" if device == "auto" else device,
    )  # fmt: skip
    run = run_probe(job, out, overwrite=overwrite)
    if as_json:
        return printed_json(run.metrics)
    printed_table(_table(run.metrics))
    for name, found in run.metrics["words"].items():
        value = found[str(run.metrics["score"])]
        typer.echo(f"words or tokens alone, positions {name}: {value:.3f}")
    if run.erasure is not None:
        typer.echo(str(run.erasure))
    for warning in run.metrics["warnings"]:
        typer.echo(f"warning: {warning}", err=True)
    if run.folder is not None:
        typer.echo(f"report: {run.folder / 'report.html'}")


def _table(metrics: Mapping[str, Any]) -> Any:
    """Sites down; the figures with their intervals across."""
    from rich.table import Table
    from rich.text import Text

    score = str(metrics["score"])
    figures = [score, *(["auroc"] if score == "accuracy" else []), "control", "shuffled", "selectivity"]
    found = [f for f in figures if any(line.get(f) is not None for line in metrics["lines"])]
    title = f"{metrics['kind']} probes of {metrics['label']}: held-out prompts, with 95 % intervals"
    table = Table(title=Text(title), title_justify="left")
    for name in ("site", "positions", *found, "chance", "rows"):
        table.add_column(name, justify="left" if name in ("site", "positions") else "right")
    for line in metrics["lines"]:
        cells = [_cell(line, name) for name in found]
        table.add_row(line["site"], line["positions"], *cells, f"{line['chance']:.3f}", f"{line['n_held_out']:,}")
    return table


def _cell(line: Mapping[str, Any], name: str) -> str:
    value, low, high = (line.get(f"{name}{end}") for end in ("", "_low", "_high"))
    if value is None or low is None or high is None:
        return ""
    return f"{value:.3f} ({low:.3f} to {high:.3f})"
