"""The geometry of a model's writes as a run folder: what was asked, every arm with its interval, and a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import geometry_plots as plots
from workbench.atomic import check_free
from workbench.models import Model
from workbench.prompts import PromptSet
from workbench.report_page import cell, facts, flat, page, section, table
from workbench.runs import environment
from workbench.summary import plain

from .geometry import WriteGeometry, write_geometry
from .run_folder import json_values, run_folder

if TYPE_CHECKING:
    import pandas as pd

FORMAT, MARKER = "workbench.geometry_run", "geometry.toml"
FRAMES = ("costs", "sizes", "runs", "lengths")
FOOTER = (
    "The loss is that of the next token, in nats; intervals are 95 %, over sequences, each beside the untouched model on the "
    "same tokens."
)
SAYS = {
    "costs": "Of what a layer writes, the part along the state that it is added to (red) or all but that (blue) is taken away, "
    "at every token but special ones. The control takes away as much as the parallel part, along a random direction: where it "
    "costs as much, nothing is special about the state's own direction. On the logarithmic axis what is below 0.0001 is "
    "drawn there.",
    "sizes": "How long the writes are beside the state, and how much of them lies along it. A negative cosine: it is erased.",
    "lengths": "A run of blocks that all read the state before the first of them, or each the state before the last; and the "
    "same blocks left out. Means over all places of a run of that length, of which there are fewer for longer ones.",
    "places": "The same, run by run. A run of one block is exact, and of two blocks both kinds are the same.",
}


@dataclass(frozen=True)
class GeometryJob:
    """What `run_geometry` is asked; see `geometry.write_geometry` for every field."""

    model: str
    prompts: str
    limit: int | None = None
    layers: tuple[int, ...] = ()
    """empty: all"""
    lengths: tuple[int, ...] = ()
    """empty: all, or of more than eight blocks those of `geometry.LENGTHS`"""
    positions: str = "all"
    max_length: int | None = None
    batch_size: int = 16
    seed: int = 0


@dataclass(frozen=True, eq=False)
class GeometryRun:
    """What a run found; `folder` is where it lies, None where nothing was written."""

    result: WriteGeometry
    metrics: Mapping[str, Any]
    folder: Path | None


def run_geometry(
    model: Model, prompts: PromptSet, job: GeometryJob, out: str | Path | None = None, *, overwrite: bool = False
) -> GeometryRun:
    """Measures a model's writes and runs of blocks; with `out`, writes a run folder.

    It holds geometry.toml (the job), metrics.json, costs.parquet, sizes.parquet, runs.parquet and lengths.parquet (the frames
    of `WriteGeometry`), and report.html. Raises UserError as `write_geometry` does, and where `out` exists, unless `overwrite`
    and it is such a run.
    """
    if out is not None:
        check_free(Path(out), marker=MARKER, overwrite=overwrite)
    result = write_geometry(
        model, prompts, layers=job.layers or None, lengths=job.lengths or None, positions=job.positions,
        batch_size=job.batch_size, max_length=job.max_length, seed=job.seed,
    )  # fmt: skip
    frames = frames_of(result)
    metrics = _metrics(job, result, frames, model)
    if out is not None:
        report = render_geometry(metrics, frames, Path(out).name or "geometry")
        with run_folder(Path(out), MARKER, job, metrics, frames, report, overwrite=overwrite):
            pass
    return GeometryRun(result, metrics, None if out is None else Path(out))


def frames_of(result: WriteGeometry) -> dict[str, pd.DataFrame]:
    """The tables of a result by the names of their files."""
    made = (result.cost_frame(), result.size_frame(), result.run_frame(), result.length_frame())
    return dict(zip(FRAMES, made, strict=True))


def _metrics(
    job: GeometryJob, result: WriteGeometry, frames: Mapping[str, pd.DataFrame], model: Model
) -> dict[str, Any]:
    differences = []
    for layer in sorted({layer for layer, _, _ in result.parts}):
        found = result.difference(layer)
        differences.append({"layer": layer, "value": found.value, "low": found.low, "high": found.high})
    return json_values({
        "format": FORMAT, "version": 1, "job": asdict(job), "model": model.name, "family": model.family,
        "parallel_blocks": bool(model.anatomy[0].parallel), "sequences": len(result.predicted),
        "tokens": int(result.predicted.sum()), "orthogonal_less_parallel": differences,
        **{name: frame.to_dict("records") for name, frame in frames.items()}, "warnings": list(result.notes),
        "environment": environment(),
    })  # fmt: skip


def render_geometry(metrics: Mapping[str, Any], frames: Mapping[str, pd.DataFrame], name: str) -> str:
    """The report as HTML; the same metrics give the same bytes."""
    heads = []
    later = [d for d in metrics["orthogonal_less_parallel"] if d["layer"] > 0]
    if later:
        more = sum(d["low"] > 0 for d in later)
        heads.append([f"Beyond layer 0 the orthogonal part costs more than the parallel part in {more} of {len(later)} layers",
                      "the interval of the difference lies above 0"])  # fmt: skip
    about = (
        f"{metrics['model']} ({metrics['family']}), {metrics['tokens']:,} tokens of {metrics['sequences']:,} sequences"
    )
    if metrics["parallel_blocks"]:
        about += "; its blocks run attention and MLP in parallel, and both are taken apart along the block's input"
    return page(title=name, subtitle=about, headlines=heads, warnings=list(metrics["warnings"]),
                sections=list(_sections(metrics, frames)), footer=FOOTER)  # fmt: skip


def _sections(metrics: Mapping[str, Any], frames: Mapping[str, pd.DataFrame]) -> Iterable[dict[str, Any]]:
    yield section(
        "Cost of each part", SAYS["costs"], figure=plots.write_costs(frames["costs"]), tables=[_costs(metrics)]
    )
    yield section("Size of the writes", SAYS["sizes"], figure=plots.write_sizes(frames["sizes"]))
    yield section(
        "Runs by length", SAYS["lengths"], figure=plots.run_lengths(frames["lengths"]), tables=[_lengths(metrics)]
    )
    yield section("Runs by place", SAYS["places"], figure=plots.run_places(frames["runs"]))
    parts = (("Job", metrics["job"]), ("Environment", metrics["environment"]))
    yield section("Provenance", tables=[facts(title, flat(part)) for title, part in parts])


def _costs(metrics: Mapping[str, Any]) -> dict[str, Any]:
    by_write: dict[tuple[int, str], dict[str, Any]] = {}
    for line in metrics["costs"]:
        by_write.setdefault((line["layer"], line["write"]), {})[line["part"]] = line
    parts = ("parallel", "orthogonal", "control")
    rows = []
    for (layer, write), found in by_write.items():
        cells = [cell(_between(found[part], "delta")) for part in parts]
        rows.append({"title": f"{layer}, {plots.WRITE_WORDS[write]}", "cells": cells, "style": ""})
    return table(
        ["layer, write", *(plots.PART_LOOK[p][0] for p in parts)], rows, title="Rise of the loss, nats per token"
    )


def _lengths(metrics: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        {"title": f"{line['length']}, {plots.KIND_LOOK[line['kind']][0]}", "style": "",
         "cells": [cell(str(line["places"])), cell(_between(line, "delta")), cell(_between(line, "growth"))]}
        for line in metrics["lengths"]
    ]  # fmt: skip
    heads = ["length", "places", "rise of the loss, nats per token", "more than the next shorter, from the same block"]
    return table(heads, rows)


def _between(line: Mapping[str, Any], key: str) -> tuple[str, str] | str:
    if line[key] is None:
        return ""
    return plain(line[key]), f"{plain(line[f'{key}_low'])} to {plain(line[f'{key}_high'])}"
