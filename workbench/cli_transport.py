"""`workbench transport`: how linearly a model carries its layers on, as a run folder with a report.

It is the one verb that asks questions of fitted maps, and so the one that reaches up into the probes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_engine import Address, CpusPerWorker, EngineName, GpusPerWorker, Workers, engine_of
from .cli_errors import stops_told
from .cli_options import MODEL_HELP, PROMPTS_HELP, Backend, Device, Dtype, Json
from .cli_values import alpha_value, names_of, printed_json, printed_table, site_list
from .errors import UserError


def transport(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    prompts: Annotated[str, typer.Option(help=PROMPTS_HELP)],
    out: Annotated[Path, typer.Option(help="run folder to make, or to go on with")],
    layers: Annotated[str | None, typer.Option(help="such as 0,4,8-12 or -1: resid_post of these [all]")] = None,
    sites: Annotated[str | None, typer.Option(help="such as resid_pre.0,resid_post.4, in place of --layers")] = None,
    pairs: Annotated[
        str, typer.Option(help="such as 3:5,resid_pre.1:4: these alone, in place of all of some sites")
    ] = "",
    tokens: Annotated[str, typer.Option(help="last, all, first:n, last:n, every:n, response, assistant, user")] = "all",
    positions: Annotated[
        str, typer.Option(help="where a row starts from: same, previous, random, shuffled, attention")
    ] = "same",
    alpha: Annotated[str, typer.Option(help="cv (folds of prompts), gcv, or a number in mean diagonals of X'X")] = "cv",
    folds: Annotated[int, typer.Option(min=2, help="parts of the training prompts")] = 5,
    shards: Annotated[int, typer.Option(min=2, help="parts of the held-out prompts: intervals come from these")] = 10,
    holdout: Annotated[float, typer.Option(help="share of the prompts that no map sees")] = 0.25,
    dictionary: Annotated[
        list[str] | None, typer.Option(help="sparse autoencoder at a target: folder, file or bundled:NAME; repeatable")
    ] = None,
    text: Annotated[str, typer.Option(help="prompts of the causal figures [the held-out ones of --prompts]")] = "",
    causal: Annotated[
        str,
        typer.Option(
            help="pairs of causal figures and shortcuts: all, neighbours, none, 3:5,0:4; auto: all of up to 28"
        ),
    ] = "auto",
    keep_maps: Annotated[
        str, typer.Option(help="operators left on disk: needed (by causal figures and features), or all")
    ] = "needed",
    grid_only: Annotated[bool, typer.Option("--grid-only", help="no efficiency, features or causal figures")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="so many prompts only, drawn with --seed")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="of the split, the draws and --limit")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print pairs, disk, passes and FLOPs, run nothing")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    backend: Backend = "hooks",
    engine: EngineName = "local",
    address: Address = None,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = None,
    cpus_per_worker: CpusPerWorker = None,
    as_json: Json = False,
) -> None:
    """Fits and scores linear maps between all pairs of a model's layers, and writes a report.

    Held-out R2 beside baselines and a shuffled control; then, of those maps, their efficiency by rank, the features
    that they carry (where there is a dictionary), and what they are worth to the model. With --engine ray, workers run the
    prompts of the grid; its sums and fits, the features and the causal figures are made in this process.
    """
    named = site_list(sites, layers)
    if pairs and named is not None:
        raise UserError("both --pairs and --sites or --layers were given; give one of them")
    strength: Any = "gcv" if alpha == "gcv" else alpha_value(alpha)
    from probes.transport_choice import transport_cost
    from probes.transport_job import TransportJob
    from probes.transport_run import run_transport

    from .models import load
    from .prompts import PromptSet
    from .replicas import noted, spread_over
    from .transport.positions import check_positions

    check_positions(positions)
    if not 0 < holdout < 1:
        raise UserError(f"--holdout is a share of the prompts between 0 and 1; got {holdout:g}")
    read = PromptSet.load(prompts, limit=limit, seed=seed if limit is not None else None)
    loaded = load(model, dtype=dtype, device=device, backend=backend)
    chosen = () if named is None else tuple(str(loaded.site(s)) for s in named)
    job = TransportJob(
        loaded.name, prompts, chosen, tokens, positions, strength, folds, shards, holdout, seed,
        tuple(name for given in dictionary or [] for name in names_of(given)), text,
        grid_only=grid_only, pairs=tuple(names_of(pairs)) if pairs else (), causal=causal, keep_maps=keep_maps,
    )  # fmt: skip
    if dry_run:
        cost = transport_cost(loaded, read, out, job)
        return printed_json(cost.as_dict()) if as_json else typer.echo(str(cost))
    with engine_of(engine, address, workers, gpus_per_worker, cpus_per_worker) as opened, spread_over(opened, loaded):
        with stops_told():
            run = run_transport(loaded, read, out, job)
    metrics = json.loads((run.folder / "metrics.json").read_text(encoding="utf-8"))
    if as_json:
        return printed_json({**metrics, **noted(opened)})
    printed_table(_table(metrics))
    for warning in metrics["warnings"]:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"report: {run.folder / 'report.html'}")


def _table(metrics: dict[str, Any]) -> Any:
    """Pairs down, arms across, without BOS; with BOS the operator alone."""
    from rich.table import Table

    lines = metrics["grid"]["lines"]
    arms = list(dict.fromkeys(line["arm"] for line in lines))
    bos = any(line["bos"] for line in lines)
    table = Table(title="held-out R2, mean over dimensions, with 95 % intervals", title_justify="left")
    for name in ("source", "target", *arms, *(["ridge with BOS"] if bos else [])):
        table.add_column(name, justify="left" if name in ("source", "target") else "right")
    cells: dict[tuple[str, str], dict[tuple[str, bool], str]] = {}
    for line in lines:
        low, high = line["r2_uniform_low"], line["r2_uniform_high"]
        text = "" if line["r2_uniform"] is None else f"{line['r2_uniform']:.4f}"
        if line["arm"] in ("ridge", "shuffled") and low is not None and high is not None:
            text += f" ({low:.4f} to {high:.4f})"
        cells.setdefault((line["source"], line["target"]), {})[line["arm"], line["bos"]] = text
    for (a, b), found in cells.items():
        row = [found.get((arm, False), "") for arm in arms]
        table.add_row(a, b, *row, *([found.get(("ridge", True), "")] if bos else []))
    return table
