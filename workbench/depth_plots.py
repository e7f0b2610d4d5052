"""Results on the depth of models to plotly figures: curves over the layers, skipped layers by later layers, layer grids.

They read tables (`DepthCurves.frame()`, `SkipEffects.frame()`, `LayerGrid.frame()`) and know nothing of probes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .errors import UserError
from .plots import BLUE, GREEN, ORANGE, PINK, RED, SKY, SYMBOLS, _empty, _style
from .visible_text import label

if TYPE_CHECKING:
    import pandas as pd

COLOURS = (BLUE, RED, GREEN, ORANGE, PINK, SKY)
DASHES = ("solid", "dash", "dot", "dashdot")
NAMED_CELLS, TICKS = 12, 14
WORDS = {
    "write": "write of the block, ||a + m|| / ||h||", "attention": "of attention, ||a|| / ||h||",
    "mlp": "of the MLP, ||m|| / ||h + a||", "write_cosine": "cosine of the write with h",
    "attention_cosine": "cosine of attention with h", "mlp_cosine": "cosine of the MLP with h + a",
    "velocity": "velocity, ||h' − h|| / ||h||", "norm": "length of the state, ||h||",
    "final_cosine": "cosine with the last state", "kl": "KL of the logit lens (nats)",
    "overlap": "top 5 shared with the end", "pair_cosine": "cosine of two tokens",
    "constant_share": "energy share of the mean", "attention_entropy": "attention entropy (nats)",
    "attention_similarity": "attention like that before (cosine)",
}  # fmt: skip
GROUPS = {
    "writes": ("write", "attention", "mlp"),
    "cosines": ("write_cosine", "attention_cosine", "mlp_cosine"),
    "stream": ("velocity", "norm", "final_cosine"),
    "lens": ("kl", "overlap"),
    "uniformity": ("pair_cosine", "constant_share"),
    "attention": ("attention_entropy", "attention_similarity"),
}
LOGARITHMIC = ("write", "attention", "mlp", "velocity", "norm")
"""of lengths, which the first block often makes many times those of the others"""
STEPS = [m * 10.0**e for e in range(-4, 5) for m in (1, 2, 5)]
SMALL = {"size": 12}
EFFECT_WORDS = {
    ("skip", "future"): "skipped before, measured after a token", ("skip", "all"): "skipped and measured at every token",
    ("local", "all"): "its write taken from later inputs alone",
    ("local", "future"): "its write taken from later inputs before, measured after a token",
    ("erase", "future"): "state of one token erased, measured after",
}  # fmt: skip
STATISTIC_WORDS = {"max": "largest over tokens", "mean": "mean over tokens"}


def depth_curves(tables: Mapping[str, pd.DataFrame], curves: str | Sequence[str] = "writes") -> go.Figure:
    """Curves over the layers, a panel each, one line a model, with 95 % intervals over prompts.

    tables: `DepthCurves.frame()` by name. curves: names of them, or a group (`GROUPS`); those no table has are left out. Models
    of unlike depth meet on relative depth, the share of the blocks that have run.
    """
    asked = GROUPS.get(curves, (curves,)) if isinstance(curves, str) else tuple(curves)
    if unknown := [name for name in asked if name not in WORDS]:
        raise UserError(f"unknown curve {unknown[0]!r}; allowed: {', '.join(WORDS)}, or a group: {', '.join(GROUPS)}")
    found = [name for name in asked if any((t["curve"] == name).any() for t in tables.values())]
    if not found:
        return _empty("None of these curves was measured: the notes of the run say why")
    figure = make_subplots(1, len(found), subplot_titles=[WORDS[name] for name in found], horizontal_spacing=0.07)
    for number, (name, table) in enumerate(tables.items()):
        for column, curve in enumerate(found, 1):
            _curve(figure, column, label(name, 60), table[table["curve"] == curve], _depth_of(table), number)
    figure.update_xaxes(**_depth_axis({_depth_of(t) for t in tables.values()}))
    for column, curve in enumerate(found, 1):
        parts = [t.loc[t["curve"] == curve, "low"] for t in tables.values()]
        if curve in LOGARITHMIC and all(bool((low > 0).all()) for low in parts):
            figure.update_yaxes(type="log", tickvals=STEPS, ticktext=[f"{v:g}" for v in STEPS], row=1, col=column)
        elif not curve.endswith("cosine"):
            figure.update_yaxes(rangemode="tozero", row=1, col=column)
    figure.update_annotations(font_size=13)
    return _style(figure, 360, legend={"orientation": "h", "y": -0.28, "x": 0})


def _depth_of(table: pd.DataFrame) -> int:
    return 1 + max(int(layer) for layer in table["layer"] if str(layer).isdigit())


def _curve(figure: go.Figure, column: int, name: str, part: pd.DataFrame, depth: int, number: int) -> None:
    part = part[part["value"].notna()]
    if part.empty:
        return
    run = [int(layer) + 1 if str(layer).isdigit() else 0 for layer in part["layer"]]
    value, low, high = (part[key].to_numpy() for key in ("value", "low", "high"))
    colour = COLOURS[number % len(COLOURS)]
    text = [f"{name}, {'embeddings' if n == 0 else f'layer {n - 1}'}: {v:.4g}<br>95 % interval {a:.4g} to {b:.4g}"
            for n, v, a, b in zip(run, value, low, high, strict=True)]  # fmt: skip
    figure.add_trace(go.Scatter(
        x=[n / depth for n in run], y=value, mode="lines+markers", name=name, legendgroup=name, showlegend=column == 1,
        error_y={"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low, "thickness": 1.4,
                 "width": 3},
        line={"color": colour, "width": 2, "dash": DASHES[number % len(DASHES)]}, text=text,
        marker={"color": colour, "symbol": SYMBOLS[number % len(SYMBOLS)], "size": 7}, hovertemplate="%{text}<extra></extra>",
    ), row=1, col=column)  # fmt: skip


def _depth_axis(depths: set[int]) -> dict[str, Any]:
    """Layer numbers where all models are as deep, else the share of the blocks that have run."""
    if len(depths) > 1:
        return {"title": {"text": "relative depth", "font": SMALL}, "range": [-0.04, 1.04]}
    depth = next(iter(depths))
    shown = [0, *range(1, depth + 1, max(1, -(-depth // TICKS)))]
    return {"title": {"text": "after layer", "font": SMALL}, "range": [-0.04, 1.04], "tickvals": [n / depth for n in shown],
            "ticktext": ["emb.", *(str(n - 1) for n in shown[1:])]}  # fmt: skip


def skip_heatmap(table: pd.DataFrame, statistic: str = "max", title: str = "") -> go.Figure:
    """What skipping each layer (down) changes of what each later one writes (across), relative to that write.

    table: `SkipEffects.frame()` of one kind and scope. statistic: `max` or `mean`, over the tokens of a prompt.
    """
    _check_statistic(statistic)
    part = table[table["later"] != "output"]
    if part.empty:
        return _empty("No later layer to compare: skip a layer that is not the last")
    rows = sorted({int(l) for l in part["layer"]})
    columns = list(range(min(rows) + 1, max(int(l) for l in part["later"]) + 1))
    cells = {
        (int(a), int(b)): (v, low, high)
        for a, b, v, low, high in zip(*(part[key] for key in _keys("layer", "later", statistic)), strict=True)
    }
    z = [[cells[a, b][0] if (a, b) in cells else None for b in columns] for a in rows]
    text = [[_cell(a, b, cells.get((a, b))) for b in columns] for a in rows]
    figure = go.Figure(go.Heatmap(
        x=[str(b) for b in columns], y=[str(a) for a in rows], z=z, text=text, colorscale="Cividis", zmin=0, xgap=2, ygap=2,
        hoverongaps=False, hovertemplate="%{text}<extra></extra>",
        texttemplate="%{z:.2f}" if len(columns) <= NAMED_CELLS else None,
        colorbar={"title": {"text": "relative change", "side": "right"}, "thickness": 14},
    ))  # fmt: skip
    figure.update_xaxes(title_text="later layer", **_layers(columns))
    figure.update_yaxes(title_text="changed layer", autorange="reversed", **_layers(rows))
    heading: dict[str, Any] = {"title": {"text": label(title, 90), "font": {"size": 14}}} if title else {}
    return _style(figure, max(280, min(900, 180 + 30 * len(rows))), **heading)


def _keys(down: str, across: str, value: str) -> list[str]:
    return [down, across, value, f"{value}_low", f"{value}_high"]


def _cell(a: int, b: int, found: tuple[float, float, float] | None) -> str:
    if found is None:
        return ""
    return (f"layer {a} changed, layer {b}'s write moves by {found[0]:.4g} of its length<br>95 % interval {found[1]:.4g} to "
            f"{found[2]:.4g}")  # fmt: skip


def skip_outputs(tables: Mapping[str, pd.DataFrame], statistic: str = "max") -> go.Figure:
    """What changing each layer does to the next-token distributions: a panel for each way to change it, one line a table, with
    95 % intervals over prompts.

    tables: `SkipEffects.frame()` by name, such as a model and its untrained control; several kinds of effect in one table are
    one under the other (`pandas.concat`). Layers that are not all there are joined by straight lines.
    """
    _check_statistic(statistic)
    outputs = {name: table[table["later"] == "output"] for name, table in tables.items()}
    panels = list(dict.fromkeys(pair for t in outputs.values() for pair in zip(t["kind"], t["scope"], strict=True)))
    if not panels:
        return _empty("No effect was measured: give --effects")
    rows = -(-len(panels) // 2)
    titles = [EFFECT_WORDS.get(pair, label(" ".join(pair), 40)) for pair in panels]
    figure = make_subplots(
        rows, min(2, len(panels)), subplot_titles=titles, horizontal_spacing=0.1, vertical_spacing=0.32 / rows
    )
    for number, (name, table) in enumerate(outputs.items()):
        for i, (kind, scope) in enumerate(panels):
            part = table[(table["kind"] == kind) & (table["scope"] == scope)]
            _output_line(figure, (i // 2 + 1, i % 2 + 1), part, statistic, label(name, 60), number, legend=i == 0)
    every = sorted({int(l) for table in outputs.values() for l in table["layer"]})
    figure.update_xaxes(
        tickvals=every[:: max(1, -(-len(every) // TICKS))], title={"text": "changed layer", "font": SMALL}
    )
    figure.update_yaxes(title={"text": f"‖y − ȳ‖₂, {STATISTIC_WORDS[statistic]}", "font": SMALL}, rangemode="tozero")
    figure.update_annotations(font_size=13)
    return _style(figure, 110 + 290 * rows, legend={"orientation": "h", "y": -0.2 / rows, "yanchor": "top", "x": 0})


def _output_line(
    figure: go.Figure,
    place: tuple[int, int],
    part: pd.DataFrame,
    statistic: str,
    name: str,
    number: int,
    *,
    legend: bool,
) -> None:
    if part.empty:
        return
    value, low, high = (part[f"{statistic}{end}"].to_numpy() for end in ("", "_low", "_high"))
    text = [f"{name}, layer {l}: {v:.4g}<br>95 % interval {a:.4g} to {b:.4g}"
            for l, v, a, b in zip(part["layer"], value, low, high, strict=True)]  # fmt: skip
    colour = COLOURS[number % len(COLOURS)]
    figure.add_trace(go.Scatter(
        x=part["layer"], y=value, mode="lines+markers", name=name, legendgroup=name, showlegend=legend, text=text,
        error_y={"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low, "thickness": 1.4},
        line={"color": colour, "width": 2, "dash": DASHES[number % len(DASHES)]}, hovertemplate="%{text}<extra></extra>",
        marker={"color": colour, "symbol": SYMBOLS[number % len(SYMBOLS)], "size": 8},
    ), row=place[0], col=place[1])  # fmt: skip


def layer_grid(table: pd.DataFrame, deep: str = "deep model", shallow: str = "shallow model") -> go.Figure:
    """The error of the map from each layer of a shallow model (across) to each of a deep one (down), the best of each line
    ringed. table: `LayerGrid.frame()`."""
    if table.empty:
        return _empty("No pair of layers was fitted")
    down, across = sorted(set(table["deep"])), sorted(set(table["shallow"]))
    keys = [*_keys("deep", "shallow", "error"), "mean"]
    cells = {(d, s): rest for d, s, *rest in zip(*(table[key] for key in keys), strict=True)}
    text = [[f"deep layer {d}, shallow layer {s}: error {cells[d, s][0]:.4f}<br>95 % interval {cells[d, s][1]:.4f} to "
             f"{cells[d, s][2]:.4f}<br>of the mean alone {cells[d, s][3]:.4f}" for s in across] for d in down]  # fmt: skip
    figure = go.Figure(go.Heatmap(
        x=[str(s) for s in across], y=[str(d) for d in down], z=[[cells[d, s][0] for s in across] for d in down], text=text,
        colorscale="Cividis_r", xgap=2, ygap=2, hovertemplate="%{text}<extra></extra>",
        texttemplate="%{z:.3f}" if len(across) <= NAMED_CELLS else None,
        colorbar={"title": {"text": "relative error, held-out prompts", "side": "right"}, "thickness": 14},
    ))  # fmt: skip
    best = table[table["best"]].sort_values("deep")
    few = max(len(down), len(across)) <= NAMED_CELLS  # a ring has room for the number in it
    ring = {"size": 38 if few else 9, "symbol": "circle-open", "color": RED, "line": {"width": 3 if few else 2}}
    figure.add_trace(go.Scatter(
        x=[str(s) for s in best["shallow"]], y=[str(d) for d in best["deep"]], mode="markers" if few else "lines+markers",
        marker=ring, line={"color": RED, "width": 1}, hoverinfo="skip", showlegend=False, name="best",
    ))  # fmt: skip
    figure.update_xaxes(title_text=f"layer of {label(shallow, 50)}", **_layers(across))
    figure.update_yaxes(title_text=f"layer of {label(deep, 50)}", **_layers(down))
    return _style(figure, min(1000, 180 + 34 * len(down)))


def _layers(layers: Sequence[int]) -> dict[str, Any]:
    names = [str(l) for l in layers]
    shown = names[:: max(1, -(-len(names) // (2 * TICKS)))]
    return {"type": "category", "categoryorder": "array", "categoryarray": names, "tickvals": shown, "showgrid": False}


def _check_statistic(name: str) -> None:
    if name not in STATISTIC_WORDS:
        raise UserError(f"unknown statistic {name!r} over tokens; allowed: {', '.join(STATISTIC_WORDS)}")
