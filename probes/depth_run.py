"""A run on the depth of a model as a folder: curves, effects, scores, a grid of layers, and a report."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from workbench.atomic import check_free
from workbench.errors import UserError
from workbench.evaluate.scoring import Sequences
from workbench.models import Model
from workbench.profile import profile_model
from workbench.prompts import PromptSet
from workbench.runs import environment
from workbench.sites import Site
from workbench.untrained import untrained_like

from .depth import DepthCurves, depth_curves
from .depth_report import render_depth
from .depth_score import depth_score, depth_scores
from .layer_grid import LayerGrid, layer_grid
from .run_folder import json_values, run_folder
from .skip_effects import BATCH_TOKENS, SkipEffects, layer_effects

log = logging.getLogger("workbench")
FORMAT = "workbench.depth_run"
MARKER = "depth.toml"
EFFECTS = {
    "future": ("skip", "future"),
    "all": ("skip", "all"),
    "local": ("local", "all"),
    "erase": ("erase", "future"),
}
"""what is changed, and on which tokens it is measured, by the name that a job has for it"""
EFFECT_PROMPTS = 64


@dataclass(frozen=True)
class DepthJob:
    """What `run_depth` is asked."""

    model: str
    prompts: str
    against: str = ""
    """another model, to and from which layers are mapped; empty: none"""
    effects: tuple[str, ...] = tuple(EFFECTS)
    """of `EFFECTS`; each costs a forward pass for each layer"""
    layers: tuple[int, ...] = ()
    """those that are changed; empty: all"""
    effect_prompts: int = EFFECT_PROMPTS
    """the first so many prompts are those of the effects"""
    control: bool = False
    """measure an untrained model of the same configuration too"""
    lens: bool = True
    attention: bool = True
    max_length: int | None = None
    batch_tokens: int = BATCH_TOKENS
    """of a pass of the effects, all copies together"""
    alpha: float | Literal["gcv", "cv"] = "gcv"
    """ridge strength of the maps between two models; see `layer_grid.layer_grid`"""
    seed: int = 0


@dataclass(frozen=True, eq=False)
class DepthRun:
    """What a run found, by the names of the models; `folder` is where it lies, None where nothing was written."""

    curves: Mapping[str, DepthCurves]
    effects: Mapping[tuple[str, str], SkipEffects]
    """by (model, name of the effect)"""
    grid: LayerGrid | None
    metrics: Mapping[str, Any] = field(repr=False)
    folder: Path | None


def run_depth(
    model: Model, prompts: Any, job: DepthJob, out: str | Path | None = None, *, against: Model | None = None,
    overwrite: bool = False,
) -> DepthRun:  # fmt: skip
    """Measures the curves, effects and maps of a job; with `out`, writes them there as a run folder.

    The folder holds depth.toml (the job), metrics.json, curves.parquet, effects.parquet, grid.parquet and report.html.
    Raises UserError as `depth_curves`, `layer_effects` and `layer_grid` do, for an unknown effect, and where `out` exists,
    unless `overwrite` and it is such a run.
    """
    if unknown := [name for name in job.effects if name not in EFFECTS]:
        raise UserError(f"unknown effect {unknown[0]!r}; allowed: {', '.join(EFFECTS)}, or none")
    if job.effect_prompts < 1:
        raise UserError(f"effect_prompts={job.effect_prompts}: effects need at least one prompt")
    for layer in job.layers:
        Site.parse(layer, model.n_layers)
    if out is not None:
        check_free(Path(out), marker=MARKER, overwrite=overwrite)
    read = PromptSet.load(prompts)
    grid = None if against is None else _grid(model, against, read, job)
    arms = [model, *([untrained_like(model, job.seed)] if job.control else [])]
    curves: dict[str, DepthCurves] = {}
    for one in [*arms, *([] if against is None else [against])]:
        options = {"lens": job.lens, "attention": job.attention, "max_length": job.max_length}
        curves[one.name] = depth_curves(one, read, **options)
    effects: dict[tuple[str, str], SkipEffects] = {}
    few = Sequences.of(model, read[: job.effect_prompts], job.max_length) if job.effects else None
    for one in arms:
        means = dict(enumerate(curves[one.name].means))
        for name in job.effects:
            kind, scope = EFFECTS[name]
            options = {"layers": job.layers or None, "means": means, "seed": job.seed, "batch_tokens": job.batch_tokens}
            effects[one.name, name] = layer_effects(one, few, kind=kind, scope=scope, **options)
    metrics = _metrics(job, read, few, curves, effects, grid)
    if out is not None:
        _write(Path(out), job, curves, effects, grid, metrics, overwrite)
    return DepthRun(curves, effects, grid, metrics, None if out is None else Path(out))


def _grid(model: Model, against: Model, prompts: PromptSet, job: DepthJob) -> LayerGrid:
    """The deeper of the two is the one that is mapped to; of equals, the first."""
    deep, shallow = (model, against) if model.n_layers >= against.n_layers else (against, model)
    options: dict[str, Any] = {"tokens": "all", "dtype": "auto", "max_length": job.max_length}
    with profile_model(deep, prompts, **options) as a, profile_model(shallow, prompts, **options) as b:
        return layer_grid(a, b, alpha=job.alpha, seed=job.seed)


def _metrics(
    job: DepthJob, prompts: PromptSet, few: Sequences | None, curves: Mapping[str, DepthCurves],
    effects: Mapping[tuple[str, str], SkipEffects], grid: LayerGrid | None,
) -> dict[str, Any]:  # fmt: skip
    models = {
        name: {"n_layers": c.n_layers, "identity": c.identity, "uniform_entropy": c.uniform_entropy, "parallel": c.parallel,
               "tokens": int(c.counts["norm"].sum())}
        for name, c in curves.items()
    }  # fmt: skip
    lines = [{"model": name, "effect": effect, **line} for (name, effect), found in effects.items()
             for line in found.frame().to_dict("records")]  # fmt: skip
    found: dict[str, Any] = {
        "format": FORMAT, "version": 1, "job": asdict(job), "prompts": len(prompts),
        "effect_prompts": min(len(prompts), job.effect_prompts), "models": models,
        "curves": [{"model": n, **line} for n, c in curves.items() for line in c.frame().to_dict("records")],
        "effects": lines, "halves": _halves(effects), "scores": _scores(curves, effects),
        "kinds": _kinds(few, effects), "grid": None if grid is None else _grid_metrics(grid),
        "warnings": [f"{name}: {note}" for name, c in curves.items() for note in c.notes], "environment": environment(),
    }  # fmt: skip
    return dict(json_values(found))


def _halves(effects: Mapping[tuple[str, str], SkipEffects]) -> list[dict[str, Any]]:
    """Effects on the output of the first half of the layers over the second, where both are there."""
    lines = []
    for (name, effect), found in effects.items():
        for statistic in ("max", "mean"):
            try:
                ratio = found.halves(statistic)
            except UserError:
                continue  # the layers picked do not lie in both halves
            lines.append({"model": name, "effect": effect, "statistic": statistic, **ratio.as_dict()})
    return lines


def _scores(curves: Mapping[str, DepthCurves], effects: Mapping[tuple[str, str], SkipEffects]) -> list[dict[str, Any]]:
    lines = []
    weighed: list[tuple[str, str, Any, Any]] = [
        (name, "write", c.sums["write"] / c.counts["write"].clamp_min(1), None)
        for name, c in curves.items()
        if "write" in c.sums
    ]
    weighed += [(name, effect, found.outputs[0], found.layers) for (name, effect), found in effects.items()]
    for name, what, values, layers in weighed:
        if len(values) < 2 or not float(values.sum()) > 0:
            continue  # of one layer, or of layers that do nothing, there is no place along the model
        score, last = depth_score(values, layers), curves[name].n_layers - 1
        lines.append({"model": name, "effect": what, **score.as_dict(), "relative": score.value / last})
    return lines


def _kinds(few: Sequences | None, effects: Mapping[tuple[str, str], SkipEffects]) -> list[dict[str, Any]]:
    """The depth score of each kind of prompt, by label, of every effect; empty where the prompts have fewer than two."""
    lines: list[dict[str, Any]] = []
    for (name, effect), found in effects.items():
        assert few is not None, "effects were measured on sequences"
        labels = [few.origin[i][1].label for i in found.index]
        if len({one for one in labels if one is not None}) < 2 or len(found.layers) < 2:
            continue
        if bool(
            (torch.stack([found.outputs[0][:, [x == one for x in labels]].sum() for one in set(labels)]) > 0).all()
        ):
            scored = depth_scores(found.outputs[0], labels, found.layers).to_dict("records")
            lines += [{"model": name, "effect": effect, **line} for line in scored]
    return lines


def _grid_metrics(grid: LayerGrid) -> dict[str, Any]:
    chance = grid.order_by_chance()
    return {
        "deep": grid.deep, "shallow": grid.shallow, "n_deep": grid.n_deep, "n_shallow": grid.n_shallow, "alpha": grid.alpha,
        "n_fit": grid.n_fit, "held_out": int(grid.counts.sum()), "held_out_prompts": len(grid.counts),
        "best": {str(d): s for d, s in grid.best.items()}, "matching": {str(d): s for d, s in grid.matching().items()},
        "order": grid.order(), "order_by_chance": None if chance is None else chance.as_dict(),
        "lines": grid.frame().to_dict("records"),
    }  # fmt: skip


def _write(
    out: Path, job: DepthJob, curves: Mapping[str, DepthCurves], effects: Mapping[tuple[str, str], SkipEffects],
    grid: LayerGrid | None, metrics: Mapping[str, Any], overwrite: bool,
) -> None:  # fmt: skip
    import pandas as pd

    tables = {"curves": pd.concat([c.frame().assign(model=name) for name, c in curves.items()])}
    if effects:
        parts = [found.frame().assign(model=name, effect=effect) for (name, effect), found in effects.items()]
        tables["effects"] = pd.concat(parts)
    if grid is not None:
        tables["grid"] = grid.frame()
    with run_folder(out, MARKER, job, metrics, tables, render_depth(metrics, out.name or "depth"), overwrite=overwrite):
        pass
