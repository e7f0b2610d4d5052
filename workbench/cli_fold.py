"""`workbench fold`: how linear a model's feed-forward networks are, what folding them costs, and the folded model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_errors import stops_told
from .cli_options import MODEL_HELP, PROMPTS_HELP, Device, Dtype, Json, Overwrite
from .cli_values import alpha_value, printed_json, printed_table
from .errors import UserError

if TYPE_CHECKING:
    from .models import Model

MOST_PROMPTS = 512


def fold(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    theta: Annotated[
        float, typer.Option(help="share of each network's channels that is folded, from 0 to less than 1")
    ] = 0.5,
    method: Annotated[
        str, typer.Option(help="what takes their place: refit, affine, mean or identity; gated networks: refit or mean")
    ] = "refit",
    prompts: Annotated[str, typer.Option(help=f"to calibrate and score on: {PROMPTS_HELP}")] = "bundled:profile",
    out: Annotated[Path | None, typer.Option(help="folder to make of the folded model")] = None,
    thetas: Annotated[str, typer.Option(help="of the table, besides --theta")] = "0.25,0.5,0.75",
    scores: Annotated[
        bool, typer.Option("--scores", help="print how linear blocks and channels are, and fold nothing")
    ] = False,
    alpha: Annotated[str, typer.Option(help="of the refit: cv, gcv, or a number in mean diagonals of X'X")] = "cv",
    holdout: Annotated[float, typer.Option(help="share of the prompts that the figures are of")] = 0.25,
    answers: Annotated[
        int,
        typer.Option(
            min=0, help="tokens of the model's own answers to chats without one, which the loss is of; 0: none"
        ),
    ] = 48,
    limit: Annotated[int, typer.Option(min=1, help="so many prompts only, drawn with --seed")] = MOST_PROMPTS,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="of the split and the draws")] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Folds the least nonlinear part of a model's feed-forward networks into one linear map each.

    Shows loss, KL and measured speed against the share that is folded, beside the mean and channels drawn at random; with
    --out writes the folded model, which every verb takes as MODEL.
    """
    if not 0 < holdout < 1:
        raise UserError(f"--holdout is a share of the prompts between 0 and 1; got {holdout:g}")
    if out is not None and scores:
        raise UserError("--scores folds nothing; leave --out out, or --scores")
    strength: Any = "gcv" if alpha == "gcv" else alpha_value(alpha)
    from .folding.batch_norm import idle_count
    from .folding.plan import METHODS

    wanted = sorted({theta, *_numbers(thetas)})
    for one in wanted:
        idle_count(one, 1)
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}; allowed: {', '.join(METHODS)}")
    from .atomic import check_free
    from .models import load
    from .prompts import PromptSet

    if out is not None:
        check_free(out, marker="config.json", overwrite=overwrite)
    read = PromptSet.load(prompts, limit=limit, seed=seed)
    held = load(model, dtype=dtype, device=device)
    if scores:
        return _scores(held, read, holdout, seed, as_json)
    options: dict[str, Any] = {"holdout": holdout, "seed": seed, "alpha": strength, "answers": answers}
    _folded(held, read, theta, method, wanted, out, overwrite, options, as_json)


def _scores(model: Model, prompts: Any, holdout: float, seed: int, as_json: bool) -> None:
    from probes.linearity import linearity

    with stops_told():
        found = linearity(model, prompts, holdout=holdout, seed=seed)
    lines = found.frame().to_dict(orient="records")
    if as_json:
        return printed_json({"model": found.model, "gated": found.gated, "rows": found.n_held_out, "layers": lines})
    table = _table(f"held-out R2 of linear maps, {found.n_held_out:,} rows, with 95 % intervals; channels: their own R2",
                   "layer", "what the block writes", "control", "network", "control", "block", "median channel",
                   "scores in the lower half")  # fmt: skip
    for line in lines:
        table.add_row(str(line["layer"]), _span(line, "write"), f"{line['write_control']:.3f}", _span(line, "ffn"),
                      f"{line['ffn_control']:.3f}", _span(line, "block"), f"{line['channel_r2']:.3f}",
                      f"{line['lower_half_of_scores']:.1%}")  # fmt: skip
    printed_table(table)


def _folded(model: Model, prompts: Any, theta: float, method: str, wanted: list[float], out: Path | None, overwrite: bool,
            options: dict[str, Any], as_json: bool) -> None:  # fmt: skip
    from probes.fold_curve import fold_curve

    from .folding.fold import fold_model

    with stops_told():
        curve = fold_curve(model, prompts, wanted, **options)
        if not any((theta, method) == key[:2] for key in curve.scores):
            raise UserError(f"{model.name}: its networks are gated: a channel is a product of two maps of its input, so that "
                            f"{method!r} does not apply; use --method refit")  # fmt: skip
        made = (
            None
            if out is None
            else fold_model(model, curve.calibration, theta=theta, method=method, alpha=options["alpha"])
        )
    if made is not None and out is not None:
        made.save(out, overwrite=overwrite)
    table = curve.frame()
    if as_json:
        lines = table.astype(object).where(table.notna(), None).to_dict(orient="records")
        said = {"model": curve.model, "gated": curve.gated, "arms": lines, "folded": None if out is None else str(out)}
        return printed_json(said)
    printed_table(_arms(table))
    if made is not None:
        typer.echo(
            f"{out}: {model.name} folded, theta {theta:g}, {method}; {made.plan.ratio:.1%} of the networks' weights"
        )


def _arms(lines: Any) -> Any:
    made = _table("held-out prompts, nats per token with 95 % intervals; speed: forward passes in turns with the dense model",
                  "theta", "method", "channels", "loss", "rise", "KL", "same top token", "weights",
                  "tokens/s", "speed")  # fmt: skip
    for line in lines.to_dict(orient="records"):
        timed = line["tokens_per_s"] == line["tokens_per_s"] and line["tokens_per_s"] is not None
        made.add_row(f"{line['theta']:g}", line["method"], line["channels"], f"{line['loss']:.3f}", _span(line, "rise"),
                     _span(line, "kl"), f"{line['agreement']:.1%}", f"{line['weights']:.1%}",
                     f"{line['tokens_per_s']:,.0f}" if timed else "", f"{line['speedup']:.2f}x" if timed else "")  # fmt: skip
    return made


def _span(line: Any, key: str) -> str:
    return f"{line[key]:.3f} ({line[f'{key}_low']:.3f} to {line[f'{key}_high']:.3f})"


def _table(title: str, *columns: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in ("method", "channels") else "right", no_wrap=True)
    return table


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(
            f"cannot read the thetas {text!r}; write shares between commas, such as 0.25,0.5,0.75"
        ) from None
