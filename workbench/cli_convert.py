"""`workbench convert`: converters between two models, from their profiles, which are made where there are none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_engine import Address, CpusPerWorker, EngineName, GpusPerWorker, Workers, engine_of, load_for
from .cli_errors import stops_told
from .cli_options import PROMPTS_HELP, Device, Dtype, Json, Out, Overwrite
from .cli_values import alpha_value, layer_list, printed_json, printed_table
from .errors import UserError

if TYPE_CHECKING:
    from .engines import Engine
    from .store import Store


def convert(
    donor: Annotated[str, typer.Argument(metavar="DONOR", help="its profile; with --prompts a model")],
    recipient: Annotated[
        str, typer.Argument(metavar="RECIPIENT", help="its profile, same prompts; with --prompts a model")
    ],
    out: Out,
    donor_layers: Annotated[str | None, typer.Option(help="such as 0,4,8-12 [all of its profile]")] = None,
    match: Annotated[
        str, typer.Option(help="which recipient layer answers: nearest, floor, ends, cka, svcca, r2")
    ] = "nearest",
    method: Annotated[
        str, typer.Option(help="ridge, ridge:cv, pinv as published, procrustes, rrr:16, pls:32, whitened, cycle:1")
    ] = "ridge",
    alpha: Annotated[str, typer.Option(help="ridge strength in units of the mean diagonal of X'X, or cv")] = "0.1",
    pairing: Annotated[
        str, typer.Option(help="rows that answer one another: last, or aligned (of all tokens)")
    ] = "last",
    holdout: Annotated[float, typer.Option(help="share of prompts kept for the quality figures")] = 0.2,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="of the split")] = 0,
    prompts: Annotated[str | None, typer.Option(help=f"profile two models on these first: {PROMPTS_HELP}")] = None,
    profiles: Annotated[Path | None, typer.Option(help="folder in which these profiles are kept [not kept]")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    engine: EngineName = "local",
    address: Address = None,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = None,
    cpus_per_worker: CpusPerWorker = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Fits converters between two profiles.

    Prints how well each map fits prompts that it was not fitted on, beside two baselines. With --prompts both models are
    profiled first; an engine spreads that, and the fits are made here.
    """
    layers = None if donor_layers is None else layer_list(donor_layers)
    strength = alpha_value(alpha)
    from .converter_files import fit_set, quality_rows, save_converters
    from .replicas import noted

    if prompts is None:
        _check_alone(profiles, engine)
    with engine_of(engine, address, workers, gpus_per_worker, cpus_per_worker) as opened:
        if prompts is None:
            stores = [_verified(path) for path in (donor, recipient)]
        else:
            tokens = "last" if pairing == "last" else "all"
            stores = [_profiled(opened, name, prompts, profiles and profiles / side, tokens=tokens, dtype=dtype, device=device)
                      for side, name in (("donor", donor), ("recipient", recipient))]  # fmt: skip
    made = fit_set(*stores, layers=layers, match=match, method=method, alpha=strength,
                   holdout=holdout, seed=seed, pairing=pairing)  # fmt: skip
    save_converters(made, out, overwrite=overwrite)
    rows = quality_rows(made)
    if as_json:
        return printed_json({"converters": str(out), "maps": rows, **noted(opened)})
    from .converter_table import quality_table

    printed_table(quality_table(rows))
    for warning in sorted({row["warning"] for row in rows if row["warning"]}):
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"{out}: {len(made)} converters")


def _check_alone(profiles: Path | None, engine: str) -> None:
    lonely = "--profiles" if profiles is not None else "--engine" if engine != "local" else None
    if lonely is not None:
        raise UserError(f"{lonely} is of --prompts, with which both models are profiled first; give that too, or leave "
                        f"{lonely} out: two profiles are only read")  # fmt: skip


def _verified(path: str) -> Store:
    from .store import Store

    store = Store.open(path)
    store.verify()  # every row is read for the fit anyway
    return store


def _profiled(
    engine: Engine, name: str, prompts: str, out: Path | None, *, tokens: str, **options: Any
) -> Store:  # fmt: skip
    """The profile of a model on prompts; `name` may also be of one that is there already."""
    from .profile import profile_model
    from .store.checks import MANIFEST

    if (Path(name).expanduser() / MANIFEST).exists():
        return _verified(name)
    with stops_told():
        return profile_model(load_for(engine, name, **options), prompts, out, tokens=tokens, engine=engine)
