"""docs/geometry.md: the geometry of what the bundled models' blocks write, from one run of `workbench geometry` on each.

`measure` runs them and returns the numbers as JSON values (kept in docs/geometry.json), `page` tells them. What the text says
of them in words is asserted in tests/pages/test_geometry_page.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, StrictUndefined

from probes.geometry_run import GeometryJob, run_geometry
from workbench import geometry_plots as plots
from workbench.models import load
from workbench.prompts import PromptSet

from ..benchmarks.tables import table
from .transport import rounded

DOCS = Path(__file__).resolve().parents[2] / "docs"
KEPT, PAGE = DOCS / "geometry.json", DOCS / "geometry.md"
TEMPLATE = Path(__file__).with_name("geometry.md.jinja")
MODELS, PROMPTS, LIMIT = ("bundled:recipient", "bundled:donor"), "bundled:evaluation_text", 64
Line = dict[str, Any]


def measure(folder: Path) -> Line:
    """Runs both models into folders of their own and returns what the page tells."""
    found = {}
    prompts = PromptSet.load(PROMPTS, limit=LIMIT, seed=0)
    for name in MODELS:
        metrics = run_geometry(
            load(name, device="cpu"), prompts, GeometryJob(name, PROMPTS, LIMIT), folder / _short(name)
        ).metrics
        keys = ("tokens", "sequences", "costs", "sizes", "runs", "lengths", "orthogonal_less_parallel")
        found[_short(name)] = {key: metrics[key] for key in keys}
    return rounded(found)


def figures(folder: Path, _kept: Line) -> dict[str, go.Figure]:
    """The recipient's costs."""
    return {"costs": plots.write_costs(pd.read_parquet(folder / _short(MODELS[0]) / "costs.parquet"))}


def page(kept: Line) -> str:
    source = TEMPLATE.read_text(encoding="utf-8")
    template = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True).from_string(source)
    costs, lengths = ({name: make(found) for name, found in kept.items()} for make in (_costs, _lengths))
    return template.render(
        kept=kept, limit=LIMIT, costs=costs, lengths=lengths, cost=cost, run=run, size=size, signed=signed
    )


def cost(found: Line, layer: int, write: str, part: str) -> Line:
    """The line of an arm."""
    return next(x for x in found["costs"] if (x["layer"], x["write"], x["part"]) == (layer, write, part))


def run(found: Line, kind: str, start: int, length: int) -> Line:
    """The line of a run of blocks."""
    return next(x for x in found["runs"] if (x["kind"], x["start"], x["length"]) == (kind, start, length))


def size(found: Line, layer: int, write: str) -> Line:
    """The line of a write's size."""
    return next(x for x in found["sizes"] if (x["layer"], x["write"]) == (layer, write))


def signed(line: Mapping[str, Any], key: str = "delta") -> str:
    """A figure with its interval, to three places: nats per token."""
    if line[key] is None:
        return ""
    return f"{_three(line[key])} ({_three(line[f'{key}_low'])} to {_three(line[f'{key}_high'])})"


def _three(value: float) -> str:
    text = f"{value:.3f}"
    return "0.000" if text == "-0.000" else text


def _costs(found: Line) -> str:
    layers = sorted({x["layer"] for x in found["costs"]})
    rows = []
    for layer in layers:
        parts = [signed(cost(found, layer, "block", part)) for part in plots.PART_LOOK]
        shares = [f"{100 * size(found, layer, write)['share']:.0f} %" for write in ("attn", "mlp")]
        rows.append((layer, *parts, *shares))
    heads = ("layer", *(look[0] for look in plots.PART_LOOK.values()), "parallel share of attention", "of MLP")
    return table(heads, rows)


def _lengths(found: Line) -> str:
    rows = []
    for length in sorted({x["length"] for x in found["lengths"]}):
        lines = {x["kind"]: x for x in found["lengths"] if x["length"] == length}
        cells = [signed(lines[kind]) for kind in plots.KIND_LOOK]
        rows.append(
            (
                length,
                lines["parallel"]["places"],
                *cells,
                signed(lines["parallel"], "growth"),
                signed(lines["stale"], "growth"),
            )
        )
    heads = (
        "blocks",
        "places",
        *(look[0] for look in plots.KIND_LOOK.values()),
        "same input: growth",
        "one block old: growth",
    )
    return table(heads, rows)


def _short(name: str) -> str:
    return name.partition(":")[2]


def read() -> Line:
    return dict(json.loads(KEPT.read_text(encoding="utf-8")))
