"""`workbench train`: an adapter of a model, from demonstrations of what it should do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_errors import stops_told
from .cli_options import MODEL_HELP, PROMPTS_HELP, Backend, Device, Dtype, Json, Out, Overwrite
from .cli_values import printed_json, site_list
from .errors import UserError


def train(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    demonstrations: Annotated[str, typer.Option(help=f"prompts with a 'response' each: {PROMPTS_HELP}")],
    out: Out,
    kind: Annotated[str, typer.Option(help="nodireft, loreft, direft, vector")] = "nodireft",
    layers: Annotated[str | None, typer.Option(help="such as 4, 0,4,8-12 or -1 [at two thirds of the depth]")] = None,
    sites: Annotated[str | None, typer.Option(help="in place of --layers: resid_post.4,mlp_out.5")] = None,
    positions: Annotated[
        str, typer.Option(help="last, prompt, all, first:n, last:n, generated; several joined by +")
    ] = "last",
    rank: Annotated[int, typer.Option(help="at each site; a vector has 1")] = 4,
    steps: Annotated[int, typer.Option(help="optimiser steps")] = 100,
    batch_size: Annotated[int, typer.Option(help="demonstrations a step")] = 32,
    learning_rate: Annotated[float, typer.Option(help="peak, with states scaled to about 1 a coordinate")] = 1e-2,
    max_size: Annotated[
        float, typer.Option(help="deltas longer than so many spreads of the profile are penalised")
    ] = 0.4,
    profile: Annotated[
        Path | None, typer.Option(help="store with these sites, the scale of everything [of the demonstrations]")
    ] = None,
    validation: Annotated[
        str, typer.Option(help="share of the demonstrations to hold out, such as 0.1, or a file of others; 0 for none")
    ] = "0",
    validate_every: Annotated[int, typer.Option(help="steps from one validation to the next")] = 10,
    patience: Annotated[int | None, typer.Option(help="end after so many validations without a better one")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="of parameters, order and split")] = 0,
    name: Annotated[str, typer.Option(help="of the adapter [that of --out]")] = "",
    dtype: Dtype = "auto",
    device: Device = "auto",
    backend: Backend = "hooks",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Trains an adapter on a model, which stays as it is.

    With --validation the adapter is the one that does best on what is held out; the learning curve is kept in it.
    Stopped with Ctrl-C or killed, the same command goes on where it was.
    """
    where = site_list(sites, layers)
    apart = _share_or_set(validation)
    from .adapters.train import check_target, default_layer, train_into
    from .backends.torch_hooks import check_policy
    from .models import load
    from .prompts import PromptSet
    from .store import Store

    check_policy(positions)
    check_target(out, overwrite=overwrite)
    learnt = PromptSet.load(demonstrations)
    store = None if profile is None else Store.open(profile)
    loaded = load(model, dtype=dtype, device=device, backend=backend)
    with stops_told():
        made = train_into(out, loaded, learnt, where or [default_layer(loaded)], kind=kind, rank=rank, positions=positions,
                          steps=steps, batch_size=batch_size, learning_rate=learning_rate, max_size=max_size,
                          profile=store, validation=apart, validate_every=validate_every, patience=patience, seed=seed,
                          name=name or out.name, overwrite=overwrite)  # fmt: skip
    if as_json:
        return printed_json({"adapter": str(out), "sites": [str(s) for s in made.adapter.sites], "steps": made.steps,
                             "seconds": made.seconds, "curve": made.curve, "validation": made.validation,
                             "best_step": made.best_step})  # fmt: skip
    first, last = made.curve[0], made.curve[-1]
    held = ""
    if made.best_step is not None:
        held = f"; held out {min(loss for _, loss in made.validation):.3f} after step {made.best_step}, which is kept"
    typer.echo(f"{out}: {kind} at {', '.join(map(str, made.adapter.sites))}, {made.steps} steps: loss {first[1]:.3f} -> "
               f"{last[1]:.3f} nats a token{held}")  # fmt: skip


def _share_or_set(text: str) -> Any:
    """What --validation says: a share, or a prompt set.

    >>> _share_or_set("0.1")
    0.1
    """
    try:
        share = float(text)
    except ValueError:
        from .prompts import PromptSet

        return PromptSet.load(text)
    if not 0 <= share < 1:
        raise UserError(f"--validation {text}: a share of the demonstrations is from 0 up to 1; 0.1 is usual")
    return share
