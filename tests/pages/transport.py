"""docs/transport.md: what the transport of the bundled recipient shows, from one run of `workbench transport`.

`measure` runs it and returns the numbers as JSON values (kept in docs/transport.json), `page` tells them. What the text
says of them in words is asserted in tests/pages/test_transport_page.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from jinja2 import Environment, StrictUndefined

from probes.transport_job import TransportJob
from probes.transport_run import run_transport
from probes.transport_summary import half_rank, score
from workbench import transport_plots as plots
from workbench.evaluate.causal import causal_effects
from workbench.evaluate.statistics import spearman
from workbench.models import Model, load
from workbench.profile import profile_model
from workbench.prompts import PromptSet
from workbench.sites import Site
from workbench.summary import plain
from workbench.transport import TransportGrid, transport_grid

from ..benchmarks.tables import table

ROOT = Path(__file__).resolve().parents[2]
KEPT, PAGE = ROOT / "docs" / "transport.json", ROOT / "docs" / "transport.md"
TEMPLATE = Path(__file__).with_name("transport.md.jinja")
MODEL, PROMPTS, TEXT, MORE_TEXT = (
    "bundled:recipient",
    "bundled:profile",
    "bundled:evaluation_text",
    "bundled:validation_text",
)
DICTIONARIES = tuple(f"bundled:recipient.resid_post.{layer}" for layer in (1, 2, 3))
RANKS = (1, 8, 32, 64, 96, 128)
EXAMPLES = 3
Line = dict[str, Any]


def measure(folder: Path) -> dict[str, Any]:
    """Runs the verb into a folder and returns what the page tells."""
    model, prompts = load(MODEL, dtype="float32", device="cpu"), PromptSet.load(PROMPTS)
    run_transport(model, prompts, folder, TransportJob(MODEL, PROMPTS, dictionaries=DICTIONARIES))
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    grid = TransportGrid.load(folder / "grid")
    cells = [grid.cell(a, b) for a, b in grid.pairs]
    return rounded({
        "rows": {key: sorted({c[key] for c in cells}) for key in ("n_train", "n_held_out")},
        "prompts": metrics["job"]["n_prompts"], "shards": metrics["job"]["shards"], "alphas": grid.meta["alphas"],
        "grid": metrics["grid"]["lines"], "efficiency": _efficiency(folder, metrics), "features": _features(folder, metrics),
        "causal": metrics["causal"], "shortcut": metrics["shortcut"]["lines"], "shift": _shift(model, grid),
        "versions": metrics["environment"]["versions"],
    })  # fmt: skip


def _efficiency(folder: Path, metrics: Line) -> list[Line]:
    curves = pd.read_parquet(folder / "efficiency.parquet")
    made = []
    for line in metrics["efficiency"]["sizes"]:
        part = curves[(curves["source"] == line["source"]) & (curves["target"] == line["target"])]
        at = part.set_index("rank").loc[list(RANKS), ["optimal", "truncated", "bound", "efficiency"]]
        first = part["rank"][part["truncated"] > 0]
        made.append({**line, "half_rank": half_rank(part), "truncated_above_0": int(first.iloc[0]),
                     "curve": at.reset_index().to_dict("records")})  # fmt: skip
    return made


def _features(folder: Path, metrics: Line) -> dict[str, Any]:
    found = pd.read_parquet(folder / "features.parquet")
    lines, examples = [], {}
    names = list(plots.VERDICT_LOOK)
    for line in metrics["features"]["pairs"]:
        part = found[(found["source"] == line["source"]) & (found["target"] == line["target"])]
        made = part[part["verdict"] == "synthesised"]
        shares = {f"{name}_share": line[name] / sum(line[v] for v in names) for name in names}
        one = Site.parse(line["target"]).layer - Site.parse(line["source"]).layer == 1
        lines.append({**line, **shares, "one_block": one, "synthesised_but_all": int((made["r2_all"] >= 0.5).sum())})
        keys = ["verdict", "feature", "name", "count", "r2", "r2_low", "r2_high", "identity_carries", "control_r2"]
        top = part.sort_values("count", ascending=False, kind="stable").groupby("verdict", sort=False).head(EXAMPLES)
        examples[plots.pair_title(line["source"], line["target"])] = top[keys].to_dict("records")
    return {"pairs": lines, "examples": {name: examples[name] for name in ("resid_post.2 → 3", "resid_post.0 → 3")}}


def _shift(model: Model, grid: TransportGrid) -> dict[str, Any]:
    """What the kind of the text costs: the same maps scored on the stories, and maps of other stories in their place."""
    text = PromptSet.load(TEXT)
    stories = transport_grid(model, PromptSet.load(MORE_TEXT), keep_maps=True)
    lines = []
    with profile_model(model, text, tokens="all") as store:
        later = torch.from_numpy(store.rows(["position"])["position"].to_numpy() > 0)
        for (a, b), operator in grid.operators.items():
            x, y = store.read(a)[later], store.read(b)[later]
            r2 = 1 - (operator(x) - y).square().sum(0) / (y - y.mean(0)).square().sum(0)
            arms = {"requests": operator, "stories": stories.operators[a, b]}
            found = causal_effects(model, text[:128], a, b, arms)
            less = found.difference("stories", "requests")
            line = {"source": str(a), "target": str(b), "r2_on_stories": float(r2.mean())}
            for name in arms:
                delta = found.arms[name].delta
                line |= {name: delta.value, f"{name}_low": delta.low, f"{name}_high": delta.high}
            lines.append(line | {"less": less.value, "less_low": less.low, "less_high": less.high})
    return {"rows": stories.cell(0, 1)["n_train"], "pairs": lines}


def rounded(value: Any) -> Any:
    """Six significant figures: more would change from machine to machine."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(part) for part in value]
    if hasattr(value, "item"):  # of numpy
        value = value.item()
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def figures(folder: Path, _kept: Line) -> dict[str, go.Figure]:
    """The pictures of the page, by name."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return {
        "grid": plots.grid_heatmap(TransportGrid.load(folder / "grid")),
        "efficiency": plots.efficiency_by_rank(pd.read_parquet(folder / "efficiency.parquet")),
        "features": plots.verdict_bars(metrics["features"]["pairs"]),
        "causal": plots.causal_points(pd.read_parquet(folder / "causal.parquet")),
    }


def page(kept: Line) -> str:
    """The page as markdown: the template, and every number of it from what was kept."""
    source = TEMPLATE.read_text(encoding="utf-8")
    template = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True).from_string(source)
    words = {"span": span, "percents": percents, "plain": plain, "score": score}
    return template.render(kept=kept, tables=tables(kept), cost_order=cost_order(kept), lines=lines_of(kept), **words)


def lines_of(kept: Line) -> dict[str, list[Line]]:
    """The lines that the text speaks of, by what they are."""
    found = {
        arm: [x for x in kept["grid"] if x["arm"] == arm and not x["bos"]] for arm in {x["arm"] for x in kept["grid"]}
    }
    for arm in ("ridge", "shuffled"):
        found[f"{arm} with BOS"] = [x for x in kept["grid"] if x["arm"] == arm and x["bos"]]
    for arm in {x["arm"] for x in kept["causal"]["lines"]}:
        found[f"causal {arm}"] = [x for x in kept["causal"]["lines"] if x["arm"] == arm]
    for name in ("single", "greedy"):
        found[name] = [x for x in kept["shortcut"] if x["search"] == name and x["skipped"]]
    return found


def span(lines: Iterable[Line], key: str) -> str:
    """The lowest and the highest of a figure, as `0.67 to 0.91`."""
    values = [line[key] for line in lines]
    write = score if key.startswith("r2") else plain
    low, high = write(min(values)), write(max(values))
    return low if low == high else f"{low} to {high}"


def percents(lines: Iterable[Line], key: str) -> str:
    """The lowest and the highest of a share, as `42 to 72 %`."""
    values = [f"{100 * line[key]:.0f}" for line in lines]
    low, high = min(values, key=float), max(values, key=float)
    return f"{low} %" if low == high else f"{low} to {high} %"


def cost_order(kept: Line) -> float:
    """Spearman's correlation of a pair's R2 with what its map costs the model."""
    r2 = {(x["source"], x["target"]): x["r2_uniform"] for x in lines_of(kept)["ridge"]}
    moved = lines_of(kept)["causal transported"]
    return float(spearman([r2[x["source"], x["target"]] for x in moved], [x["delta"] for x in moved]))


def tables(kept: Line) -> dict[str, str]:
    """Every table of the page, as markdown."""
    return {
        "grid": _grid_table(kept), "bos": _bos_table(kept), "ranks": _rank_table(kept), "sizes": _size_table(kept),
        "verdicts": _verdict_table(kept), "causal": _causal_table(kept), "shift": _shift_table(kept),
        "shortcut": _shortcut_table(kept),
        **{name: _example_table(found) for name, found in kept["features"]["examples"].items()},
    }  # fmt: skip


def _between(line: Line, key: str) -> str:
    write = score if key.startswith("r2") else plain
    return f"{write(line[key])} ({write(line[f'{key}_low'])} to {write(line[f'{key}_high'])})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _by_pair(lines: Sequence[Line], keys: Sequence[str], arm: str = "arm") -> dict[str, dict[str, Line]]:
    found: dict[str, dict[str, Line]] = {}
    for line in lines:
        if line[arm] in keys:
            found.setdefault(_pair(line), {})[line[arm]] = line
    return found


def _pair(line: Line) -> str:
    return plots.pair_title(line["source"], line["target"])


def _grid_table(kept: Line) -> str:
    arms = ("ridge", "procrustes", "identity_bias", "identity", "shuffled")
    found = _by_pair([x for x in kept["grid"] if not x["bos"]], arms)
    rows = [(pair, f"**{score(x['ridge']['r2_uniform'])}** {_between(x['ridge'], 'r2_uniform').partition(' ')[2]}",
             *(score(x[arm]["r2_uniform"]) for arm in arms[1:-1]), _between(x["shuffled"], "r2_uniform"),
             score(x["ridge"]["r2_weighted"]), score(x["ridge"]["r2_whitened"])) for pair, x in found.items()]  # fmt: skip
    return table(("pair", *(plots.arm_word(arm) for arm in arms), "map, weighted", "map, whitened"), rows)


def _bos_table(kept: Line) -> str:
    with_bos, without = (
        _by_pair([x for x in kept["grid"] if x["bos"] == bos], ("ridge", "shuffled")) for bos in (True, False)
    )
    rows = [(pair, *(_between(side[pair][arm], "r2_uniform") for arm in ("ridge", "shuffled") for side in (without, with_bos)))
            for pair in without]  # fmt: skip
    return table(("pair", "ridge map", "with BOS", "shuffled", "with BOS"), rows)


def _rank_table(kept: Line) -> str:
    rows = []
    for line in kept["efficiency"]:
        by_rank = {x["rank"]: x for x in line["curve"]}
        rows.append((_pair(line), *(f"{score(by_rank[r]['optimal'])} ({100 * by_rank[r]['efficiency']:.0f} %)" for r in RANKS),
                     score(by_rank[64]["truncated"]), line["half_rank"]))  # fmt: skip
    return table(("pair", *(f"rank {r}" for r in RANKS), "ridge map cut to 64", "rank of half the R²"), rows)


def _size_table(kept: Line) -> str:
    rows = [(_pair(x), plain(x["sum_rho2"]), plain(x["sum_rho2_null"]), plain(x["held_out_sum"]), x["wachter_count"],
             x["held_out_count"], plain(x["dim_lin"]), plain(x["dim_lin_null"])) for x in kept["efficiency"]]  # fmt: skip
    return table(("pair", "sum of ρ²", "of independent data", "held out", "above Wachter's edge", "above chance, held out",
                  "participation ratio", "of independent data"), rows)  # fmt: skip


def _verdict_table(kept: Line) -> str:
    medians = ("r2", "identity_r2", "control_r2", "f1")
    rows = [(_pair(x), *(x[verdict] for verdict in plots.VERDICT_LOOK), *(plain(x[key]) for key in medians))
            for x in kept["features"]["pairs"]]  # fmt: skip
    return table(("pair", *plots.VERDICT_LOOK, "median R²", "identity", "shuffled", "median F1 of firing"), rows)


def _example_table(found: Sequence[Line]) -> str:
    order = [x for verdict in plots.VERDICT_LOOK if verdict != "rare" for x in found if x["verdict"] == verdict]
    rows = [(x["verdict"], f"`{x['name']}`".replace("|", "\\|"), x["feature"], f"{x['count']:,.0f}", _between(x, "r2"),
             score(x["identity_carries"]), plain(x["control_r2"])) for x in order]  # fmt: skip
    return table(
        ("verdict", "hardest tokens", "feature", "fires on", "R² of the map", "identity carries", "R² of shuffled"),
        rows,
    )


def _causal_table(kept: Line) -> str:
    arms = ("transported", "identity", "mean", "bias", "zero")
    found = _by_pair(kept["causal"]["lines"], arms)
    rows = [(pair, *(_between(x[arm], "delta") for arm in arms), _percent(x["transported"]["agreement"]),
             _percent(x["identity"]["agreement"])) for pair, x in found.items()]  # fmt: skip
    return table(("pair", *arms, "same top token, transported", "identity"), rows)


def _shift_table(kept: Line) -> str:
    rows = [(_pair(x), score(x["r2_on_stories"]), _between(x, "requests"), _between(x, "stories"), _between(x, "less"))
            for x in kept["shift"]["pairs"]]  # fmt: skip
    return table(
        ("pair", "R² of the requests' map on stories", "it costs", "a map of other stories costs", "difference"), rows
    )


def _shortcut_table(kept: Line) -> str:
    words = {"single": "one run", "greedy": "greedy"}
    rows = [(words[x["search"]], x["blocks"], _percent(x["saved"]), _between(x, "delta"), _percent(x["agreement"]))
            for x in kept["shortcut"] if x["skipped"]]  # fmt: skip
    return table(("search", "blocks left out", "FLOPs saved", "rise of log-perplexity (nats)", "same top token"), rows)
