"""`workbench profile`: activations of a model, their moments, or what either would cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_errors import stops_told
from .cli_options import MODEL_HELP, PROMPTS_HELP, Backend, Device, Dtype, Json, Out, Overwrite
from .cli_values import pair_list, printed_json, site_list
from .errors import UserError


def profile(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    prompts: Annotated[str, typer.Option(help=PROMPTS_HELP)],
    out: Out,
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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print rows, bytes and an estimate of the time")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Keeps a model's activations in a store on disk.

    Stopped with Ctrl-C or killed, the same command goes on where it was.
    """
    wanted = site_list(sites, layers)
    if folds > 1 and not moments:
        raise UserError("--folds is of --moments alone; a store can be split by prompt whenever it is read")
    if pairs != "all" and not moments:
        raise UserError("--pairs is of --moments alone; a store keeps the rows themselves")
    if moments and (store_dtype is not None or allow_nonfinite):
        raise UserError(f"{'--allow-nonfinite' if store_dtype is None else '--store-dtype'} is of a store, and --moments "
                        "keeps none; leave one of the two out")  # fmt: skip
    wanted_pairs, kept = pair_list(pairs), store_dtype or "float32"
    from .profile.arguments import check_arguments, check_target

    check_arguments(sites=wanted, tokens=tokens, dtype=kept, batch_tokens=batch_tokens)
    try:
        check_target(out, moments=moments, overwrite=overwrite)
    except UserError as err:
        if not dry_run:
            raise
        typer.echo(f"warning: {err}", err=True)  # whatever it costs, it could not be written there
    from .models import load
    from .prompts import PromptSet

    read = PromptSet.load(prompts, column=column, limit=limit, seed=seed, chat=chat)
    read = read if system is None else read.with_system(system)
    options: dict[str, Any] = {"sites": wanted, "tokens": tokens, "batch_tokens": batch_tokens, "max_length": max_length,
                               "stride": stride}  # fmt: skip
    loaded = load(model, dtype=dtype, device=device, backend=backend)
    if dry_run:
        from .profile.cost import profile_cost

        of = {"moments": True, "folds": folds, "pairs": wanted_pairs, "dtype": "auto"} if moments else {"dtype": kept}
        cost = profile_cost(loaded, read, out, **of, **options)
        return printed_json(cost.as_dict()) if as_json else typer.echo(str(cost))
    with stops_told():
        if moments:
            made = _moments(loaded, read, out, folds=folds, pairs=wanted_pairs, seed=seed or 0, overwrite=overwrite,
                            **options)  # fmt: skip
        else:
            made = _store(loaded, read, out, dtype=kept, allow_nonfinite=allow_nonfinite, overwrite=overwrite,
                          **options)  # fmt: skip
    if as_json:
        return printed_json(made)
    typer.echo(f"{out}: {made['rows']} rows at {', '.join(made['sites'])}")


def _store(*args: Any, **options: Any) -> dict[str, Any]:
    from .profile import profile_model

    store = profile_model(*args, **options)
    return {"store": str(store.path), "rows": store.n_rows, "sites": [str(s) for s in store.sites],
            "prompt_hash": store.prompt_hash, "bytes": store.n_bytes}  # fmt: skip


def _moments(model: Any, prompts: Any, out: Path, **options: Any) -> dict[str, Any]:
    from .profile.sums import profile_moments

    made = profile_moments(model, prompts, out, **options)
    return {"moments": str(out), "rows": sum(m.n for m in made), "sites": made[0].names, "folds": [m.n for m in made]}
