"""`workbench geometry`: the parts of what each block writes, what they are worth, and blocks that run side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_errors import stops_told
from .cli_options import MODEL_HELP, PROMPTS_HELP, Backend, Device, Dtype, Json, Overwrite
from .cli_values import layer_list, printed_json, printed_table


def geometry(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    prompts: Annotated[str, typer.Option(help=PROMPTS_HELP)],
    out: Annotated[Path | None, typer.Option(help="run folder to make [nothing is written]")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="so many prompts only, drawn with --seed")] = None,
    layers: Annotated[
        str | None, typer.Option(help="whose writes are taken apart, such as 0,4,8-12 or -1 [all]")
    ] = None,
    lengths: Annotated[str | None, typer.Option(help="of runs of blocks, such as 1-4,8 [up to 8 blocks all]")] = None,
    positions: Annotated[str, typer.Option(help="where parts are taken away: all, last, first:n, all+special")] = "all",
    max_length: Annotated[int | None, typer.Option(min=2, help="tokens of each prompt that are read")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="sequences in one pass")] = 16,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="of --limit and of the random directions")] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    backend: Backend = "hooks",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Takes what each block writes apart, and runs blocks side by side.

    What removing the part along the residual stream costs, and the rest, in nats per token; and the loss where runs of blocks
    all read one state, or one a block old. With --out a run folder with tables and a report.
    """
    chosen = None if layers is None else layer_list(layers)
    wanted = None if lengths is None else layer_list(lengths)
    from probes.geometry_run import MARKER, GeometryJob, run_geometry

    from .atomic import check_free
    from .models import load
    from .prompts import PromptSet

    if out is not None:
        check_free(out, marker=MARKER, overwrite=overwrite)
    read = PromptSet.load(prompts, limit=limit, seed=seed if limit is not None else None)
    held = load(model, dtype=dtype, device=device, backend=backend)
    job = GeometryJob(
        model, prompts, limit, tuple(chosen or ()), tuple(wanted or ()), positions, max_length, batch_size, seed
    )
    with stops_told():
        run = run_geometry(held, read, job, out, overwrite=overwrite)
    if as_json:
        return printed_json(run.metrics)
    printed_table(_costs(run.metrics))
    printed_table(_lengths(run.metrics))
    for warning in run.metrics["warnings"]:
        typer.echo(f"warning: {warning}", err=True)
    if run.folder is not None:
        typer.echo(f"report: {run.folder / 'report.html'}")


def _costs(metrics: Mapping[str, Any]) -> Any:
    """Layers and writes down; the parts across."""
    from rich.table import Table

    table = Table(
        title="rise of the loss without a part of a write, nats per token, with 95 % intervals", title_justify="left"
    )
    parts = ("parallel", "orthogonal", "control")
    for name in ("layer", "write", *parts):
        table.add_column(name, justify="left" if name == "write" else "right")
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for line in metrics["costs"]:
        found.setdefault((line["layer"], line["write"]), {})[line["part"]] = line
    for (layer, write), by_part in found.items():
        table.add_row(str(layer), write, *(_cell(by_part[part], "delta") for part in parts))
    return table


def _lengths(metrics: Mapping[str, Any]) -> Any:
    from rich.table import Table

    title = "rise of the loss where a run of blocks reads one state (parallel), one a block old (stale), or is skipped"
    table = Table(title=title, title_justify="left")
    for name in ("run", "blocks", "places", "mean over places", "more than the next shorter, from the same block"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for line in metrics["lengths"]:
        table.add_row(
            line["kind"], str(line["length"]), str(line["places"]), _cell(line, "delta"), _cell(line, "growth")
        )
    return table


def _cell(line: Mapping[str, Any], key: str) -> str:
    if line[key] is None:
        return ""
    return f"{line[key]:+.4f} ({line[f'{key}_low']:+.4f} to {line[f'{key}_high']:+.4f})"
