"""The report of a transport run: its numbers, figures and warnings on one page that needs no network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import transport_plots as plots
from workbench.atomic import write_text
from workbench.report_page import cell, facts, flat, page, section, table
from workbench.sites import Site
from workbench.small_files import read_from
from workbench.summary import plain
from workbench.transport.grid import TransportGrid

from .transport_results import read_metrics, read_part
from .transport_summary import half_rank, headlines, score

if TYPE_CHECKING:
    import pandas as pd

EXAMPLES = 3
"""features of each verdict that are shown by name"""
PREDICTED = 0.5
"""R2 of a feature's read-out over all tokens from which it counts as predicted there"""
FOOTER = (
    "R² is of prompts that no map has seen. Intervals are 95 %: for R² the jackknife over shards of held-out prompts "
    "(Student's t), the map as it was fitted; for features the jackknife over shards of prompts; for causal figures over "
    "sequences, paired with the untouched model."
)
SAYS = {
    "grid": "How much of each later layer a linear map of an earlier one predicts {from_where}: 1 is all of its variance, "
    "0 no more than its mean. Beside it the same fit with the sources of other prompts, which can carry nothing. Rows at "
    "position 0 (BOS) are left out. Of the baselines, identity takes the source as it is, identity + bias adds a constant, "
    "Procrustes also rotates.",
    "bos": "The same with the rows at position 0. They are nearly alike in every prompt and may be very long, so that they "
    "lift R² whatever the map does: read the grid without them. The shuffled control keeps BOS rows among themselves, so "
    "what it scores here is that lift.",
    "routes": "Where attention took the sources from, without position 0: the share of tokens that have themselves or the "
    "one before as their source, how many tokens back it lies on average, and the share of the attention (mean over heads "
    "and over the layers between) that it has. One map is fitted to all of them.",
    "curves": "R² of every arm with its 95 % interval; what falls below -0.5 leaves the axes. The gap between the map and "
    "the baselines is what needs more than the residual stream's plain copy.",
    "efficiency": "Solid: the best map of each rank, on held-out rows; dashed: the ridge map cut to its leading directions, "
    "as the released code does it (what falls below -0.25 leaves the axes); dotted: what no affine map of that rank exceeds "
    "on those rows. Efficiency is the ratio. Whitened R² counts every direction of the target alike, however small.",
    "sizes": "Canonical correlations ρ between source and target, over all rows. Sum of ρ²: whitened dimensions carried, in "
    "sample and held out. Count: correlations above what independent data would show (Wachter's edge; held out, about 5 in a "
    "hundred sets of independent data count one or more). Participation ratio: the published size, (Σρ)² / Σρ², which "
    "independent data of this "
    "shape nearly has too. Ceiling: of the training rows alone, the sum of ρ² as a share of the target's dimensions, which no "
    "affine map exceeds in sample; it counts the noise, about d/n, and is beside it with that removed. No score here is "
    "divided by it: the bound is of the held-out rows. Small print: the value of independent data.",
    "features": "For each feature of a dictionary at the target: transported, the map predicts it and its own direction "
    "at the source does too, so it lay there already; rotated, the map predicts it from other directions; synthesised, it "
    "does not, so how strongly it fires was made on the way or is not linear; mixed, in between; rare, it fires too seldom "
    "to tell. Predicted means how strongly it fires on the tokens where it does.",
    "scatter": "One point is one feature, over the held-out tokens on which it fires. Up: the map predicts how strongly it "
    "fires. Right: the source predicts it along the feature's own direction. Points at the lower edge lie below it.",
    "causal": "The state at the target is replaced at every token but BOS by what each arm makes of the source, and the "
    "model goes on from there. Identity writes the source's own state, mean the target's mean over training rows, bias and "
    "zero the operator's constant and nothing at all. Zero may do less harm than the mean: it is no lower bound.",
    "shift": "The maps were fitted on {fitted}, the text here is {read}: where the two are of different kinds, part of what "
    "the map costs is that.",
    "shortcut": "Blocks left out and replaced by one map: what it saves (the map's own cost taken off) and what it costs. "
    "The greedy search chose its blocks on one half of the prompts and is measured on the other.",
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
    metrics, grid = read_metrics(folder), TransportGrid.load(folder / "grid")
    job = metrics["job"]
    line = next(x for x in grid.frame().query("arm == 'ridge' and not bos").to_dict("records"))
    about = (
        f"{job['n_prompts']:,} prompts of {job['prompts']}, tokens {job['tokens']}, positions {job['positions']}, alpha "
        f"{job['alpha']}; fitted on {line['n_train']:,} rows, scored on {line['n_held_out']:,} of other prompts"
    )
    heads = headlines(metrics, grid, read_part(folder / "efficiency.parquet"))
    return page(
        title=str(job["name"]), subtitle=about, headlines=heads, warnings=list(metrics["warnings"]),
        sections=list(_sections(folder, metrics, grid)), footer=FOOTER,
    )  # fmt: skip


def run_headlines(run: str | Path) -> list[str]:
    """What a finished transport run found, a line for each part. Raises UserError where the run has no results."""
    folder = Path(run)
    grid, efficiency = TransportGrid.load(folder / "grid"), read_part(folder / "efficiency.parquet")
    with read_from(folder / "metrics.json"):
        return [" ".join(head) for head in headlines(read_metrics(folder), grid, efficiency)]


def _sections(folder: Path, metrics: Mapping[str, Any], grid: TransportGrid) -> Iterable[dict[str, Any]]:
    says = SAYS["grid"].format(from_where=FROM_WHERE[grid.meta["positions"]])
    yield section("Grid", says, figure=plots.grid_heatmap(grid), tables=[_lines(grid)])
    for site, key in ((str(grid.pairs[0][0]), "source"), (str(grid.pairs[-1][1]), "target")):
        curve = plots.grid_curves(grid, **{key: site})
        yield section(f"{'From' if key == 'source' else 'Into'} {site}".replace(".", " "), SAYS["curves"], figure=curve)
    if grid.has_bos:
        yield section("With BOS", SAYS["bos"], tables=[_bos(grid)])
    if routing := grid.meta.get("routing"):
        heads = ["itself", "previous", "distance", "weight"]
        rows = [_row(pair.replace(">", " to "), [plain(found[h]) for h in heads]) for pair, found in routing.items()]
        yield section("Routes", SAYS["routes"], tables=[table(["pair", *heads], rows)])
    yield from _efficiency(folder, metrics, grid)
    yield from _features(folder, metrics)
    if (found := read_part(folder / "causal.parquet")) is not None:
        job, about = metrics["job"], metrics["causal"]
        shift = SAYS["shift"].format(fitted=job["prompts"], read=about["prompts"])
        yield section("Causal", SAYS["causal"], *([shift] if not str(about["prompts"]).endswith("(held out)") else []),
                      figure=plots.causal_points(found), tables=_causal(found, about))  # fmt: skip
    if (found := read_part(folder / "shortcut.parquet")) is not None:
        single, greedy = (found[found["search"] == name] for name in ("single", "greedy"))
        yield section("Shortcuts", SAYS["shortcut"], figure=plots.shortcut_points(single, greedy),
                      tables=[_shortcuts(single, "One run of blocks"), _shortcuts(greedy, "Greedy search")])  # fmt: skip
    parts = (("Job", metrics["job"]), ("Grid", grid.meta), ("Environment", metrics["environment"]))
    yield section("Provenance", tables=[facts(title, flat({k: v for k, v in part.items() if k not in ("warnings", "routing")}))
                                        for title, part in parts])  # fmt: skip


def _efficiency(folder: Path, metrics: Mapping[str, Any], grid: TransportGrid) -> Iterable[dict[str, Any]]:
    found = read_part(folder / "efficiency.parquet")
    if found is None:
        return
    cells = {(str(a), str(b)): grid.cell(a, b) for a, b in grid.pairs}
    parts = dict(iter(found.groupby(["source", "target"], sort=False)))
    rows = []
    for s in metrics["efficiency"]["sizes"]:
        key, count = (s["source"], s["target"]), f"of {min(s['rank_x'], s['rank_y'])}"
        full = parts[key].iloc[-1]
        held_null, train_null = (plain(s["rank_x"] / (cells[key][n] - 1)) for n in ("n_held_out", "n_train"))
        rows.append(_row(plots.pair_title(*key), [
            plain(s["optimal"]), (plain(s["bound"]), held_null), plain(s["efficiency"]),
            (str(half_rank(parts[key])), f"of {s['rank_y']}"), (plain(s["sum_rho2"]), plain(s["sum_rho2_null"])),
            (plain(s["held_out_sum"]), "0"), (str(s["wachter_count"]), count), (str(s["held_out_count"]), count),
            (plain(s["dim_lin"]), plain(s["dim_lin_null"])),
            (plain(full["ceiling"]), train_null), (plain(full["ceiling_corrected"]), "0"),
        ]))  # fmt: skip
    heads = ["pair", "whitened R², full rank", "bound", "efficiency", "rank of half the R²", "sum of ρ²",
             "held-out sum", "count", "held-out count", "participation ratio", "ceiling, in sample",
             "ceiling without noise"]  # fmt: skip
    yield section("Efficiency", SAYS["efficiency"], figure=plots.efficiency_by_rank(found),
                  tables=[table(heads, rows, "The size of what is carried", SAYS["sizes"])])  # fmt: skip


def _features(folder: Path, metrics: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    found = read_part(folder / "features.parquet")
    if found is None:
        return
    lines = metrics["features"]["pairs"]
    medians = ("r2", "identity_r2", "control_r2", "f1")
    heads = ["pair", *plots.VERDICT_LOOK, "median R²", "of the identity", "of shuffled pairs", "median F1 of firing",
             "synthesised, R² over all tokens ≥ 0.5"]  # fmt: skip
    made = (
        found[(found["verdict"] == "synthesised") & (found["r2_all"] >= PREDICTED)].groupby(["source", "target"]).size()
    )
    rows = [_row(plots.pair_title(p["source"], p["target"]),
                 [*(f"{p[v]:,}" for v in plots.VERDICT_LOOK), *(plain(p.get(k)) for k in medians),
                  f"{made.get((p['source'], p['target']), 0):,}"])
            for p in lines]  # fmt: skip
    note = (f"Over {lines[0]['tokens']:,} held-out tokens; R² of a feature over those on which it fires, where a constant "
            "scores 0 and a prediction of no use far less. The last column counts synthesised features whose read-out the map "
            "does predict over all tokens: where they are high, but not how high they are there.")  # fmt: skip
    yield section(
        "Features", SAYS["features"], figure=plots.verdict_bars(lines), tables=[table(heads, rows, note=note)]
    )
    parts = {(a, b): part.set_index("feature") for (a, b), part in found.groupby(["source", "target"], sort=False)}
    far = max(parts, key=lambda pair: Site.parse(pair[1]).layer - Site.parse(pair[0]).layer)
    tables = [_examples(parts[pair], pair) for pair in dict.fromkeys((next(reversed(parts)), far))]
    scatter = plots.feature_scatter({plots.pair_title(*pair): part for pair, part in parts.items()})
    yield section("Feature by feature", SAYS["scatter"], figure=scatter, tables=tables)


def _examples(part: pd.DataFrame, pair: tuple[str, str]) -> dict[str, Any]:
    """Of each verdict the features that fire most often: not those that make the best example."""
    rows = []
    for verdict in (v for v in plots.VERDICT_LOOK if v != "rare"):
        chosen = part[part["verdict"] == verdict].sort_values("count", ascending=False, kind="stable")[:EXAMPLES]
        for number, f in chosen.iterrows():
            rows.append(_row(f"{verdict}: {f.get('name') or '(no name)'}", [
                str(number), f"{int(f['count']):,}", (plain(f["r2"]), f"{plain(f['r2_low'])} to {plain(f['r2_high'])}"),
                plain(f["identity_carries"]), plain(f["control_r2"]),
                (plain(f["f1"]), f"{plain(f['f1_low'])} to {plain(f['f1_high'])}"),
            ]))  # fmt: skip
    heads = ["verdict and hardest tokens", "feature", "fires on", "R² of the map", "identity carries", "R² of shuffled",
             "F1 of firing"]  # fmt: skip
    note = f"Of each verdict the {EXAMPLES} that fire on most tokens, whatever their figures."
    return table(heads, rows, f"{plots.pair_title(*pair)}: features by the tokens that they fire on hardest", note)


def _lines(grid: TransportGrid) -> dict[str, Any]:
    """Pairs down, arms across, without BOS."""
    part = grid.frame().query("not bos")
    rows = []
    for a, b in grid.pairs:
        mine = part[(part["source"] == str(a)) & (part["target"] == str(b))].set_index("arm")
        ridge = mine.loc["ridge"].to_dict()
        cells = [_interval(mine.loc[arm]) if arm in mine.index else "–" for arm in grid.arms]
        cells += [score(ridge[f"r2_{m}"]) for m in ("weighted", "whitened")]
        rows.append(_row(plots.pair_title(a, b), cells))
    alphas = sorted({f"{x:g}" for x in part[part["arm"] == "ridge"]["alpha"]})
    note = (f"Ridge penalty {', '.join(alphas)} mean diagonals of X'X. Weighted: dimensions count by their variance; "
            "whitened: every direction alike.")  # fmt: skip
    heads = ["pair", *map(plots.arm_word, grid.arms), "map, weighted", "map, whitened"]
    return table(heads, rows, "Held-out R², mean over dimensions", note=note)


def _bos(grid: TransportGrid) -> dict[str, Any]:
    arms = [arm for arm in ("ridge", "shuffled") if arm in grid.arms]
    rows = [_row(plots.pair_title(a, b),
                 [_interval(grid.cell(a, b, arm=arm, bos=bos)) for arm in arms for bos in (False, True)])
            for a, b in grid.pairs]  # fmt: skip
    heads = [f"{plots.arm_word(arm)}, {words}" for arm in arms for words in ("without BOS", "with BOS")]
    return table(["pair", *heads], rows, "Held-out R², mean over dimensions")


def _interval(line: Any) -> tuple[str, str]:
    value, low, high = (float(line[f"r2_uniform{end}"]) for end in ("", "_low", "_high"))
    return score(value), f"{score(low)} to {score(high)}"


def _causal(found: pd.DataFrame, about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Pairs down, arms across: what each costs; then KL and agreement in a second table."""
    arms = [str(arm) for arm in dict.fromkeys(found["arm"]) if arm != "untouched"]
    by_pair = {pair: part.set_index("arm") for pair, part in found.groupby(["source", "target"], sort=False)}
    plain_loss = _estimate(found[found["arm"] == "untouched"].iloc[0], "log_perplexity")
    note = (f"{about['sequences']:,} prompts of {about['prompts']}, {about['tokens']:,} predicted tokens; the untouched model "
            f"has {plain_loss[0]} ({plain_loss[1]}).")  # fmt: skip
    few = [arm for arm in ("transported", "identity", "mean") if arm in arms]

    def cells(part: pd.DataFrame, key: str, some: list[str]) -> list[Any]:
        return [
            _estimate(part.loc[arm], key) if arm in part.index else "–" for arm in some
        ]  # no identity of two widths

    costs = [_row(plots.pair_title(*pair), cells(part, "delta", arms)) for pair, part in by_pair.items()]
    more = [_row(plots.pair_title(*pair), [*cells(part, "kl", few), *cells(part, "agreement", few)])
            for pair, part in by_pair.items()]  # fmt: skip
    heads = [f"{word}, {arm}" for word in ("KL", "agreement") for arm in few]
    return [
        table(["pair", *arms], costs, "Rise of log-perplexity (nats per token)", note),
        table(["pair", *heads], more, "KL from the untouched model (nats per token), and share of equal top-1 tokens"),
    ]


def _shortcuts(found: pd.DataFrame, title: str) -> dict[str, Any]:
    rows = [_row(f"blocks {x['blocks']}" if x["blocks"] else "none",
                 [f"{100 * x['saved']:.1f} %", *(_estimate(x, key) for key in ("delta", "kl", "agreement"))])
            for x in found.to_dict("records")]  # fmt: skip
    heads = ["left out", "FLOPs saved", "rise of log-perplexity (nats)", "KL (nats)", "top-1 agreement"]
    return table(heads, rows, title)


def _estimate(line: Any, key: str) -> tuple[str, str]:
    return plain(line[key]), f"{plain(line[f'{key}_low'])} to {plain(line[f'{key}_high'])}"


def _row(title: str, cells: Sequence[tuple[str, str] | str]) -> dict[str, Any]:
    return {"title": title, "cells": [cell(c) for c in cells], "style": ""}
