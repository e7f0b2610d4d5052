"""The report of a transport run: its numbers, figures and warnings on one page that needs no network."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import transport_plots as plots
from workbench.atomic import write_text
from workbench.errors import UserError
from workbench.report_page import cell, facts, flat, page, section, table
from workbench.summary import plain
from workbench.transport.grid import TransportGrid

if TYPE_CHECKING:
    import pandas as pd

FORMAT = "workbench.transport"
CURVES = 6  # figures of single targets
FOOTER = (
    "R² is of prompts that no map has seen. Intervals are 95 %: for R² the jackknife over shards of held-out prompts "
    "(Student's t), the map as it was fitted; for causal figures over sequences, paired with the untouched model."
)
SAYS = {
    "grid": "How much of each later layer a linear map of an earlier one predicts {from_where}; beside it the same "
    "fit with the sources of other prompts, which carries nothing. Rows at position 0 (BOS) are left out.",
    "bos": "The same with the rows at position 0. Their activations are massive and always alike, so that they lift R² "
    "whatever the map does: read the grid without them. The shuffled control keeps BOS rows among themselves, so what "
    "it scores here is that lift.",
    "routes": "Where attention took the sources from, without position 0: the share of tokens that have themselves or the "
    "one before as their source, how many tokens back it lies on average, and the share of the attention (mean over heads "
    "and over the layers between) that it has. One map is fitted to all of them.",
    "curves": "One target, every source, beside the baselines.",
    "efficiency": "Solid: the best map of each rank, on held-out rows; dashed: the ridge map cut to that rank; dotted: "
    "what no affine map of that rank exceeds on those rows. Efficiency is the ratio.",
    "sizes": "Dimensions that are carried, each beside what independent data of this size would show.",
    "features": "Each point is a feature of a dictionary at the target. Right: it lay there already at the source "
    "(transported); up but left: predicted from other directions (rotated); low: made on the way, or not linear.",
    "causal": "The state at the target is replaced at every token but BOS by what each arm makes of the source; bars are "
    "the rise of log-perplexity over the untouched model.",
    "shortcut": "Blocks left out and replaced by one map: what it saves and what it costs. The greedy search chose its "
    "blocks on one half of the prompts and is measured on the other.",
}
FROM_WHERE = {
    "same": "at the same token",
    "previous": "from the token before",
    "random": "from an earlier token, drawn evenly",
    "shuffled": "from a token of another prompt",
    "attention": "from the token that the attention between the two layers sends most weight to",
}


def write_transport_report(run: str | Path) -> Path:
    """Writes report.html of a transport run's folder and returns its path. Raises UserError where the run has no results."""
    folder = Path(run)
    target = folder / "report.html"
    write_text(target, render_transport(folder))
    return target


def render_transport(folder: Path) -> str:
    """The report as HTML; the same folder gives the same bytes."""
    metrics, grid = _metrics(folder), TransportGrid.load(folder / "grid")
    job = metrics["job"]
    about = f"{job['n_prompts']} prompts of {job['prompts']}, positions {job['positions']}, alpha {job['alpha']}"
    return page(
        title=str(job["name"]), subtitle=about, headlines=[_headline(grid)], warnings=list(metrics["warnings"]),
        sections=list(_sections(folder, metrics, grid)), footer=FOOTER,
    )  # fmt: skip


def _metrics(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise UserError(f"{folder} has no results of a transport: its metrics.json cannot be read") from err
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{folder / 'metrics.json'} is not that of a transport; run it with `workbench transport`")
    return found


def _headline(grid: TransportGrid) -> list[str]:
    found = grid.frame().query("arm == 'ridge' and not bos")
    best, worst = (found.loc[found["r2_uniform"].agg(which)] for which in ("idxmax", "idxmin"))
    line = [f"{c['source']} to {c['target']} {c['r2_uniform']:.3f} ({c['r2_uniform_low']:.3f} to {c['r2_uniform_high']:.3f})"
            for c in (best, worst)]  # fmt: skip
    rest = "R² over dimensions, held out, without BOS."
    if "shuffled" in grid.arms:
        control = grid.frame().query("arm == 'shuffled' and not bos")["r2_uniform"]
        rest += f" Shuffled pairs score {control.min():.4f} to {control.max():.4f}."
    return [f"Carried best: {line[0]}. Carried least: {line[1]}.", rest]


def _sections(folder: Path, metrics: Mapping[str, Any], grid: TransportGrid) -> Iterable[dict[str, Any]]:
    says = SAYS["grid"].format(from_where=FROM_WHERE[grid.meta["positions"]])
    yield section("Grid", says, figure=plots.grid_heatmap(grid), tables=[_lines(grid, bos=False)])
    if grid.has_bos:
        yield section(
            "With BOS", SAYS["bos"], figure=plots.grid_heatmap(grid, bos=True), tables=[_lines(grid, bos=True)]
        )
    if routing := grid.meta.get("routing"):
        heads = ["itself", "previous", "distance", "weight"]
        rows = [_row(pair.replace(">", " to "), [plain(found[h]) for h in heads]) for pair, found in routing.items()]
        yield section("Routes", SAYS["routes"], tables=[table(["pair", *heads], rows)])
    targets = list(dict.fromkeys(str(b) for _, b in grid.pairs))
    for target in targets[-CURVES:]:
        title = f"Into {target}".replace(".", " ")
        yield section(title, SAYS["curves"], figure=plots.grid_curves(grid, target=target))
    yield from _efficiency(folder, metrics)
    yield from _features(folder, metrics)
    if (found := _parquet(folder / "causal.parquet")) is not None:
        keys = ("log_perplexity", "delta", "kl", "agreement")
        tables = [_figures(found, ["source", "target", "arm"], keys, "pair and arm")]
        yield section("Causal", SAYS["causal"], figure=plots.causal_bars(found), tables=tables)
    if (found := _parquet(folder / "shortcut.parquet")) is not None:
        single, greedy = (found[found["search"] == name] for name in ("single", "greedy"))
        tables = [_figures(found, ["search", "blocks"], ("saved", "delta", "kl", "agreement"), "blocks left out")]
        yield section("Shortcuts", SAYS["shortcut"], figure=plots.shortcut_points(single, greedy), tables=tables)
    parts = (("Job", metrics["job"]), ("Grid", grid.meta), ("Environment", metrics["environment"]))
    yield section("Provenance", tables=[facts(title, flat({k: v for k, v in part.items() if k not in ("warnings", "routing")}))
                                        for title, part in parts])  # fmt: skip


def _efficiency(folder: Path, metrics: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    found = _parquet(folder / "efficiency.parquet")
    if found is None:
        return
    sizes = metrics["efficiency"]["sizes"]
    columns = ("optimal", "bound", "efficiency", "sum_rho2", "sum_rho2_null", "wachter_count", "held_out_sum",
               "held_out_count", "dim_lin", "dim_lin_null")  # fmt: skip
    rows = [_row(f"{s['source']} to {s['target']}", [plain(float(s[c])) for c in columns]) for s in sizes]
    heads = ["pair", *(c.replace("_", " ") for c in columns)]
    yield section("Efficiency", SAYS["efficiency"], figure=plots.efficiency_by_rank(found),
                  tables=[table(heads, rows, "At full rank, and the size of what is carried", SAYS["sizes"])])  # fmt: skip


def _features(folder: Path, metrics: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    found = _parquet(folder / "features.parquet")
    if found is None:
        return
    parts = {
        f"{a} to {b}": part.set_index("feature") for (a, b), part in found.groupby(["source", "target"], sort=False)
    }
    lines = metrics["features"]["pairs"]
    columns = [c for c in lines[0] if c not in ("source", "target")]
    rows = [_row(f"{p['source']} to {p['target']}", [plain(p[c]) for c in columns]) for p in lines]
    heads = ["pair", *("median " + c.replace("_", " ") if c in ("r2", "identity_r2", "control_r2", "f1") else c
                       for c in columns)]  # fmt: skip
    yield section("Features", SAYS["features"], figure=plots.feature_scatter(parts), tables=[table(heads, rows)])


def _parquet(file: Path) -> pd.DataFrame | None:
    import pandas as pd

    if not file.is_file():
        return None
    found = pd.read_parquet(file)
    return None if found.empty else found


def _lines(grid: TransportGrid, *, bos: bool) -> dict[str, Any]:
    """Pairs down, arms across."""
    part = grid.frame().query("bos == @bos")
    rows = []
    for a, b in grid.pairs:
        mine = part[(part["source"] == str(a)) & (part["target"] == str(b))].set_index("arm")
        cells = [_interval(mine.loc[arm]) if arm in mine.index else cell("–") for arm in grid.arms]
        ridge = mine.loc["ridge"].to_dict()
        cells += [cell(f"{ridge[f'r2_{m}']:.4f}") for m in ("weighted", "whitened")] + [cell(plain(ridge["alpha"]))]
        rows.append({"title": f"{a} to {b}", "cells": cells, "style": ""})
    n = part[part["arm"] == "ridge"].iloc[0]
    note = (f"R² uniform over dimensions, with its 95 % interval; fitted on {n['n_train']} rows, scored on "
            f"{n['n_held_out']}.")  # fmt: skip
    return table(["pair", *grid.arms, "ridge, weighted", "ridge, whitened", "alpha"], rows, note=note)


def _interval(line: Any) -> dict[str, Any]:
    value, low, high = (float(line[f"r2_uniform{end}"]) for end in ("", "_low", "_high"))
    return cell((f"{value:.4f}", f"{low:.4f} to {high:.4f}"))


def _figures(found: pd.DataFrame, title: Sequence[str], keys: Sequence[str], head: str) -> dict[str, Any]:
    rows = []
    for line in found.to_dict("records"):
        cells = [(plain(line[k]), f"{plain(line[f'{k}_low'])} to {plain(line[f'{k}_high'])}" if f"{k}_low" in line else "")
                 for k in keys]  # fmt: skip
        name = ", ".join(str(line[t]) or "none" for t in title)
        rows.append({"title": name, "cells": [cell(c) for c in cells], "style": ""})
    return table([head, *(k.replace("_", " ") for k in keys)], rows)


def _row(title: str, cells: Sequence[str]) -> dict[str, Any]:
    return {"title": title, "cells": [cell(c) for c in cells], "style": ""}
