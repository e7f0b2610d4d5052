"""The report of a run on depth: curves, skipped layers, scores and the grid of layers on one page that needs no network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from workbench import depth_plots as plots
from workbench.report_page import cell, facts, flat, page, section, table
from workbench.summary import plain

FOOTER = (
    "Intervals are 95 %, Student's over prompts. Position 0 of every prompt is left out of what is measured: BOS, or the token "
    "that holds the massive activations in its place."
)
SAYS = {
    "writes": "What each block, and in it attention and the MLP, adds to the residual stream, beside what it reads. A share of "
    "the length says nothing yet of use: a small write may matter, and a large one may be undone later.",
    "cosines": "The direction of each write to the stream that it is added to: below 0 it erases, near 0 it is new, above 0 it "
    "strengthens what is there.",
    "stream": "How fast the state moves, how long it is, and how near its direction is to where it ends.",
    "lens": "The logit lens: what would be predicted if the model stopped here. It needs no fit, and so understates what early "
    "layers know in another basis.",
    "uniformity": "How alike the tokens of a prompt are: the mean cosine of two of them, and the share of their energy that is "
    "their mean. Both rise where attention averages tokens away.",
    "attention": "How widely a token looks, mean over heads, and how like its attention is to that of the layer before.",
    "future": "Each layer is skipped up to a token drawn for each prompt; what then changes is measured at the tokens after "
    "it, whose own layers all run. The last layer has nothing to act through: its effect is 0 by construction.",
    "all": "Each layer is skipped at every token, and measured at every token.",
    "local": "The write of each layer is taken from the input of each later layer, one at a time, without what the layers "
    "between had made of it: what is read directly.",
    "erase": "The state after each layer is replaced by the mean state there, at one token drawn for each prompt, and measured "
    "at the tokens after it: until which layer the later ones still read it.",
    "outputs": "What changing each layer does to the next-token distributions, as their Euclidean distance (at most 1.41), the "
    "largest over the tokens of a prompt. A layer without effect on later tokens only refines its own prediction.",
    "scores": "Where the effects lie along the model: the mean layer, each weighed by its effect.",
    "grid": "The relative error of a ridge map from each layer of {shallow} to each layer of {deep}, on {prompts} prompts "
    "that no map has seen; the best of each line is ringed. A deep model that spreads the same computation out has its best "
    "layers in order, along the diagonal.",
}


def render_depth(metrics: Mapping[str, Any], name: str) -> str:
    """The report as HTML; the same metrics give the same bytes."""
    job = metrics["job"]
    about = f"{job['model']} on {metrics['prompts']:,} prompts of {job['prompts']}"
    return page(title=name, subtitle=about, headlines=list(_headlines(metrics)), warnings=list(metrics["warnings"]),
                sections=list(_sections(metrics)), footer=FOOTER)  # fmt: skip


def _headlines(metrics: Mapping[str, Any]) -> Iterable[list[str]]:
    for line in metrics["halves"]:
        if line["effect"] == "future" and line["statistic"] == "max":
            yield [f"{line['model']}: layers of the first half matter {plain(line['value'])} times as much to future tokens",
                   f"as those of the second; 95 % interval {plain(line['low'])} to {plain(line['high'])}"]  # fmt: skip
    grid = metrics["grid"]
    if grid and grid["order"] is not None:
        chance = grid["order_by_chance"]
        yield [f"Best layers in order: Spearman {plain(grid['order'])}",
               f"{grid['shallow']} to {grid['deep']}; of layers that change places {plain(chance['low'])} to "
               f"{plain(chance['high'])} (95 %)"]  # fmt: skip
    identity = {name: one["identity"] for name, one in metrics["models"].items() if one["identity"] is not None}
    if identity:
        yield [f"The writes add up to what the stream gains, to {plain(max(identity.values()))}",
               f"largest relative error at any token of {', '.join(identity)}"]  # fmt: skip


def _sections(metrics: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    curves = {str(name): part for name, part in pd.DataFrame(metrics["curves"]).groupby("model", sort=False)}
    for group, names in plots.GROUPS.items():
        if any(part["curve"].isin(names).any() for part in curves.values()):
            yield section(group.capitalize(), SAYS[group], figure=plots.depth_curves(curves, group))
    yield section("Every curve", tables=[_curve_table(name, part) for name, part in curves.items()])
    if metrics["effects"]:
        yield from _effects(pd.DataFrame(metrics["effects"]), metrics)
    if metrics["scores"]:
        yield section("Depth scores", SAYS["scores"], tables=[_scores(metrics), *_kinds(metrics)])
    if metrics["grid"]:
        grid = metrics["grid"]
        says = SAYS["grid"].format(deep=grid["deep"], shallow=grid["shallow"], prompts=grid["held_out_prompts"])
        figure = plots.layer_grid(pd.DataFrame(grid["lines"]), grid["deep"], grid["shallow"])
        yield section("Layer grid", says, figure=figure, tables=[_grid(grid)])
    parts = (("Job", metrics["job"]), ("Models", metrics["models"]), ("Environment", metrics["environment"]))
    yield section("Provenance", tables=[facts(title, flat(part)) for title, part in parts])


def _curve_table(name: str, part: pd.DataFrame) -> dict[str, Any]:
    layers = list(dict.fromkeys(part.sort_values("site", key=lambda s: s.map(_order))["layer"]))
    curves = list(dict.fromkeys(part["curve"]))
    found = {(line["layer"], line["curve"]): line for line in part.to_dict("records")}
    rows = [
        {"title": str(layer), "style": "", "cells": [_estimate(found.get((layer, c))) for c in curves]}
        for layer in layers
    ]
    return table(["after layer", *(c.replace("_", " ") for c in curves)], rows, name) | {"wide": True}


def _order(site: str) -> int:
    return -1 if site == "resid_pre.0" else int(site.rpartition(".")[2])


def _effects(table_: pd.DataFrame, metrics: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    outputs = {str(model): part for model, part in table_.groupby("model", sort=False)}
    rows = [{"title": f"{x['model']}, {x['effect']}, {x['statistic']}", "style": "", "cells": [_estimate(x)]}
            for x in metrics["halves"]]  # fmt: skip
    tables = [table(["effect on the output", "first half over second"], rows)] if rows else []
    yield section("Effects on the output", SAYS["outputs"], figure=plots.skip_outputs(outputs), tables=tables)
    titles = {"future": "Skipped for earlier tokens", "all": "Skipped for all tokens", "local": "Read directly",
              "erase": "Erased at one token"}  # fmt: skip
    for (model, effect), part in table_.groupby(["model", "effect"], sort=False):
        title = f"{titles[str(effect)]}, {model}"
        yield section(title, SAYS[str(effect)], figure=plots.skip_heatmap(part))


def _scores(metrics: Mapping[str, Any]) -> dict[str, Any]:
    rows = [{"title": f"{x['model']}, {x['effect']}", "style": "", "cells": [_estimate(x), cell(plain(x["relative"]))]}
            for x in metrics["scores"]]  # fmt: skip
    return table(["weighed by", "mean layer", "share of the last layer's number"], rows)


def _kinds(metrics: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    if metrics["kinds"]:
        rows = [
            {"title": f"{x['model']}, {x['effect']}, {x['group']}", "style": "",
             "cells": [_estimate({**x, "value": x["score"]}), cell(plain(x["prompts"]))]}
            for x in metrics["kinds"]
        ]  # fmt: skip
        yield table(["kind of prompt", "mean layer", "prompts"], rows)


def _grid(grid: Mapping[str, Any]) -> dict[str, Any]:
    best = {(x["deep"], x["shallow"]): x for x in grid["lines"]}
    rows = []
    for deep, shallow in sorted(grid["best"].items(), key=lambda pair: int(pair[0])):
        found = best[int(deep), shallow]
        cells = [cell(str(shallow)), cell(str(grid["matching"][deep])),
                 _estimate({"value": found["error"], "low": found["error_low"], "high": found["error_high"]}),
                 cell(plain(found["mean"])), cell(plain(found.get("shuffled")))]  # fmt: skip
        rows.append({"title": str(deep), "style": "", "cells": cells})
    heads = [f"layer of {grid['deep']}", f"best of {grid['shallow']}", "in order", "error", "of the mean alone",
             "of shuffled pairs"]  # fmt: skip
    return table(
        heads, rows, note="In order: the matching with the least summed error in which the shallow layers never fall."
    )


def _estimate(line: Mapping[str, Any] | None) -> dict[str, Any]:
    if line is None or line["value"] is None or line["value"] != line["value"]:
        return cell("")
    return cell((plain(line["value"]), f"{plain(line['low'])} to {plain(line['high'])}"))
