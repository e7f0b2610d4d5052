"""docs/depth.md: how the bundled models use their depth, from two runs of `workbench depth`.

`measure` runs it and returns the numbers as JSON values (kept in docs/depth.json), `page` tells them. What the text says of
them in words is asserted in tests/pages/test_depth_page.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, StrictUndefined

from probes.depth_run import DepthJob, run_depth
from probes.layer_grid import layer_grid
from workbench import depth_plots as plots
from workbench.models import load
from workbench.profile import profile_model
from workbench.prompts import PromptSet
from workbench.summary import plain

from ..benchmarks.tables import table
from .transport import rounded

ROOT = Path(__file__).resolve().parents[2]
KEPT, PAGE = ROOT / "docs" / "depth.json", ROOT / "docs" / "depth.md"
TEMPLATE = Path(__file__).with_name("depth.md.jinja")
MODELS, PROMPTS, LIMIT, EFFECT_PROMPTS = ("donor", "recipient"), "bundled:profile", 512, 256
PAIRS = (("donor", "recipient"), ("donor", "outsider"), ("outsider", "recipient"))
FIXED = 0.1
"""the penalty that converters take unless told otherwise, for comparison"""
Line = dict[str, Any]


def measure(folder: Path) -> Line:
    """Runs the verb on both models into a folder and returns what the page tells."""
    prompts = PromptSet.load(PROMPTS, limit=LIMIT, seed=0)
    held = {name: load(f"bundled:{name}", dtype="float32", device="cpu") for name in (*MODELS, "outsider")}
    found: Line = {"models": {}, "curves": [], "effects": [], "halves": [], "scores": [], "kinds": []}
    for name in MODELS:
        job = DepthJob(f"bundled:{name}", PROMPTS, effect_prompts=EFFECT_PROMPTS, control=True)
        run_depth(held[name], prompts, job, folder / name)
        metrics = json.loads((folder / name / "metrics.json").read_text(encoding="utf-8"))
        found["models"] |= {_short(key): one for key, one in metrics["models"].items()}
        for part in ("curves", "effects", "halves", "scores", "kinds"):
            lines = [
                line for line in metrics[part] if line.get("later", "output") == "output"
            ]  # later layers are drawn alone
            found[part] += [{**line, "model": _short(line["model"])} for line in lines]
        found["versions"] = metrics["environment"]["versions"]
    stores = {name: profile_model(held[name], prompts, folder / f"{name}.store", tokens="all") for name in held}
    found["grids"] = [_grid(folder, stores, *pair) for pair in PAIRS]
    return dict(rounded(found | {"prompts": LIMIT, "effect_prompts": EFFECT_PROMPTS, "fixed": FIXED}))


def _short(name: str) -> str:
    return name.removeprefix("bundled:")


def _grid(folder: Path, stores: Line, deep: str, shallow: str) -> Line:
    grid = layer_grid(stores[deep], stores[shallow])
    chance, fixed = grid.order_by_chance(), layer_grid(stores[deep], stores[shallow], alpha=FIXED, control=False)
    grid.frame().to_parquet(folder / f"grid {deep} {shallow}.parquet", index=False)
    at = [(d, s) for d, s in grid.best.items()]
    return {
        "deep": deep, "shallow": shallow, "order": grid.order(), "chance": None if chance is None else chance.as_dict(),
        "fixed_order": fixed.order(), "best": {str(d): s for d, s in at}, "rows": grid.n_fit,
        "matching": {str(d): s for d, s in grid.matching().items()},
        "errors": [grid.error(d, s).value for d, s in at], "means": [grid.baseline(d).value for d, _ in at],
        "shuffled": [grid.control(d, s).value for d, s in at],
    }  # fmt: skip


def figures(folder: Path, _kept: Line) -> dict[str, go.Figure]:
    """The pictures of the page, by name."""
    tables = {}
    for name in MODELS:
        effects = pd.read_parquet(folder / name / "effects.parquet")
        for model, part in effects[effects["effect"] == "future"].groupby("model", sort=False):
            tables[_short(str(model))] = part
    deep, shallow = PAIRS[0]
    return {
        "effects": plots.skip_outputs(tables),
        "grid": plots.layer_grid(pd.read_parquet(folder / f"grid {deep} {shallow}.parquet"), deep, shallow),
    }


def page(kept: Line) -> str:
    """The page as markdown: the template, and every number of it from what was kept."""
    source = TEMPLATE.read_text(encoding="utf-8")
    template = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True).from_string(source)
    return template.render(kept=kept, at=At(kept), plain=plain, tables=tables_of(kept))


class At:
    """One number of what was kept, by what it is of."""

    def __init__(self, kept: Line) -> None:
        self.kept = kept

    def curve(self, model: str, curve: str, layer: int | str) -> float:
        """Its mean after a layer."""
        return float(self._one("curves", model=model, curve=curve, layer=str(layer))["value"])

    def output(self, model: str, effect: str, layer: int) -> float:
        """The largest change of the output over tokens, mean over prompts."""
        return float(self._one("effects", model=model, effect=effect, layer=layer, later="output")["max"])

    def half(self, model: str, effect: str = "future", statistic: str = "max") -> Line:
        return self._one("halves", model=model, effect=effect, statistic=statistic)

    def score(self, model: str, effect: str) -> Line:
        return self._one("scores", model=model, effect=effect)

    def kind(self, model: str, effect: str, group: str) -> Line:
        return self._one("kinds", model=model, effect=effect, group=group)

    def _one(self, part: str, **keys: Any) -> Line:
        (found,) = [x for x in self.kept[part] if all(x[key] == value for key, value in keys.items())]
        return dict(found)


CURVES = ("write", "attention", "mlp", "write_cosine", "attention_cosine", "mlp_cosine", "norm", "final_cosine", "kl",
          "overlap", "pair_cosine", "constant_share", "attention_entropy", "attention_similarity")  # fmt: skip


def tables_of(kept: Line) -> dict[str, str]:
    found = {name: _curve_table(kept, name) for name in MODELS}
    found["outputs"] = _output_table(kept)
    found["halves"] = table(
        ["model", "effect", "largest over tokens", "mean over tokens"],
        [[m, e, *(_interval(At(kept).half(m, e, s)) for s in ("max", "mean"))]
         for m in kept["models"] for e in ("future", "all", "local", "erase")],
    )  # fmt: skip
    found["scores"] = table(
        ["model", "weighed by", "mean layer", "share of the last layer's number"],
        [[x["model"], x["effect"], _interval(x), plain(x["relative"])] for x in kept["scores"]],
    )
    found["kinds"] = table(
        ["model", "kind of prompt", "prompts", "mean layer"],
        [[x["model"], x["group"], plain(x["prompts"]), _interval({**x, "value": x["score"]})]
         for x in kept["kinds"] if x["effect"] == "future" and "untrained" not in x["model"]],
    )  # fmt: skip
    found["grids"] = table(
        ["deep", "shallow", "best shallow layer of each deep one", "error", "of the mean", "of shuffled pairs", "Spearman",
         "of permuted layers (95 %)", "Spearman at penalty 0.1"],
        [[g["deep"], g["shallow"], ", ".join(str(s) for s in g["best"].values()), *(_span(g[k]) for k in
          ("errors", "means", "shuffled")), plain(g["order"]), f"{plain(g['chance']['low'])} to {plain(g['chance']['high'])}",
          "none" if g["fixed_order"] is None else plain(g["fixed_order"])] for g in kept["grids"]],
    )  # fmt: skip
    return found


def _curve_table(kept: Line, model: str) -> str:
    """Curves down, layers across, the untrained model in brackets."""
    layers = ["embeddings", *map(str, range(kept["models"][model]["n_layers"]))]
    mine, theirs = (
        {(x["curve"], x["layer"]): x["value"] for x in kept["curves"] if x["model"] == name and x["value"] is not None}
        for name in (model, f"{model}, untrained")
    )
    rows = [
        [
            c.replace("_", " "),
            *(f"{plain(mine[c, l])} ({plain(theirs[c, l])})" if (c, l) in mine else "" for l in layers),
        ]
        for c in CURVES
    ]
    return table([f"{model} (untrained)", *layers], rows)


def _output_table(kept: Line) -> str:
    lines = [x for x in kept["effects"] if x["later"] == "output"]
    rows = []
    for model in kept["models"]:
        for layer in range(kept["models"][model]["n_layers"]):
            found = {x["effect"]: x for x in lines if (x["model"], x["layer"]) == (model, layer)}
            cells = [_interval({"value": found[e]["max"], "low": found[e]["max_low"], "high": found[e]["max_high"]})
                     for e in ("future", "all", "local", "erase")]  # fmt: skip
            rows.append([model, str(layer), *cells])
    return table(["model", "layer", "future", "all", "local", "erase"], rows)


def _interval(line: Line) -> str:
    if line["value"] < 1e-6:  # what nothing can reach: the rounding of equal passes
        return "0"
    return f"{plain(line['value'])} ({plain(line['low'])} to {plain(line['high'])})"


def _span(values: list[float]) -> str:
    low, high = plain(min(values)), plain(max(values))
    return low if low == high else f"{low} to {high}"
