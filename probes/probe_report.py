"""The report of a run of probes: curve, calibration, directions and eraser on one page that needs no network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import probe_plots as plots
from workbench.errors import UserError
from workbench.parquet_files import read_frame
from workbench.report_page import cell, facts, flat, page, section, table
from workbench.small_files import read_from, read_json
from workbench.summary import plain

if TYPE_CHECKING:
    import pandas as pd

FOOTER = (
    "Every figure is of prompts that no probe has seen; a prompt that stands twice is one. Intervals are 95 %, by resampling "
    "prompts (Wilson's where all resamples agree)."
)
SAYS = {
    "curve": "One probe for each layer. Control task: labels drawn at random for each {of}; what a probe makes of them it "
    "makes by memory, and selectivity is what is left (Hewitt and Liang). Shuffled: learned from shuffled labels. Words: the "
    "same task from the words of the prompt, or the token, alone: what is no higher than that needs no model.",
    "calibration": "The probe with the best figure, {where}. It was chosen on the rows that it is scored on, so its figure is "
    "a little too good where there are many probes.",
    "directions": "How well the place of a row along each direction tells {towards} from the rest. Each is saved in adapters/ "
    "as a steering vector, as long as the whole distance of the means, so that the methods can be compared.",
    "eraser": "LEACE, fitted to the training prompts, at {site}: the smallest affine change after which the label is "
    "uncorrelated with every coordinate. Before and after: a probe trained on plain and on erased rows, scored on other "
    "prompts.",
}


def render_probe(metrics: Mapping[str, Any], lines: pd.DataFrame, name: str) -> str:
    """The report as HTML; the same metrics give the same bytes."""
    job = metrics["job"]
    what = f"{len(metrics['classes'])} classes" if metrics["classes"] else "a quantity"
    about = f"{metrics['kind']} probes of {metrics['label']} ({what}) in {job['store']}, model {metrics['settings']['model']}"
    return page(title=name, subtitle=about, headlines=_heads(metrics), warnings=list(metrics["warnings"]),
                sections=list(_sections(metrics, lines)), footer=FOOTER)  # fmt: skip


def _heads(metrics: Mapping[str, Any]) -> list[list[str]]:
    """A sentence on the best probe and one on its control, each with what follows it."""
    best, score = metrics["best"], str(metrics["score"])
    top = next(x for x in metrics["lines"] if (x["site"], x["positions"]) == (best["site"], best["positions"]))
    heads = [[f"Best {plots.SCORE_WORDS[score]} {plain(top[score])} at {best['site']}, positions {best['positions']}",
              f"95 % interval {plain(top[f'{score}_low'])} to {plain(top[f'{score}_high'])}; {top['n_held_out']:,} rows of "
              f"{top['prompts_held_out']:,} prompts"]]  # fmt: skip
    if top.get("selectivity") is not None:
        heads.append([f"Selectivity {plain(top['selectivity'])}", f"over the control task ({plain(top['control'])})"])
    return heads


def probe_headlines(run: str | Path) -> list[str]:
    """What a finished run of probes found, in sentences. Raises UserError where it has no figures that can be read."""
    with read_from(Path(run) / "metrics.json"):
        metrics = _metrics_of(run)
        return [
            f"{metrics['kind']} probes of {metrics['label']}: {'; '.join('; '.join(head) for head in _heads(metrics))}"
        ]


def render_probe_run(run: str | Path) -> str:
    """`render_probe` of a finished run folder, from its numbers; UserError as `probe_headlines`."""
    try:
        lines = read_frame(Path(run) / "probes.parquet")
    except (OSError, ValueError) as err:
        raise UserError(f"{run}: its probes.parquet cannot be read; run the probes again") from err
    with read_from(Path(run) / "metrics.json"):
        return render_probe(_metrics_of(run), lines, Path(run).name)


def _metrics_of(run: str | Path) -> dict[str, Any]:
    try:
        found = read_json(Path(run) / "metrics.json")
    except (OSError, ValueError) as err:
        raise UserError(f"{run}: its metrics.json cannot be read; run the probes again") from err
    return dict(found)


def _sections(metrics: Mapping[str, Any], lines: pd.DataFrame) -> Iterable[dict[str, Any]]:
    of = {"token": "token type", "prompt": "prompt (the label is the prompt's)"}[metrics["control_of"]]
    yield section("Curve", SAYS["curve"].format(of=of), figure=plots.probe_layers(lines), tables=[_lines(metrics)])
    if metrics["classes"]:
        found = metrics["calibration"]
        where = f"{metrics['best']['site']}, positions {metrics['best']['positions']}"
        figure = plots.probe_calibration(found["reliability"], found["ece"], found["confusion"], metrics["classes"])
        yield section("Calibration", SAYS["calibration"].format(where=where), figure=figure)
    if metrics.get("directions"):
        yield _directions(metrics)
    if metrics.get("erasure"):
        yield _eraser(metrics["erasure"])
    parts = (("Job", metrics["job"]), ("Settings", metrics["settings"]), ("Environment", metrics["environment"]))
    yield section("Provenance", tables=[facts(title, flat(part)) for title, part in parts])


def _lines(metrics: Mapping[str, Any]) -> dict[str, Any]:
    score = str(metrics["score"])
    figures = [score, *(["auroc", "ece"] if score == "accuracy" else ["mae"]), "control", "shuffled", "selectivity"]
    found = [f for f in figures if any(line.get(f) is not None for line in metrics["lines"])]
    rows = [
        _row(f"{line['site']}, {line['positions']}", [_estimate(line, key) for key in found])
        for line in metrics["lines"]
    ]
    words = {"accuracy": "accuracy", "auroc": "AUROC", "ece": "calibration error", "r2": "R²", "mae": "mean absolute error",
             "control": "control task", "shuffled": "shuffled labels", "selectivity": "selectivity"}  # fmt: skip
    alone = "; ".join(f"{at}: {plain(line[score])}" for at, line in metrics["words"].items())
    note = f"Words or tokens alone: {alone}." if alone else ""
    return table(["probe", *(words[f] for f in found)], rows, note=note)


def _directions(metrics: Mapping[str, Any]) -> dict[str, Any]:
    import pandas as pd

    found = pd.DataFrame(metrics["directions"])
    rows = [
        _row(f"{d['site']}, {d['method']}", [_estimate(d, "auroc"), plain(d["gap"]), plain(d["length"])])
        for d in metrics["directions"]
    ]
    says = SAYS["directions"].format(towards=metrics["job"]["towards"])
    heads = ["direction", "AUROC", "gap between the means along it", "whole distance of the means"]
    return section("Directions", says, figure=plots.direction_table(found), tables=[table(heads, rows)])


def _eraser(found: Mapping[str, Any]) -> dict[str, Any]:
    rows = [_row(arm, [_estimate(found[arm], key) for key in ("accuracy", "auroc")]) for arm in ("before", "after")]
    note = (f"The commonest class alone: {plain(found['chance'])}. Rank {found['rank']}; the rows move by "
            f"{plain(100 * found['changed'])} % of their variance.")  # fmt: skip
    return section(
        "Eraser", SAYS["eraser"].format(site=found["site"]), tables=[table(["", "accuracy", "AUROC"], rows, note=note)]
    )


def _estimate(line: Mapping[str, Any], key: str) -> tuple[str, str] | str:
    if line.get(key) is None:
        return ""
    if line.get(f"{key}_low") is None:
        return plain(line[key])
    return plain(line[key]), f"{plain(line[f'{key}_low'])} to {plain(line[f'{key}_high'])}"


def _row(title: str, cells: Sequence[tuple[str, str] | str]) -> dict[str, Any]:
    return {"title": title, "cells": [cell(c) for c in cells], "style": ""}
