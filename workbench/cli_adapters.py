"""`workbench adapters`: what an adapter is, writing it in formats that others read, and making one of changed weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import ADAPTER_HELP, MODEL_HELP, PROMPTS_HELP, Device, Dtype, Json, Out, Overwrite
from .cli_values import printed_json, printed_table, site_list
from .errors import UserError

adapters = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None,
    help="Show adapters of any format, export them, and make them of LoRAs and finetunes.",
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


@adapters.command()
def from_weights(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    change: Annotated[str, typer.Argument(metavar="CHANGE", help="PEFT's LoRA folder, or a finetuned checkpoint")],
    prompts: Annotated[str, typer.Option(help=f"what it is fitted on: {PROMPTS_HELP}")],
    out: Out,
    layers: Annotated[str | None, typer.Option(help="such as 4, 0,4,8-12 or -1 [all]")] = None,
    sites: Annotated[str | None, typer.Option(help="in place of --layers: resid_post.4,mlp_out.5")] = None,
    keep: Annotated[
        str, typer.Option(help="best: the one nearest to the changed model's next token; all: fitted in turn")
    ] = "best",
    rank: Annotated[str, typer.Option(help="of what it reads, a constant on top; cv chooses up to --max-rank")] = "cv",
    max_rank: Annotated[int, typer.Option(help="the largest that cv may choose")] = 16,
    positions: Annotated[str, typer.Option(help="where it acts: last, prompt, all, first:n, last:n")] = "last",
    holdout: Annotated[float, typer.Option(help="share of prompts kept for the figures")] = 0.2,
    limit: Annotated[int | None, typer.Option(min=1, help="so many prompts only")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="of the split")] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Makes a residual adapter of a LoRA or a full finetune, by a low-rank fit to what it does to activations.

    Prints, of each site, how much of the difference it explains on held-out prompts, a constant beside it.
    """
    where, wanted = site_list(sites, layers), _rank(rank)
    from .adapters.views import fit_table
    from .adapters.weight_change import residual_adapter
    from .atomic import check_free
    from .models import load
    from .prompts import PromptSet

    check_free(out, marker="adapter.json", overwrite=overwrite)
    read = PromptSet.load(prompts, limit=limit)
    loaded = load(model, dtype=dtype, device=device)
    made = residual_adapter(loaded, change, read, where, keep=keep, rank=wanted, max_rank=max_rank, positions=positions,
                            holdout=holdout, seed=seed, name=out.name)  # fmt: skip
    made.adapter.save(out, overwrite=overwrite)
    if as_json:
        kept = ("fits", "kl_before", "kl_after", "warnings")
        said = {key: made.adapter.meta[key] for key in kept}
        return printed_json({"adapter": str(out), "sites": [str(s) for s in made.adapter.sites], **said})
    printed_table(fit_table(made))
    typer.echo(f"{out}: at {', '.join(map(str, made.adapter.sites))}; KL to the changed model's next token "
               f"{made.kl_before:.4g} -> {made.kl_after:.4g} nats")  # fmt: skip


def _rank(text: str) -> int | str:
    """A rank, or the word that leaves it to cross-validation.

    >>> _rank("4"), _rank("cv")
    (4, 'cv')
    """
    if text == "cv" or (text.isascii() and text.isdigit() and len(text) < 7):
        return text if text == "cv" else int(text)
    raise UserError(f"rank {text!r} is neither a number nor cv; give such as 4")
