"""docs/transport.md is what its numbers say: the page is that of docs/transport.json, and its words hold of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from . import transport

BY_PAIR = ("source", "target")


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    return json.loads(transport.KEPT.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def lines(kept) -> dict[str, list[dict[str, Any]]]:
    return transport.lines_of(kept)


def by_pair(found: list[dict[str, Any]], key: str) -> dict[tuple[str, str], float]:
    return {(x["source"], x["target"]): x[key] for x in found}


def test_the_page_is_that_of_its_numbers(kept):
    assert transport.PAGE.read_text(encoding="utf-8") == transport.page(kept)
    assert len(transport.PAGE.read_text(encoding="utf-8").splitlines()) < 250
    pictures = sorted((transport.PAGE.parent / "img").glob("transport_*.png"))
    assert len(pictures) == 4
    assert max(p.stat().st_size for p in pictures) < 150_000


def test_the_readme_quotes_the_page(lines):
    text = (transport.ROOT / "README.md").read_text(encoding="utf-8")
    cheapest = min(lines["causal transported"], key=lambda x: x["delta"])
    assert f"{transport.span(lines['ridge'], 'r2_uniform')} on held-out prompts (control" in text
    assert f"costs {transport.plain(cheapest['delta'])} nats per token" in text


def test_what_is_said_of_the_grid_holds(kept, lines):
    ridge, with_bos = by_pair(lines["ridge"], "r2_uniform"), by_pair(lines["ridge with BOS"], "r2_uniform")
    for a in range(3):
        scores = [ridge[f"resid_post.{a}", f"resid_post.{b}"] for b in range(a + 1, 4)]
        assert scores == sorted(scores, reverse=True), "less over more blocks"
        assert 0.85 < scores[0] < 0.95, "about 0.9 one block away"
    for arm in ("procrustes", "identity_bias", "identity"):
        assert all(value < ridge[pair] for pair, value in by_pair(lines[arm], "r2_uniform").items())
    assert max(abs(x["r2_uniform"]) for x in lines["shuffled"]) < 0.001
    assert all(x["r2_uniform_low"] > 0.01 for x in lines["shuffled with BOS"])
    assert all(0 <= with_bos[pair] - value < 0.03 for pair, value in ridge.items()), "the map gains little"
    assert {x["alpha"] for x in lines["ridge"]} == {min(kept["alphas"])}


def test_what_is_said_of_dimensions_holds(kept):
    bound_of_noise = 128 / (kept["rows"]["n_held_out"][0] - 1)
    for line in kept["efficiency"]:
        assert 0 < line["bound"] - line["optimal"] < bound_of_noise
        assert line["half_rank"] > 128 / 5, "no small subspace"
        assert line["curve"][0]["efficiency"] > 0.75 > 0 > line["curve"][3]["truncated"]
        assert line["held_out_sum"] == pytest.approx(line["sum_rho2"], rel=0.01)
        assert min(line["wachter_count"], line["held_out_count"]) > 110
        assert 1 < line["dim_lin"] / line["dim_lin_null"] < 1.4


def test_what_is_said_of_features_holds(kept):
    for line in kept["features"]["pairs"]:
        assert line["control_r2"] < line["r2"] - 1, "the shuffled map is far below"
        assert line["synthesised_but_all"] >= 0.95 * line["synthesised"]
    for examples in kept["features"]["examples"].values():
        assert all(x["name"] for x in examples)


def test_what_is_said_of_the_model_holds(kept, lines):
    moved, same = by_pair(lines["causal transported"], "delta"), by_pair(lines["causal identity"], "delta")
    assert all(moved[pair] < same[pair] for pair in moved)
    last = ("resid_post.2", "resid_post.3")
    assert -1 < transport.cost_order(kept) < -0.5
    assert by_pair(lines["causal zero"], "delta")[last] < by_pair(lines["causal mean"], "delta")[last]
    assert all(x["less_high"] < 0 for x in kept["shift"]["pairs"]), "maps of stories are cheaper on stories"
    assert kept["shift"]["rows"] < kept["rows"]["n_train"][0] / 4
    cheapest = min(lines["single"], key=lambda x: x["delta"])
    assert cheapest["blocks"] == "2"


def test_numbers_are_written_for_readers():
    found = [{"r2": 0.9135, "n": 12}, {"r2": 0.25, "n": 900}]
    assert (transport.span(found, "r2"), transport.span(found, "n")) == ("0.250 to 0.913", "12 to 900")
    assert transport.percents([{"s": 0.051}, {"s": 0.7}], "s") == "5 to 70 %"


@pytest.mark.slow
def test_a_run_gives_the_numbers_of_the_page_again(kept, tmp_path: Path):
    """Within what another machine's arithmetic may change: counts by a few, figures by little."""
    assert differences(transport.measure(tmp_path / "run"), kept) == []


def differences(new: Any, old: Any, where: str = "") -> list[str]:
    if isinstance(old, dict):
        return [
            d
            for key in old
            if key not in ("versions", "examples")
            for d in differences(new[key], old[key], f"{where}/{key}")
        ]
    if isinstance(old, list):
        if len(new) != len(old):
            return [f"{where}: {len(new)} lines, not {len(old)}"]
        return [d for i, pair in enumerate(zip(new, old, strict=True)) for d in differences(*pair, f"{where}/{i}")]
    if isinstance(old, float) or isinstance(new, float) or isinstance(old, int):
        return (
            []
            if math.isclose(new, old, rel_tol=0.02, abs_tol=5 if isinstance(old, int) else 2e-3)
            else [f"{where}: {new} {old}"]
        )
    return [] if new == old else [f"{where}: {new!r}, not {old!r}"]
