"""`workbench profile`: activations of a model, their moments, or what either would cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_engine import Address, CpusPerWorker, EngineName, GpusPerWorker, Workers, engine_of, load_for
from .cli_errors import stops_told
from .cli_options import MODEL_HELP, PROMPTS_HELP, Backend, Device, Dtype, Json, Overwrite
from .cli_values import is_url, own_device, pair_list, part_of, printed_json, site_list
from .errors import UserError


def profile(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    prompts: Annotated[str, typer.Option(help=PROMPTS_HELP)],
    out: Annotated[str, typer.Option(help="folder to make, or a URL (s3://..., gs://...) for a store")],
    sites: Annotated[str | None, typer.Option(help="such as resid_post.4,resid_pre.5 [every resid_post]")] = None,
    layers: Annotated[str | None, typer.Option(help="such as 0,4,8-12 or -1: resid_post of these")] = None,
    tokens: Annotated[
        str, typer.Option(help="last, all, first:n, last:n, every:n, response, assistant, user, spans:KEY")
    ] = "last",
    store_dtype: Annotated[
        str | None, typer.Option(help="of the store: float32, float16, bfloat16, auto [float32]")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    backend: Backend = "hooks",
    batch_tokens: Annotated[int, typer.Option(help="tokens in a forward pass, padding included")] = 8192,
    max_length: Annotated[int | None, typer.Option(help="cut longer prompts [the model's context]")] = None,
    stride: Annotated[int | None, typer.Option(help="run longer prompts as windows, each so many tokens on")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="so many prompts only: the first, or drawn with --seed")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**31 - 1, help="of --limit and --folds")] = None,
    column: Annotated[str | None, typer.Option(help="the column of the prompts file to read")] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--plain", help="texts are user's turns, or as they stand")
    ] = None,
    system: Annotated[str | None, typer.Option(help="a system prompt for every chat")] = None,
    moments: Annotated[
        bool, typer.Option("--moments", help="keep sums and cross products only, no activation")
    ] = False,
    folds: Annotated[int, typer.Option(min=1, help="of --moments: parts of the prompts, each with its own")] = 1,
    pairs: Annotated[str, typer.Option(help="of --moments: products of two sites to keep: all, none, 0:6,1:7")] = "all",
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="keep NaN and Inf, and count them")
    ] = False,
    part: Annotated[
        str | None, typer.Option(metavar="I/N", help="blocks I, I+N, ... alone; env: by RANK or a Slurm task")
    ] = None,
    engine: EngineName = "local",
    address: Address = None,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = None,
    cpus_per_worker: CpusPerWorker = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print rows, bytes, FLOPs and an estimate of the time")
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Keeps a model's activations in a store on disk.

    Stopped with Ctrl-C or killed, the same command goes on where it was. After every --part I/N was run, on any machine
    that sees --out, the same command without --part makes the store of them.
    """
    wanted = site_list(sites, layers)
    if folds > 1 and not moments:
        raise UserError("--folds is of --moments alone; a store can be split by prompt whenever it is read")
    if pairs != "all" and not moments:
        raise UserError("--pairs is of --moments alone; a store keeps the rows themselves")
    if moments and (store_dtype is not None or allow_nonfinite):
        raise UserError(f"{'--allow-nonfinite' if store_dtype is None else '--store-dtype'} is of a store, and --moments "
                        "keeps none; leave one of the two out")  # fmt: skip
    mine = part_of(part)
    if mine is not None and (moments or engine != "local" or is_url(out)):
        raise UserError("--part is of a store in a folder and of the local engine: it leaves spreading to your scheduler; "
                        "leave --moments, --engine and the URL out")  # fmt: skip
    if moments and is_url(out):
        raise UserError(f"--out {out}: moments are written to a folder; give one")
    wanted_pairs, kept, target = pair_list(pairs), store_dtype or "float32", out if is_url(out) else Path(out)
    from .profile.arguments import check_arguments, check_target
    from .store.leftovers import clear_after

    check_arguments(sites=wanted, tokens=tokens, dtype=kept, batch_tokens=batch_tokens)
    try:
        if isinstance(target, Path):
            check_target(target, moments=moments, overwrite=overwrite)
    except UserError as err:
        if not dry_run:
            clear_after(Path(out).expanduser())
            raise
        typer.echo(f"warning: {err}", err=True)  # whatever it costs, it could not be written there
    from .prompts import PromptSet

    read = PromptSet.load(prompts, column=column, limit=limit, seed=seed, chat=chat)
    read = read if system is None else read.with_system(system)
    options: dict[str, Any] = {"sites": wanted, "tokens": tokens, "batch_tokens": batch_tokens, "max_length": max_length,
                               "stride": stride}  # fmt: skip
    with stops_told(), engine_of(
        "local" if dry_run else engine, *([None] * 4 if dry_run else [address, workers, gpus_per_worker, cpus_per_worker])
    ) as opened:  # fmt: skip
        loaded = load_for(opened, model, dtype=dtype, device=own_device(device, part), backend=backend)
        if dry_run:
            from .profile.cost import profile_cost

            of = (
                {"moments": True, "folds": folds, "pairs": wanted_pairs, "dtype": "auto"}
                if moments
                else {"dtype": kept}
            )
            cost = profile_cost(loaded, read, target if isinstance(target, Path) else None, **of, **options)
            return printed_json(cost.as_dict()) if as_json else typer.echo(str(cost))
        if mine is not None:
            made = _part(loaded, read, target, mine, dtype=kept, allow_nonfinite=allow_nonfinite, **options)
        elif moments:
            made = _moments(loaded, read, Path(out), folds=folds, pairs=wanted_pairs, seed=seed or 0, overwrite=overwrite,
                            engine=opened, **options)  # fmt: skip
        else:
            made = _store(loaded, read, target, dtype=kept, allow_nonfinite=allow_nonfinite, overwrite=overwrite,
                          engine=opened, **options)  # fmt: skip
        made |= opened.about()
    if as_json:
        return printed_json(made)
    if mine is not None:
        return typer.echo(f"{out}: part {part} is done, {made['blocks']} blocks; the same without --part ends it")
    typer.echo(f"{out}: {made['rows']} rows at {', '.join(made['sites'])}")


def _part(
    model: Any, prompts: Any, out: Any, part: tuple[int, int], allow_nonfinite: bool, **options: Any
) -> dict[str, Any]:
    from .profile.plan import make_plan
    from .profile.spread import spread_part

    plan = make_plan(model, prompts, **options)
    done = spread_part(model, plan, out, part, allow_nonfinite=allow_nonfinite)
    return {"store": str(out), "part": part[0], "parts": part[1], "blocks": done}


def _store(model: Any, prompts: Any, out: Path | str, **options: Any) -> dict[str, Any]:
    if is_url(out):
        from .profile.spread import profile_to_url

        manifest = profile_to_url(model, prompts, str(out), **options)
        sites, rows = list(manifest["sites"]), manifest["n_rows"]
        found, size = manifest["prompts"]["hash"], sum(shard["bytes"] for shard in manifest["shards"])
    else:
        from .profile import profile_model

        store = profile_model(model, prompts, out, **options)
        sites, rows, found, size = [str(s) for s in store.sites], store.n_rows, store.prompt_hash, store.n_bytes
    return {"store": str(out), "rows": rows, "sites": sites, "prompt_hash": found, "bytes": size}


def _moments(model: Any, prompts: Any, out: Path, **options: Any) -> dict[str, Any]:
    from .profile.sums import profile_moments

    made = profile_moments(model, prompts, out, **options)
    return {"moments": str(out), "rows": sum(m.n for m in made), "sites": made[0].names, "folds": [m.n for m in made]}
