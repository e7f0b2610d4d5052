"""A transport run of a made-up stream, written as the command writes it, in milliseconds; with tokens that mean harm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import tomli_w
import torch

from workbench.atomic import write_json
from workbench.transport import transport_grid

from ..transport.streams import stream, write_stream

EVIL = ("<script>alert(1)</script>", "[x](javascript:1)", "**b**", "a\u202eb", "y" * 10_000)
ARMS = ("untouched", "transported", "identity", "mean")


def transport_run(folder: Path, name: str = "transport", *, grid_only: bool = False, note: str = "") -> Path:
    """Three layers; efficiency, features and causal figures of the pair 0 to 2 alone, unless `grid_only`."""
    run = folder / name
    run.mkdir(parents=True)
    store = write_stream(run / "store", stream(1200), 20, start=0)
    grid = transport_grid(store, folds=2, shards=4, products=torch.float64)
    grid.save(run / "grid")
    job = {"model": "m", "prompts": "my prompts.txt", "folds": 2, "shards": 4, "grid_only": grid_only}
    (run / "transport.toml").write_text(tomli_w.dumps(job))
    metrics: dict[str, Any] = {
        "format": "workbench.transport",
        "schema": 1,
        "job": job,
        "warnings": [note] if note else [],
    }
    if not grid_only:
        metrics["efficiency"] = {"sizes": [_size()]}
        metrics["causal"] = {"prompts": EVIL[0], "sequences": 12, "tokens": 345}
        for part, table in (("efficiency", _efficiency()), ("features", _features()), ("causal", _causal()),
                            ("shortcut", _shortcut())):  # fmt: skip
            table.to_parquet(run / f"{part}.parquet", index=False)
    write_json(run / "metrics.json", metrics)
    return run


def _pair(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(source="resid_post.0", target="resid_post.2")


def _size() -> dict[str, Any]:
    return {"source": "resid_post.0", "target": "resid_post.2", "sum_rho2": 5.5, "sum_rho2_null": 0.5, "wachter_count": 7,
            "wachter_edge": 0.1, "held_out_sum": 5.0, "held_out_count": 6, "dim_lin": 6.5, "dim_lin_null": 6.0, "rank_x": 8,
            "efficiency": 0.93, "rank_y": 8, "n": 1200}  # fmt: skip


def _efficiency() -> pd.DataFrame:
    ranks = torch.arange(1, 9)
    share = (ranks / 8).numpy()
    return _pair(pd.DataFrame({
        "rank": ranks.numpy(), "optimal": 0.7 * share, "truncated": 0.6 * share, "bound": 0.75 * share,
        "ceiling": 0.8 * share, "ceiling_corrected": 0.74 * share, "efficiency": 0.7 / 0.75, "efficiency_truncated": 0.8,
    }))  # fmt: skip


def _features() -> pd.DataFrame:
    n = 40
    r2 = torch.linspace(-1, 1, n, dtype=torch.float64).numpy()
    carried = torch.linspace(0, 1, n, dtype=torch.float64).flip(0).numpy()
    plain = {name: r2 for name in ("r2_low", "r2_high", "r2_all", "f1", "identity_r2")}
    return _pair(pd.DataFrame({
        "feature": range(n), "verdict": "mixed", "identity_carries": carried, "control_r2": 0.0, "r2": r2,
        "count": [float(i * 3) for i in range(n)], "name": [EVIL[i % len(EVIL)] for i in range(n)], **plain,
    }))  # fmt: skip


def _causal() -> pd.DataFrame:
    ends = {f"{key}{end}": [0.0, 0.4, 0.9, 2.0] for key in ("delta", "kl") for end in ("", "_low", "_high")}
    return _pair(pd.DataFrame({"arm": ARMS, **ends}))


def _shortcut() -> pd.DataFrame:
    table = pd.DataFrame({"blocks": ["", "1", "2", "1 2"], "skipped": [0, 1, 1, 2], "saved": [0.0, 0.3, 0.3, 0.6]})
    for end in ("", "_low", "_high"):
        table[f"delta{end}"] = [0.0, 0.1, 0.2, 0.6]
    return pd.concat([table.assign(search="single"), table.iloc[[0, 1, 3]].assign(search="greedy")])
