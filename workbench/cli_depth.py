"""`workbench depth`: what each layer of a model adds, what skipping it changes, and how its layers answer another model's.

Like `workbench probe` it reaches up into the probes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_errors import stops_told
from .cli_options import MODEL_HELP, PROMPTS_HELP, Device, Dtype, Json, Overwrite
from .cli_values import alpha_value, layer_list, names_of, printed_json, printed_table
from .errors import UserError

EFFECTS_HELP = "future, all, local, erase, with commas; each costs a pass for each layer; or none"
SHOWN = (
    "write",
    "attention",
    "mlp",
    "write_cosine",
    "final_cosine",
    "kl",
    "overlap",
    "pair_cosine",
    "attention_entropy",
)


def depth(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    prompts: Annotated[str, typer.Option(help=PROMPTS_HELP)],
    out: Annotated[Path | None, typer.Option(help="run folder to make [nothing is written]")] = None,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="map its layers too: the shallower to the deeper")
    ] = None,
    effects: Annotated[str, typer.Option(help=EFFECTS_HELP)] = "future,all,local,erase",
    layers: Annotated[str | None, typer.Option(help="layers to skip, such as 0,8-12,-1 [all]")] = None,
    effect_prompts: Annotated[int, typer.Option(min=1, help="of the effects: the first so many prompts")] = 64,
    control: Annotated[
        bool, typer.Option("--control", help="an untrained model of the same configuration too; takes as much memory")
    ] = False,
    no_lens: Annotated[bool, typer.Option("--no-lens", help="no logit lens, which unembeds every layer")] = False,
    no_attention: Annotated[
        bool, typer.Option("--no-attention", help="no attention curves, which need eager attention")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, help="so many prompts only, drawn with --seed")] = 256,
    max_length: Annotated[int | None, typer.Option(min=2, help="tokens of each prompt [the model's context]")] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="tokens of a pass of the effects, copies included")] = 8192,
    alpha: Annotated[
        str, typer.Option(help="of the maps of --against: gcv, cv, or a number in mean diagonals of X'X")
    ] = "gcv",
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="of the draws")] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Measures how a model uses its depth.

    One pass gives the curves over the layers: what attention and the MLP write, in which direction, and how near the
    prediction is. Effects change one layer after the other, which takes a pass over --effect-prompts for each: of a large
    model pick --layers and --effects.
    """
    chosen = () if layers is None else tuple(layer_list(layers))
    named = () if effects.strip() == "none" else tuple(names_of(effects))
    strength: Any = "gcv" if alpha == "gcv" else alpha_value(alpha)
    from probes.depth_run import EFFECTS, MARKER, DepthJob, run_depth

    from .atomic import check_free
    from .models import load
    from .prompts import PromptSet

    if unknown := [name for name in named if name not in EFFECTS]:
        raise UserError(f"unknown effect {unknown[0]!r}; allowed: {', '.join(EFFECTS)}, or none")
    if out is not None:
        check_free(out, marker=MARKER, overwrite=overwrite)  # before any model is loaded
    read = PromptSet.load(prompts, limit=limit, seed=seed)
    held = load(model, dtype=dtype, device=device)
    other = None if against is None else load(against, dtype=dtype, device=device)
    job = DepthJob(held.name, prompts, "" if other is None else other.name, named, chosen, effect_prompts, control, not no_lens,
                   not no_attention, max_length, batch_tokens, strength, seed)  # fmt: skip
    with stops_told():
        run = run_depth(held, read, job, out, against=other, overwrite=overwrite)
    if as_json:
        return printed_json(run.metrics)
    for name in run.curves:
        printed_table(_curves(run.metrics, name))
    if run.metrics["effects"]:
        printed_table(_outputs(run.metrics))
    for line in _sentences(run.metrics):
        typer.echo(line)
    for warning in run.metrics["warnings"]:
        typer.echo(f"warning: {warning}", err=True)
    if run.folder is not None:
        typer.echo(f"report: {run.folder / 'report.html'}")


def _curves(metrics: Mapping[str, Any], name: str) -> Any:
    """Layers down, curves across."""
    from rich.table import Table
    from rich.text import Text

    lines = [line for line in metrics["curves"] if line["model"] == name]
    found = [curve for curve in SHOWN if any(line["curve"] == curve for line in lines)]
    table = Table(title=Text(f"{name}: means over {metrics['prompts']} prompts"), title_justify="left")
    for head in ("after layer", *(curve.replace("_", " ") for curve in found)):
        table.add_column(head, justify="right")
    cells = {(line["curve"], line["layer"]): line["value"] for line in lines}
    for layer in ("embeddings", *map(str, range(metrics["models"][name]["n_layers"]))):
        table.add_row(layer, *(_number(cells.get((curve, layer))) for curve in found))
    return table


def _outputs(metrics: Mapping[str, Any]) -> Any:
    """Changed layers down, models and effects across."""
    from rich.table import Table

    lines = [line for line in metrics["effects"] if line["later"] == "output"]
    columns = list(dict.fromkeys((line["model"], line["effect"]) for line in lines))
    table = Table(
        title="change of the output, ||y - ybar||, largest over tokens, with 95 % intervals", title_justify="left"
    )
    table.add_column("changed layer", justify="right")
    for model, effect in columns:
        table.add_column(f"{model}, {effect}", justify="right")
    cells = {(x["model"], x["effect"], x["layer"]): _span(x) for x in lines}
    for layer in dict.fromkeys(line["layer"] for line in lines):
        table.add_row(str(layer), *(cells[model, effect, layer] for model, effect in columns))
    return table


def _sentences(metrics: Mapping[str, Any]) -> list[str]:
    found = [f"{x['model']}, {x['effect']}: first half of the layers over the second, effect on the output {x['value']:.3f} "
             f"({x['low']:.3f} to {x['high']:.3f})" for x in metrics["halves"] if x["statistic"] == "max"]  # fmt: skip
    found += [f"{x['model']}, depth score by {x['effect']}: layer {x['value']:.2f} ({x['low']:.2f} to {x['high']:.2f})"
              for x in metrics["scores"]]  # fmt: skip
    if grid := metrics["grid"]:
        order = "no order" if grid["order"] is None else f"Spearman {grid['order']:.3f}"
        best = ", ".join(f"{d}: {s}" for d, s in grid["best"].items())
        found.append(f"best layer of {grid['shallow']} for each of {grid['deep']}: {best} ({order})")
    return found


def _span(line: Mapping[str, Any]) -> str:
    value, low, high = (f"{round(line[key], 4) + 0.0:.4f}" for key in ("max", "max_low", "max_high"))  # no -0.0000
    return f"{value} ({low} to {high})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
