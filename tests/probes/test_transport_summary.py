"""The sentences of a transport's report say the numbers that they are of, with their interval and what to compare."""

from __future__ import annotations

import pandas as pd

from probes.transport_summary import half_rank, headlines
from tests.transport.streams import stream, write_stream
from workbench.report_page import LONG, table
from workbench.transport import transport_grid

A, B, C = (f"resid_post.{i}" for i in range(3))


def estimate(key: str, value: float) -> dict[str, float]:
    return {key: value, f"{key}_low": value - 0.01, f"{key}_high": value + 0.01}


def causal(arm: str, delta: float, target: str = B) -> dict[str, object]:
    return {"source": A, "target": target, "arm": arm, **estimate("delta", delta), **estimate("log_perplexity", 2.0)}


def test_every_part_that_was_measured_has_its_sentence(tmp_path):
    grid = transport_grid(write_stream(tmp_path / "s", stream(1200), 20), folds=2, shards=4)
    cell = grid.cell(1, 2)
    plain = headlines({}, grid)
    assert len(plain) == 1
    assert f"{cell['r2_uniform']:.3f} ({cell['r2_uniform_low']:.3f} to {cell['r2_uniform_high']:.3f})" in plain[0][0]
    assert "sources of other prompts, scores" in plain[0][1]
    counts = {"transported": 3, "rotated": 1, "mixed": 0, "synthesised": 4, "rare": 9}
    skipped = {"search": "single", "skipped": 1, "blocks": "1", "saved": 0.2, **estimate("delta", 0.3)}
    metrics = {
        "efficiency": {"sizes": [{"efficiency": 0.9, "rank_y": 8}]},
        "features": {"pairs": [{"source": A, "target": C, **counts}]},
        "causal": {"sequences": 7, "prompts": "some", "lines": [
            causal("untouched", 0.0), causal("transported", 0.25), causal("identity", 0.75), causal("mean", 3.0)]},
        "shortcut": {"lines": [skipped]},
    }  # fmt: skip
    curve = pd.DataFrame({"source": A, "target": C, "rank": range(1, 9), "optimal": [0.1 * r for r in range(1, 9)]})
    said = headlines(metrics, grid, curve)
    words = ("a rank of 4, of 8 dimensions", "3 of 8 are carried in place from resid_post.0",
             "costs 0.250 (0.240 to 0.260) nats per token from resid_post.0 → 1", "saves 20 % of the FLOPs")  # fmt: skip
    assert all(word in head[0] for word, head in zip(words, said[1:], strict=True)), said
    assert "the source's own state 0.750, the target's mean 3.00" in said[3][1]


def test_the_rank_of_half_is_that_of_the_best_map():
    assert half_rank(pd.DataFrame({"rank": [1, 2, 3], "optimal": [0.1, 0.35, 0.6]})) == 2


def test_long_tables_are_closed_until_they_are_opened():
    row = {"title": "x", "cells": [], "style": ""}
    assert table(["a"], [row] * LONG, "Pairs")["fold"] == ""
    closed = table(["a"], [row] * (LONG + 1), "Pairs")
    assert (closed["title"], closed["fold"]) == ("", f"Pairs: {LONG + 1} rows")
