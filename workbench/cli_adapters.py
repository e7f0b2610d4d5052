"""`workbench adapters`: what an adapter is, in whatever format, and writing it in one that others read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import ADAPTER_HELP, Json, Overwrite
from .cli_values import printed_json, printed_table

adapters = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Show adapters of any format, and export them.",
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip

AdapterPath = Annotated[Path, typer.Argument(metavar="ADAPTER", help=ADAPTER_HELP)]
Where = Annotated[
    str | None, typer.Option(help="where a vector acts, such as resid_post.13, if its file does not say it")
]
Positions = Annotated[str | None, typer.Option(help="such as last, all, first:3, in place of the file's")]


@adapters.command()
def show(adapter: AdapterPath, site: Where = None, positions: Positions = None, as_json: Json = False) -> None:
    """Shows where an adapter acts, on what positions, how hard, and of which model it is."""
    from .adapters.adapter import Adapter
    from .adapters.views import adapter_lines, adapter_rows, adapter_table

    found = Adapter.load(adapter, site=site, positions=positions)
    if as_json:
        said: dict[str, Any] = {"name": found.name, "base": dict(found.base), "strength": found.strength}
        return printed_json({**said, "hash": found.hash, "parts": adapter_rows(found)})
    printed_table(adapter_table(found))
    typer.echo("\n".join(adapter_lines(found)))


@adapters.command()
def export(
    adapter: AdapterPath,
    to: Annotated[str, typer.Option(help="pyreft (a folder), gguf or safetensors (a file, of a constant alone)")],
    out: Annotated[Path, typer.Option(help="folder or file to make")],
    site: Where = None,
    positions: Positions = None,
    any_positions: Annotated[
        bool, typer.Option("--any-positions", help="a control vector acts everywhere: write it all the same")
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Writes an adapter in a format that other programs read."""
    from .adapters.adapter import Adapter
    from .adapters.formats import export_adapter

    found = Adapter.load(adapter, site=site, positions=positions)
    made = export_adapter(found, out, to=to, any_positions=any_positions, overwrite=overwrite)
    if as_json:
        return printed_json({"out": str(made), "to": to})
    typer.echo(f"{made}: {to}")
