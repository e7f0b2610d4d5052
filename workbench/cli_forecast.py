"""`workbench forecast`: what each paste of an adapter would do, before any is made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_options import ADAPTER_HELP, MODEL_HELP, PROMPTS_HELP, Device, Dtype, Json, Mismatch, Overwrite
from .cli_values import printed_json, printed_table
from .errors import UserError

if TYPE_CHECKING:
    from .forecast_table import RankedPastes
    from .models import Model


def forecast(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help=f"the donor's {ADAPTER_HELP}")],
    donor_store: Annotated[Path, typer.Argument(metavar="DONOR_STORE", help="profile of the donor")],
    recipient_store: Annotated[
        Path, typer.Argument(metavar="RECIPIENT_STORE", help="profile of the recipient, same prompts")
    ],
    prompts: Annotated[str, typer.Option(help=f"neutral prompts of the behaviour: {PROMPTS_HELP}")],
    opener: Annotated[
        list[str] | None,
        typer.Option(
            help="how an answer that shows it begins; may be given again [whole answers: responses of --prompts]"
        ),
    ] = None,
    unwanted: Annotated[
        str | None, typer.Option("--not", help=f"where the openers are not wanted: {PROMPTS_HELP}")
    ] = None,
    texts: Annotated[str | None, typer.Option(help=f"plain text, for the KL there: {PROMPTS_HELP}")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="converter, such as ridge:0.1, pls:32; may be given again [five ridges]")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="of every paste [what should reach the donor's effect]")
    ] = None,
    max_sigma: Annotated[float, typer.Option(help="longest delta, in standard deviations of the profile")] = 4.0,
    measure: Annotated[int, typer.Option(min=0, help="so many of the first are pasted and measured")] = 0,
    top: Annotated[int, typer.Option(min=1, help="lines that are shown")] = 20,
    limit: Annotated[int | None, typer.Option(min=1, help="of the prompts")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for the first paste, an adapter of the recipient")] = None,
    donor: Annotated[str | None, typer.Option(metavar="MODEL", help=f"[the profile's]: {MODEL_HELP}")] = None,
    recipient: Annotated[str | None, typer.Option(metavar="MODEL", help=f"[the profile's]: {MODEL_HELP}")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    allow_mismatch: Mismatch = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Ranks all pastes of an adapter by what they will do, on and off target.

    One backward pass of the recipient, then a product for each paste: effect on the behaviour in nats with its standard
    error, changes elsewhere, KL on plain text, length of the delta.
    """
    from .adapters.adapter import Adapter
    from .atomic import check_free
    from .convert import ConverterFits
    from .converter_specs import method_pairs
    from .forecast import RIDGES, paste_candidate
    from .forecast_table import rank_pastes
    from .prompts import PromptSet
    from .store import Store

    if unwanted is not None and not opener:
        raise UserError("--not is of openers; give --opener too")
    if out is not None:
        check_free(out, marker="adapter.json", overwrite=overwrite)
    given = Adapter.load(adapter)
    stores = Store.open(donor_store), Store.open(recipient_store)
    methods = method_pairs(method) if method else list(RIDGES)
    fits = ConverterFits(*stores)
    source = _model(donor, stores[0], dtype, device, allow_mismatch)
    target = _model(recipient, stores[1], dtype, device, allow_mismatch)
    given.check(source, allow_mismatch)
    off = {"where not wanted": (PromptSet.load(unwanted, limit=limit), opener or [])} if unwanted else {}
    asked = PromptSet.load(prompts, limit=limit)
    found = rank_pastes(given, fits, source, target, asked, opener or (), off=off, texts=texts, methods=methods,
                        strength=strength, max_sigma=max_sigma, measured=measure)  # fmt: skip
    if out is not None:
        best = found.forecasts[0]
        paste_candidate(given, fits, best.candidate, best.strength).save(out, overwrite=overwrite)
    if as_json:
        return printed_json(_as_json(found, out))
    printed_table(_table(found, top))
    if out is not None:
        typer.echo(f"{out}: {found.forecasts[0].candidate.label()}, strength {found.forecasts[0].strength:.2f}")


def _model(name: str | None, store: Any, dtype: str, device: str, allow_mismatch: bool) -> Model:
    """The model of a profile; UserError where another one is named."""
    from .fingerprint import difference_of
    from .models import load

    model = load(name or store.manifest["model"]["name"], dtype=dtype, device=device)
    difference = difference_of(model.fingerprint, store.fingerprint)
    if difference and not allow_mismatch:
        raise UserError(
            f"{store.path} is not a profile of {model.name}: {difference}; give its model, or --allow-mismatch"
        )
    return model


def _as_json(found: RankedPastes, out: Path | None) -> dict[str, Any]:
    from dataclasses import asdict

    rows = []
    for i, f in enumerate(found.forecasts):
        numbers = {key: value for key, value in asdict(f).items() if key != "candidate"}
        measured = asdict(found.measured[i]) if i < len(found.measured) else None
        rows.append({**f.candidate.as_dict(), **numbers, "measured": measured})
    return {"unit": found.unit, "target": asdict(found.target), "spearman": found.spearman, "seconds": found.seconds,
            "pastes": rows, "adapter": None if out is None else str(out)}  # fmt: skip


def _table(found: RankedPastes, top: int) -> Any:
    from rich.table import Table
    from rich.text import Text

    from .summary import plain

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    table.add_column("paste")
    columns = [
        "strength",
        "effect",
        "± se",
        *(["measured"] if found.measured else []),
        "worst elsewhere",
        "KL",
        "sigma",
    ]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for i, f in enumerate(found.forecasts[:top]):
        m = found.measured[i] if i < len(found.measured) else None
        measured = [f"{m.value:+.2f} [{m.low:+.2f}, {m.high:+.2f}]" if m else ""] if found.measured else []
        table.add_row(Text(f.candidate.label()), f"{f.strength:.2f}", f"{f.on:+.3f}", f"{f.on_se:.3f}", *measured,
                      plain(f.sigma), plain(f.worst_off_rate()) if f.off_rate else "–",
                      plain(f.kl) if found.texts else "–")  # fmt: skip
    aim = f"the donor's own is {found.target.value:+.2f} [{found.target.low:+.2f}, {found.target.high:+.2f}]"
    more = f"; the first {top} of {len(found.forecasts):,}" if len(found.forecasts) > top else ""
    checked = f"; Spearman of forecast and measured {found.spearman:.2f}" if found.spearman is not None else ""
    table.caption = Text(
        f"effect: change of the {found.unit}, in nats; {aim}{checked}{more}.\nworst elsewhere: mean change of a probability; "
        "KL: on plain text, nats; sigma: length of the delta in the profile.", style="dim"
    )  # fmt: skip
    table.caption_justify = "left"
    return table
