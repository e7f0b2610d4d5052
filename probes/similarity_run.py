"""A comparison of layers as a run folder: what was asked, every pair with its interval and null, and a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import similarity_plots as plots
from workbench.atomic import check_free
from workbench.report_page import cell, facts, flat, page, section, table
from workbench.runs import environment
from workbench.store import Store
from workbench.summary import plain

from .run_folder import json_values, run_folder
from .similarity import LayerSimilarity, layer_similarity
from .similarity_measures import WORDS

if TYPE_CHECKING:
    import pandas as pd

FORMAT, MARKER = "workbench.similarity_run", "similarity.toml"
FOOTER = (
    "Intervals are 95 %, by leaving out one shard of prompts at a time. The null: the prompts of the second store are "
    "shuffled, the rows of a prompt staying together."
)
SAYS = {
    "best": "For each layer of the first model, the layer of the second that is most like it. It is the best of many, and so a "
    "little too good; the null is of the same pair.",
    "cka": "Inner products of all pairs of rows, compared. With few rows for the width it is high for anything: read the null, "
    "or the debiased form.",
    "cka_debiased": "CKA without that bias: 0 where two layers have nothing to do with one another.",
    "svcca": "Mean canonical correlation of the leading directions. Any invertible map of those leaves it as it is.",
    "pwcca": "Canonical correlations, weighted by how much of the first layer each accounts for.",
    "procrustes": "How well one layer can be rotated onto the other; the distance is 2 - 2 x this.",
    "rsa": "Correlation of the ranks of all dissimilarities (1 - cosine) between rows of different prompts. Of a sample.",
    "knn": "Share of the nearest rows of other prompts that both layers have in common. Of a sample.",
}


@dataclass(frozen=True)
class SimilarityJob:
    """What `run_similarity` is asked; see `similarity.layer_similarity` for every field."""

    a: str
    b: str = ""
    """empty: the layers of one model with one another"""
    measures: tuple[str, ...] = ()
    sites_a: tuple[str, ...] = ()
    sites_b: tuple[str, ...] = ()
    pairing: str = "auto"
    max_rows: int = 4096
    sample: int = 768
    k: int = 10
    permutations: int = 20
    shards: int = 10
    seed: int = 0
    device: str = ""


@dataclass(frozen=True, eq=False)
class SimilarityRun:
    """What a run found; `folder` is where it lies, None where nothing was written."""

    result: LayerSimilarity
    metrics: Mapping[str, Any]
    folder: Path | None


def run_similarity(job: SimilarityJob, out: str | Path | None = None, *, overwrite: bool = False) -> SimilarityRun:
    """Compares the layers of two stores; with `out`, writes a run folder.

    It holds similarity.toml (the job), metrics.json, similarity.parquet (`LayerSimilarity.frame`) and report.html. Raises
    UserError as `layer_similarity` does, and where `out` exists, unless `overwrite` and it is such a run.
    """
    if out is not None:
        check_free(Path(out), marker=MARKER, overwrite=overwrite)
    result = layer_similarity(
        Store.open(job.a), Store.open(job.b) if job.b else None, measures=job.measures or None,
        sites_a=job.sites_a or None, sites_b=job.sites_b or None, pairing=job.pairing, max_rows=job.max_rows,
        sample=job.sample, k=job.k, permutations=job.permutations, shards=job.shards, seed=job.seed,
        device=job.device or None,
    )  # fmt: skip
    metrics = _metrics(job, result)
    if out is not None:
        frame = result.frame()
        report = render_similarity(metrics, frame, Path(out).name or "similarity")
        with run_folder(Path(out), MARKER, job, metrics, {"similarity": frame}, report, overwrite=overwrite):
            pass
    return SimilarityRun(result, metrics, None if out is None else Path(out))


def _metrics(job: SimilarityJob, result: LayerSimilarity) -> dict[str, Any]:
    return json_values({
        "format": FORMAT, "version": 1, "job": asdict(job), "a": result.a, "b": result.b, "rows": result.rows,
        "prompts": result.prompts, "summary": result.summary, "best": result.best().to_dict("records"),
        "warnings": list(result.notes), "settings": dict(result.settings), "environment": environment(),
    })  # fmt: skip


def render_similarity(metrics: Mapping[str, Any], frame: pd.DataFrame, name: str) -> str:
    """The report as HTML; the same metrics give the same bytes."""
    heads = [
        [f"{WORDS[line['measure']]}: {plain(line['best'])} with the best partner, mean over layers",
         f"shuffled prompts: {plain(line['null'])}; above all of them at {100 * line['beyond']:.0f} % of the layers"]
        for line in metrics["summary"] if line["best"] is not None and line["null"] is not None
    ]  # fmt: skip
    about = f"{metrics['a']} and {metrics['b']}: {metrics['rows']:,} rows of {metrics['prompts']:,} prompts"
    return page(title=name, subtitle=about, headlines=heads, warnings=list(metrics["warnings"]),
                sections=list(_sections(metrics, frame)), footer=FOOTER)  # fmt: skip


def _sections(metrics: Mapping[str, Any], frame: pd.DataFrame) -> Iterable[dict[str, Any]]:
    names = (str(metrics["a"]), str(metrics["b"]))
    yield section("Best partners", SAYS["best"], figure=plots.similarity_best(frame, names=names))
    for line in metrics["summary"]:
        measure = line["measure"]
        rows = [one for one in metrics["best"] if one["measure"] == measure]
        figure = plots.similarity_heatmap(frame, measure, names=names)
        yield section(
            WORDS[measure].replace("(", "").replace(")", ""), SAYS[measure], figure=figure, tables=[_table(rows)]
        )
    parts = (("Job", metrics["job"]), ("Settings", metrics["settings"]), ("Environment", metrics["environment"]))
    yield section("Provenance", tables=[facts(title, flat(part)) for title, part in parts])


def _table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    made = []
    for one in rows:
        span = "" if one["low"] is None else f"{plain(one['low'])} to {plain(one['high'])}"
        null = "" if one["null"] is None else plain(one["null"])
        top = "" if one["null_high"] is None else f"at most {plain(one['null_high'])}"
        cells = [cell(str(one["b"])), cell((plain(one["value"]), span)), cell((null, top))]
        made.append({"title": str(one["a"]), "cells": cells, "style": ""})
    return table(["layer", "most like", "likeness", "shuffled prompts"], made)
