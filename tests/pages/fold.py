"""docs/fold.md: how linear the bundled models' networks are and what folding them costs, from a run.

`measure` runs it and returns the numbers as JSON values (kept in docs/fold.json), `page` tells them. What the text says of
them in words is asserted in tests/pages/test_fold_page.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, StrictUndefined

from data.build.vision import compare
from probes.fold_curve import FoldCurve, fold_curve
from probes.linearity import linearity
from workbench import fold_plots as plots
from workbench.models import load
from workbench.prompts import PromptSet

from ..benchmarks.tables import table
from .transport import rounded

ROOT = Path(__file__).resolve().parents[2]
KEPT, PAGE = ROOT / "docs" / "fold.json", ROOT / "docs" / "fold.md"
TEMPLATE = Path(__file__).with_name("fold.md.jinja")
TEXT, CHATS, LIMIT = "bundled:evaluation_text", "bundled:profile", 384
NAMES = {arm: look[0] for arm, look in plots.ARMS.items()} | {("mean", "random"): "mean, random channels"}
Line = dict[str, Any]


def measure(_folder: Path | None = None, *, steps: int = 400) -> dict[str, Any]:
    """Everything the page tells: two minutes on 2 cores."""
    recipient = load("bundled:recipient", dtype="float32", device="cpu")
    found = linearity(recipient, PromptSet.load(TEXT))
    donor = load("bundled:donor", dtype="float32", device="cpu")
    gated = linearity(donor, PromptSet.load(TEXT))
    chats = PromptSet.load(CHATS, limit=LIMIT, seed=0)
    return rounded({
        "linearity": found.frame().to_dict("records"), "rows": found.n_held_out,
        "channels": found.channel_frame()[["layer", "r2"]].to_dict("list"),
        "donor_linearity": gated.frame().to_dict("records"),
        "text": _arms(fold_curve(recipient, TEXT, repeats=15)), "chats": _arms(fold_curve(recipient, chats, speed=False)),
        "donor": _arms(fold_curve(donor, TEXT, repeats=15)), "vision": compare((0.5, 0.75), steps=steps), "limit": LIMIT,
    })  # fmt: skip


def _arms(curve: FoldCurve) -> Line:
    lines = curve.frame().astype(object)
    lines = lines.where(lines.notna(), None).to_dict("records")
    r2 = {f"{theta:g}": list(values) for theta, values in curve.r2.items()}
    return {"lines": lines, "tokens": int(curve.tokens.sum()), "prompts": len(curve.tokens), "r2": r2}


def figures(_folder: Path | None, kept: Line) -> dict[str, go.Figure]:
    """The pictures of the page, by name."""
    return {
        "loss": plots.fold_loss(pd.DataFrame(kept["text"]["lines"])),
        "channels": plots.channel_scores(pd.DataFrame(kept["channels"])),
        "blocks": plots.block_linearity(pd.DataFrame(kept["linearity"])),
    }


def page(kept: Line) -> str:
    """The page as markdown: the template, and every number of it from what was kept."""
    source = TEMPLATE.read_text(encoding="utf-8")
    template = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True).from_string(source)
    tables = {name: _table(kept[name]) for name in ("text", "chats", "donor")}
    return template.render(kept=kept, tables=tables, linearity=_linearity(kept["linearity"]), vision=_vision(kept["vision"]),
                           donor_linearity=_linearity(kept["donor_linearity"]), arm=lambda *key: arm(kept, *key))  # fmt: skip


def arm(kept: Line, where: str, theta: float, method: str, channels: str = "least") -> Line:
    """One line of a curve."""
    return next(
        x for x in kept[where]["lines"] if (x["theta"], x["method"], x["channels"]) == (theta, method, channels)
    )


def _span(line: Line, key: str) -> str:
    return f"{line[key]:.3f} ({line[f'{key}_low']:.3f} to {line[f'{key}_high']:.3f})".replace(
        "-0.000", "0.000"
    ).replace("-", "−")


def _table(curve: Line) -> str:
    rows = []
    for x in curve["lines"]:
        name = NAMES.get((x["method"], x["channels"]), x["method"])
        speed = f"{x['speedup']:.2f}" if x["speedup"] else ""
        rows.append((f"{x['theta']:g}", name, f"{x['loss']:.3f}", _span(x, "rise"), f"{x['kl']:.3f}",
                     f"{100 * x['agreement']:.1f} %", f"{100 * x['weights']:.1f} %", speed))  # fmt: skip
    head = ("theta", "in their place", "loss", "rise of the loss", "KL", "same top token", "weights left", "speed")
    return table(head, rows)


def _linearity(lines: list[Line]) -> str:
    rows = [(x["layer"], _span(x, "write"), f"{x['write_control']:.3f}".replace("-", "−"), _span(x, "ffn"),
             f"{x['ffn_control']:.3f}".replace("-", "−"), _span(x, "block"), f"{x['channel_r2']:.2f}",
             f"{100 * x['lower_half_of_scores']:.0f} %") for x in lines]  # fmt: skip
    head = ("layer", "what the block writes", "control", "its network", "control", "its output", "median channel",
            "scores in the lower half")  # fmt: skip
    return table(head, rows)


def _vision(found: Line) -> str:
    rows = [(x["model"], f"{100 * x['accuracy']:.1f} % ({100 * x['accuracy_low']:.1f} to {100 * x['accuracy_high']:.1f})",
             f"{100 * x['ffn_share']:.1f} %", f"{x['speedup']:.2f}", "" if x["moved"] is None else f"{x['moved']:.0e}")
            for x in found["lines"]]  # fmt: skip
    return table(
        ("model", "accuracy on new images", "parameters of its networks", "speed", "logits moved by folding"), rows
    )
