"""`workbench paste`: a donor's adapter as one of the recipient."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_options import ADAPTER_HELP, MODEL_HELP, PROMPTS_HELP, Json, Mismatch, Out, Overwrite
from .cli_values import printed_json
from .errors import UserError


def paste(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help=f"the donor's {ADAPTER_HELP}")],
    converters: Annotated[Path, typer.Argument(metavar="CONVERTERS", help="folder that `workbench convert` made")],
    out: Out,
    strength: Annotated[float, typer.Option(help="factor on the adapter's own")] = 1.0,
    storage: Annotated[str | None, typer.Option(help="int8: a quarter of the size, loaded as float32")] = None,
    prompts: Annotated[
        str | None, typer.Option(help=f"to try the adapter on its donor first, with a warning: {PROMPTS_HELP}")
    ] = None,
    opener: Annotated[
        list[str] | None, typer.Option(help="how an answer that shows the behaviour begins; may be given again")
    ] = None,
    donor: Annotated[
        str | None, typer.Option(metavar="MODEL", help=f"for --prompts [the adapter's own]: {MODEL_HELP}")
    ] = None,
    allow_mismatch: Mismatch = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Rewrites a donor's adapter for the recipient.

    Warns of an adapter that changes nothing; with --prompts, also of one that does nothing to its own donor there.
    """
    if prompts is None and (opener or donor is not None):
        raise UserError(
            "--opener and --donor are of --prompts, on which the adapter is tried on its donor; give them too"
        )
    from .adapters.adapter import Adapter
    from .converter_files import load_converters
    from .evaluate.idleness import idle_on_donor, silent

    given, carried = Adapter.load(adapter), load_converters(converters)
    made = carried.paste(given, strength=strength, allow_mismatch=allow_mismatch)
    said = silent(given)
    if said is None and prompts is not None:
        name = donor or given.base.get("name") or carried.donor.get("name")
        said = idle_on_donor(name, given, prompts, opener or (), allow_mismatch=allow_mismatch)
    if said is not None:
        typer.echo(f"warning: {said}", err=True)
    made.save(out, overwrite=overwrite, storage=storage)
    if as_json:
        return printed_json({"adapter": str(out), "sites": [str(s) for s in made.sites], "rank": made.rank,
                             "width": made.width, "strength": made.strength,
                             "warnings": [] if said is None else [said]})  # fmt: skip
    sites = ", ".join(map(str, made.sites))
    typer.echo(
        f"{out}: rank {made.rank} at {sites}, for {made.base.get('name', 'the recipient')} of width {made.width}"
    )
