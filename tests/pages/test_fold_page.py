"""docs/fold.md is what its numbers say: the page is that of docs/fold.json, and its words hold of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from . import fold


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    return json.loads(fold.KEPT.read_text(encoding="utf-8"))


def test_the_page_is_that_of_its_numbers(kept):
    assert fold.PAGE.read_text(encoding="utf-8") == fold.page(kept)
    pictures = sorted((fold.PAGE.parent / "img").glob("fold_*.png"))
    assert len(pictures) == 3
    assert max(p.stat().st_size for p in pictures) < 120_000
    assert len(fold.figures(None, kept)) == 3


def test_what_is_said_of_the_curve_holds(kept):
    def rise(where: str, theta: float, method: str, channels: str = "least") -> float:
        return fold.arm(kept, where, theta, method, channels)["rise"]

    for theta in (0.25, 0.5, 0.75):
        others = [rise("text", theta, m) for m in ("affine", "mean", "identity")]
        assert rise("text", theta, "refit") <= min(others) + 0.001
        assert rise("text", theta, "identity") > 1
    assert rise("text", 0.5, "refit") < 0.01, "nearly free"
    assert rise("text", 0.75, "refit", "random") > rise("text", 0.75, "affine"), "which matters more than what"
    assert rise("text", 0.25, "affine", "random") < 0.01
    assert rise("chats", 0.75, "refit") > 3 * rise("text", 0.75, "refit"), "several times as much"


def test_what_is_said_of_blocks_and_channels_holds(kept):
    for line in kept["linearity"]:
        assert abs(line["write_control"]) < 0.05
        assert abs(line["ffn_control"]) < 0.05
    assert sum(line["channel_r2"] < 0.9 for line in kept["linearity"]) == len(kept["linearity"]), "most are no lines"


def test_what_is_said_of_trained_twins_holds(kept):
    found = {line["model"]: line for line in kept["vision"]["lines"]}
    for theta in ("0.5", "0.75"):
        folded, idle = found[f"folded {theta}"], found[f"idle {theta}"]
        assert folded["moved"] < 1e-3
        assert folded["accuracy"] == pytest.approx(idle["accuracy"], abs=0.002)
        assert folded["speedup"] > max(1, idle["speedup"])
        assert idle["speedup"] < 1.25
