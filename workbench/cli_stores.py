"""`workbench stores`: what stores there are, whether they are whole, and what else can be made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import Json, Out, Overwrite
from .cli_values import names_of, printed_json, printed_table
from .errors import UserError

stores = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="List, check, mend, merge, export and import stores.",
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip

Folder = Annotated[Path, typer.Argument(metavar="[FOLDER]", help="folder that holds stores, however deep")]
StorePath = Annotated[Path, typer.Argument(metavar="STORE", help="folder that `workbench profile` made")]
Yes = Annotated[bool, typer.Option("--yes", help="do remove; without it, only say what would be")]
NOT_WHOLE = 1  # exit code where something is wrong with a store


@stores.command("ls")
def list_stores(folder: Folder = Path("."), as_json: Json = False) -> None:
    """Lists the stores below a folder, also unfinished and damaged ones."""
    from dataclasses import asdict

    from .store.listing import find_stores

    found = find_stores(folder)
    if as_json:
        return printed_json([{**asdict(one), "path": str(one.path)} for one in found])
    if not found:
        return typer.echo(f"{folder}: no stores; make one with `workbench profile`")
    from .store.views import stores_table

    printed_table(stores_table(found, folder))
    for one in found:
        if one.state != "whole":
            typer.echo(f"{one.state}: {one.path}: {one.note}")


@stores.command()
def show(
    store: StorePath,
    prompt: Annotated[int | None, typer.Option(min=0, help="the rows of this prompt (its index)")] = None,
    rows: Annotated[int, typer.Option(min=0, help="the most rows to show")] = 5,
    as_json: Json = False,
) -> None:
    """Shows what a store holds, and its first rows or those of a prompt."""
    from .store.listing import describe_store

    shown = describe_store(store, prompt=prompt, rows=rows)
    if as_json:
        return printed_json(shown)
    from .store.views import row_lines, store_lines

    typer.echo("\n".join([*store_lines(shown), *row_lines(shown)]))


@stores.command()
def verify(
    store: Annotated[list[Path], typer.Argument(metavar="STORE...", help="folders that `workbench profile` made")],
    as_json: Json = False,
) -> None:
    """Recomputes every checksum. Exit code 1 where a store is not whole."""
    from .store.checkup import find_damage

    found = []
    for path in store:
        found.append(find_damage(path))
        if not as_json:
            typer.echo(f"{path}: whole" if not found[-1] else str(found[-1]))
    if as_json:
        printed_json([
            {"store": str(one.path), "whole": not one, "damaged": one.damaged, "missing": one.missing,
             "foreign": one.foreign, "unreadable": one.unreadable} for one in found
        ])  # fmt: skip
    if any(found):
        raise typer.Exit(NOT_WHOLE)


@stores.command()
def repair(
    store: StorePath,
    model: Annotated[str | None, typer.Option(help="the model that was profiled, to compute what is damaged")] = None,
    prompts: Annotated[str | None, typer.Option(help="the prompts, where prompts.parquet is damaged")] = None,
    dtype: Annotated[str, typer.Option(help="to run in: auto, float32, float16, bfloat16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N")] = "auto",
    yes: Annotated[bool, typer.Option("--yes", help="remove files that are not the store's")] = False,
    as_json: Json = False,
) -> None:
    """Mends a store: finishes an interrupted replacement and, with --model, computes damaged files again.

    Only bytes with the checksum of the manifest are taken. Exit code 1 where something is left to mend.
    """
    from .profile.repair import repair_store

    def loaded() -> Any:
        from .models import load

        return load(str(model), dtype=dtype, device=device)

    made = repair_store(store, model=None if model is None else loaded, prompts=prompts, remove_foreign=yes)
    left = made.left
    if as_json:
        printed_json({"store": str(store), "done": made.done, "whole": made.whole,
                      "damaged": [*left.damaged, *left.missing] if left else [],
                      "foreign": left.foreign if left else []})  # fmt: skip
    else:
        for line in made.done:
            typer.echo(f"{store}: {line}")
        typer.echo(str(left) if left else f"{store}: whole")
        if left and (left.damaged or left.missing) and model is None:
            typer.echo("give the model that was profiled, to compute these again: --model MODEL", err=True)
        if left and left.foreign:
            typer.echo("files that are not the store's are removed with --yes", err=True)
    if left:
        raise typer.Exit(NOT_WHOLE)


@stores.command()
def gc(folder: Folder = Path("."), yes: Yes = False, as_json: Json = False) -> None:
    """Finds what stopped runs left behind, below a folder and among temporary stores. Removes it only with --yes."""
    from .store.leftovers import find_leftovers, remove_leftovers

    found = find_leftovers(folder)
    found = remove_leftovers(found) if yes else found
    if as_json:
        return printed_json([{"path": str(one.path), "kind": one.kind, "bytes": one.n_bytes, "kept": one.kept,
                              "removed": yes and not one.kept} for one in found])  # fmt: skip
    from .store.views import size_text

    for one in found:
        what = f"kept, {one.kept}" if one.kept else "removed" if yes else "can go"
        typer.echo(f"{one.path}: {one.kind}, {size_text(one.n_bytes)}: {what}")
    total = size_text(sum(one.n_bytes for one in found if not one.kept))
    count = sum(not one.kept for one in found)
    typer.echo(
        f"{count} removed, {total}" if yes else f"{count} can go, {total}{'; remove with --yes' if count else ''}"
    )


@stores.command()
def merge(
    store: Annotated[list[Path], typer.Argument(metavar="STORE...", help="two stores or more, in their order")],
    out: Out,
    by: Annotated[str, typer.Option(help="rows (other prompts), sites (the same rows), or auto")] = "auto",
    allow_duplicates: Annotated[
        bool, typer.Option("--allow-duplicates", help="a prompt may be in two of them")
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Makes one store of several of the same model: of other prompts, or of other sites."""
    from .store.merge import merge_stores

    _check(store)
    _made(merge_stores(store, out, by=by, allow_duplicates=allow_duplicates, overwrite=overwrite), as_json)


@stores.command()
def export(
    store: StorePath,
    to: Annotated[str, typer.Option(help="dataset (Hugging Face), numpy, parquet")],
    out: Out,
    sites: Annotated[str | None, typer.Option(help="such as resid_post.4,mlp_out.5 [all]")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Writes a store in a format that others read. bfloat16 becomes float32."""
    from .store.exports import export_store

    _check([store])
    made = export_store(store, out, to=to, sites=None if sites is None else names_of(sites), overwrite=overwrite)
    if as_json:
        return printed_json({"out": str(made), "to": to})
    typer.echo(f"{made}: {to}")


@stores.command("import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="a Command-V profile, or a SAELens cache")],
    out: Out,
    format: Annotated[str, typer.Option(help="command-v, saelens, or auto")] = "auto",
    prompts: Annotated[str | None, typer.Option(help="the prompts of a Command-V profile, in order")] = None,
    model: Annotated[str | None, typer.Option(help="the model's name, where the source does not say it")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Makes a store of activations that another program saved. Pickles are refused."""
    from .store.imports import import_store

    _made(import_store(source, out, format=format, prompts=prompts, model=model, overwrite=overwrite), as_json)


@stores.command()
def fetch(
    url: Annotated[str, typer.Argument(metavar="URL", help="such as s3://bucket/profile, where a profile was written")],
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="folder to make")],
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Copies a store from a URL into a folder and checks every file. Stopped, the same command goes on."""
    from .store.remote import fetch_store

    _made(fetch_store(url, out, overwrite=overwrite), as_json)


def _check(paths: list[Path]) -> None:
    """Every row is read anyway, so damaged ones are told before they are copied."""
    from .store.checkup import find_damage

    for path in paths:
        damage = find_damage(path)
        if damage:
            line = str(damage)
            raise UserError(line if damage.unreadable else f"{line}; mend it with `workbench stores repair {path}`")


def _made(store: Any, as_json: bool) -> None:
    from .store.listing import compact_sites

    if as_json:
        return printed_json({"store": str(store.path), "rows": store.n_rows, "sites": [str(s) for s in store.sites],
                             "prompt_hash": store.prompt_hash, "bytes": store.n_bytes})  # fmt: skip
    typer.echo(f"{store.path}: {store.n_rows} rows at {compact_sites(store.sites)}")
