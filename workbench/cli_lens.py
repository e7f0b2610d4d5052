"""`workbench lens`: what a model would predict at each layer, and fitting the translators of a tuned or Jacobian lens.

Like `workbench transport` it reaches up into the probes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_errors import stops_told
from .cli_options import ADAPTER_HELP, MODEL_HELP, PROMPTS_HELP, Backend, Device, Dtype, Json, Mismatch, Overwrite
from .cli_values import alpha_value, printed_json, printed_table
from .errors import UserError
from .visible_text import visible

KINDS = ("logit", "tuned", "jacobian")
MOST = 16
SIGNS = 12


def lens(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    text: Annotated[str | None, typer.Option(help="prompt to look at: a user's turn, where the model chats")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="--text as it stands, without the chat template")] = False,
    kind: Annotated[
        str | None, typer.Option(help="logit, tuned or jacobian [that of --lens, else logit; with --fit: tuned]")
    ] = None,
    lens: Annotated[Path | None, typer.Option(metavar="FOLDER", help="fitted lens, ours or tuned-lens's")] = None,
    adapter: Annotated[str | None, typer.Option(help=f"look at the model with it: {ADAPTER_HELP}")] = None,
    strength: Annotated[float, typer.Option(help="factor on the adapter's own")] = 1.0,
    last: Annotated[int | None, typer.Option(min=1, help="the last so many tokens [16; with --json all]")] = None,
    top: Annotated[int, typer.Option(min=1, help="likeliest tokens of each cell, for --json")] = 5,
    fit: Annotated[bool, typer.Option("--fit", help="fit a lens on --prompts and write it to --out")] = False,
    prompts: Annotated[str | None, typer.Option(help=f"to fit on: {PROMPTS_HELP}")] = None,
    out: Annotated[Path | None, typer.Option(help="folder to make of the fitted lens")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="so many prompts only, drawn with --seed [jacobian: 64]")
    ] = None,
    epochs: Annotated[int, typer.Option(min=0, help="at most so many times over the prompts; 0: the closed form")] = 30,
    alpha: Annotated[str, typer.Option(help="of the closed form: gcv, or a number in mean diagonals of X'X")] = "gcv",
    holdout: Annotated[float, typer.Option(help="share of the prompts that the figures are of")] = 0.2,
    max_length: Annotated[int | None, typer.Option(min=2, help="tokens of each prompt that are fitted on")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="of the split and of what is drawn")] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    backend: Backend = "hooks",
    allow_mismatch: Mismatch = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Shows what a model would predict if it stopped at each layer; with --fit, fits a tuned lens for it.

    Layers up, tokens across, the likeliest next token in each cell; then entropy, KL to the model's own prediction and the
    rank of its answer, layer by layer.
    """
    if kind is not None and kind not in KINDS:
        raise UserError(f"unknown kind of lens {kind!r}; allowed: {', '.join(KINDS)}")
    places: dict[str, Any] = {"dtype": dtype, "device": device, "backend": backend}
    if fit:
        if text is not None or lens is not None or adapter is not None:
            raise UserError("--fit takes --prompts and --out; leave --text, --lens and --adapter out")
        if prompts is None or out is None or kind == "logit":
            raise UserError("--fit needs --prompts to fit on and --out, the folder to make; a logit lens needs no fit")
        options = {"alpha": "gcv" if alpha == "gcv" else alpha_value(alpha), "epochs": epochs, "holdout": holdout}
        return _fitted(
            model, kind or "tuned", prompts, out, limit, seed, max_length, options, places, overwrite, as_json
        )
    if prompts is not None or out is not None:
        raise UserError("--prompts and --out are of --fit; give --text to look at, or --fit too")
    if text is None:
        raise UserError('nothing to look at: give --text "...", or --fit with --prompts and --out')
    if lens is None and kind in ("tuned", "jacobian"):
        raise UserError(f"a {kind} lens is fitted first: `workbench lens {model} --fit --kind {kind} --prompts FILE --out "
                        "FOLDER`, then give --lens FOLDER")  # fmt: skip
    from probes.lens import Lens
    from probes.lens_table import lens_table

    from .adapters.adapter import Adapter
    from .models import load

    found = Lens() if lens is None else Lens.load(lens)
    if kind is not None and kind != found.kind:
        raise UserError(f"{lens} is a {found.kind} lens, not a {kind} one; leave --kind out, or give the other folder")
    edit = None if adapter is None else Adapter.load(adapter) * strength
    held = load(model, **places)
    shown = last if last is not None or as_json else MOST
    table = lens_table(held, text, found, adapter=edit, last=shown, top=top, chat=False if plain else None,
                       allow_mismatch=allow_mismatch)  # fmt: skip
    if as_json:
        return printed_json(_as_dict(table))
    printed_table(_token_table(table))
    printed_table(_layer_table(table))


def _fitted(model: str, kind: str, prompts: str, out: Path, limit: int | None, seed: int, max_length: int | None,
            options: dict[str, Any], places: dict[str, Any], overwrite: bool, as_json: bool) -> None:  # fmt: skip
    from .atomic import check_free
    from .models import load
    from .prompts import PromptSet

    check_free(out, marker="params.safetensors", overwrite=overwrite)
    if kind == "jacobian":
        from probes.jacobian_lens import fit_jacobian_lens

        read = PromptSet.load(prompts)
        held = load(model, **places)
        with stops_told():
            jacobian = fit_jacobian_lens(held, read, limit=limit or 64, seed=seed, max_length=max_length or 128)
        jacobian.lens.save(out, held, overwrite=overwrite)
        errors = {str(site): value for site, value in jacobian.relative_error.items()}
        said = {
            "lens": str(out),
            "kind": kind,
            "prompts": jacobian.prompts,
            "tokens": jacobian.tokens,
            "relative_error": errors,
        }
        if as_json:
            return printed_json(said)
        worst = max(errors, key=lambda site: errors[site])
        return typer.echo(f"{out}: jacobian lens over {jacobian.tokens:,} tokens of {jacobian.prompts} prompts; relative "
                          f"error of its Jacobians at most {errors[worst]:.2g} ({worst})")  # fmt: skip
    from probes.tuned_lens import fit_tuned_lens

    read = PromptSet.load(prompts, limit=limit, seed=seed if limit is not None else None)
    held = load(model, **places)
    with stops_told():
        tuned = fit_tuned_lens(held, read, seed=seed, max_length=max_length, **options)
    tuned.lens.save(out, held, overwrite=overwrite)
    if as_json:
        return printed_json({"lens": str(out), "kind": kind, "layers": tuned.lens.meta["figures"]})
    printed_table(_fit_table(tuned.lens.meta["figures"]))
    if tuned.kept_start:
        typer.echo(f"warning: {', '.join(map(str, tuned.kept_start))}: the fit was no better than its start, which is kept",
                   err=True)  # fmt: skip
    typer.echo(f"{out}: tuned lens, {len(tuned.lens.translators)} translators")


def _table(title: str, *columns: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _fit_table(figures: list[dict[str, Any]]) -> Any:
    table = _table("KL to the model's own prediction, nats per token, held-out prompts, with 95 % intervals",
                   "after layer", "logit lens", "closed form", "tuned", "start", "epochs")  # fmt: skip
    for line in figures:
        cells = [f"{line[n]:.4f} ({line[f'{n}_low']:.4f} to {line[f'{n}_high']:.4f})" for n in
                 ("kl_logit", "kl_start", "kl_tuned")]  # fmt: skip
        start = str(line["start"]) + (", kept" if line["kept_start"] else "")
        table.add_row(str(line["layer"]), *cells, start, str(line["epochs"]))
    return table


def _token_table(table: Any) -> Any:
    from rich.text import Text

    from probes.lens import site_word

    of = f" + {table.adapter}" if table.adapter else ""
    made = _table(f"likeliest next token, {table.lens} lens{of}", "after layer")
    for token in table.tokens:
        made.add_column(Text(_seen(token)), no_wrap=True)
    for i in reversed(range(len(table.sites))):
        tops = [Text(_seen(table.texts[one])) for one in table.top_ids[i, :, 0].tolist()]
        made.add_row(site_word(table.sites[i]), *tops)
    return made


def _layer_table(table: Any) -> Any:
    from probes.lens import site_word

    made = _table("mean over these tokens; of the rank the median", "after layer", "entropy (nats)", "KL (nats)",
                  "rank of the answer", "probability of the answer")  # fmt: skip
    for i in reversed(range(len(table.sites))):
        made.add_row(site_word(table.sites[i]), f"{table.entropy[i].mean():.3f}", f"{table.kl[i].mean():.3f}",
                     f"{table.answer_rank[i].nanmedian():,.0f}", f"{table.answer_probability[i].nanmean():.3f}")  # fmt: skip
    return made


def _seen(text: str) -> str:
    cut = visible(text, spaces=True)
    return cut if len(cut) <= SIGNS else cut[: SIGNS - 1] + "…"


def _as_dict(table: Any) -> dict[str, Any]:
    """The table as JSON: what it is of, and a line per site and token with its likeliest tokens."""
    lines = table.frame().astype(object)
    records = lines.where(lines.notna(), None).to_dict(orient="records")
    ids, probabilities = table.top_ids.flatten(0, 1).tolist(), table.top_probabilities.flatten(0, 1).tolist()
    for record, tokens, values in zip(records, ids, probabilities, strict=True):
        record["likeliest"] = [
            {"token": table.texts[i], "id": i, "probability": p} for i, p in zip(tokens, values, strict=True)
        ]
    return {
        "model": table.model,
        "lens": table.lens,
        "adapter": table.adapter,
        "answers": table.answer_kind,
        "cells": records,
    }
