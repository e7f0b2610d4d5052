"""`workbench plan`: what a job, a profile or a transport would cost, before anything is loaded."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .cli_options import MODEL_HELP, PROMPTS_HELP, Json
from .cli_values import pair_list, printed_json, site_list
from .errors import UserError


def plan(
    job: Annotated[str | None, typer.Argument(metavar="[JOB]", help="job.toml, or bundled:demo")] = None,
    model: Annotated[
        str | None, typer.Option(help=f"in place of a job, a profile or transport of: {MODEL_HELP}")
    ] = None,
    prompts: Annotated[str | None, typer.Option(help=f"of --model, which are counted: {PROMPTS_HELP}")] = None,
    tokens: Annotated[
        float | None, typer.Option(help="how many in all, such as 1e8, whatever the prompts have")
    ] = None,
    length: Annotated[int, typer.Option(min=1, help="tokens of a text where there are no prompts")] = 512,
    keep: Annotated[
        str | None, typer.Option(help="rows of --model, as profile's --tokens: last, all, every:n, ... [last]")
    ] = None,
    sites: Annotated[str | None, typer.Option(help="such as resid_post.4,resid_pre.5 [every resid_post]")] = None,
    layers: Annotated[str | None, typer.Option(help="such as 0,4,8-12 or -1: resid_post of these")] = None,
    store_dtype: Annotated[str, typer.Option(help="of the store: float32, float16, bfloat16, auto")] = "float32",
    dtype: Annotated[str, typer.Option(help="that --model runs in: auto, float32, float16, bfloat16")] = "auto",
    batch_tokens: Annotated[int, typer.Option(min=1, help="tokens in a forward pass")] = 8192,
    moments: Annotated[bool, typer.Option("--moments", help="sums and products only, in place of a store")] = False,
    transport: Annotated[bool, typer.Option("--transport", help="a transport between all pairs of sites")] = False,
    folds: Annotated[int | None, typer.Option(min=1, help="of --moments [1] and --transport [5]")] = None,
    pairs: Annotated[str, typer.Option(help="of --moments: products of two sites to keep: all, none, 0:6,1:7")] = "all",
    gpu: Annotated[str | None, typer.Option(help="data sheet to plan with: A100, H100, H200 [this machine]")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="how many, each with a replica of the model")] = 1,
    tflops: Annotated[float | None, typer.Option(help="TFLOP/s in bfloat16; other dtypes in proportion")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="GB/s of a device's memory")] = None,
    memory: Annotated[float | None, typer.Option(help="GB of a device's memory")] = None,
    disk_rate: Annotated[float | None, typer.Option(help="GB/s written to disk")] = None,
    reached: Annotated[
        float | None, typer.Option(help="share of the matrix rate that is reached [0.4 of a data sheet]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Prints what every step would cost: rows, tokens, FLOPs, bytes on disk, memory, and time on a machine.

    Read are configurations, tokenizers and prompts, no weights. Without --gpu this machine is measured, which takes a second
    or two.
    """
    if (job is None) == (model is None):
        raise UserError("nothing to plan: give a job file, or --model with --prompts or --tokens"
                        if job is None else "both a job and --model were given; give one of them")  # fmt: skip
    chosen = site_list(sites, layers)
    _check_of(job, transport, moments, pairs, prompts, keep, chosen, folds)
    from .work.rates import measured, preset

    rates = (preset(gpu) if gpu is not None else measured()).changed(tflops, bandwidth, disk_rate, memory, reached)
    made = _of_job(job, rates, gpus, tokens) if job is not None else _of_model(
        str(model), prompts, transport, moments, pairs, tokens=tokens, length=length, keep=keep, sites=chosen, dtype=dtype,
        store_dtype=store_dtype, batch_tokens=batch_tokens, folds=folds, rates=rates, gpus=gpus)  # fmt: skip
    if as_json:
        return printed_json(made.as_dict())
    typer.echo(str(made))
    for warning in made.warnings:
        typer.echo(f"warning: {warning}", err=True)


def _check_of(job: str | None, transport: bool, moments: bool, pairs: str, *of_model: Any) -> None:
    """UserError for options of something else than what is planned."""
    if job is not None and (transport or moments or pairs != "all" or any(x is not None for x in of_model)):
        raise UserError("a job file says itself what is profiled and kept; plan it with --tokens and the machine's options "
                        "alone, or give --model in its place")  # fmt: skip
    if transport and (moments or pairs != "all"):
        raise UserError("--moments and --pairs are of a profile; --transport is between all pairs of its sites")
    if pairs != "all" and not moments:
        raise UserError("--pairs is of --moments alone; a store keeps the rows themselves")


def _of_job(job: str, rates: Any, gpus: int, tokens: float | None) -> Any:
    from .planning import plan_job

    return plan_job(job, rates=rates, gpus=gpus, tokens=tokens)


def _of_model(
    model: str, prompts: str | None, transport: bool, moments: bool, pairs: str, *, keep: str | None, folds: int | None,
    store_dtype: str, **options: Any,
) -> Any:  # fmt: skip
    from .planning import plan_profile, plan_transport

    if transport:
        return plan_transport(model, prompts, policy=keep or "all", folds=folds or 5, **options)
    return plan_profile(model, prompts, policy=keep or "last", moments=moments, folds=folds or 1, pairs=pair_list(pairs),
                        store_dtype=store_dtype, **options)  # fmt: skip
