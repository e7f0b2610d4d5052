"""docs/depth.md is what its numbers say: the page is that of docs/depth.json, and its words hold of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from workbench.layer_matching import best_matching

from . import depth
from .depth import At
from .test_transport_page import differences

PAIRS = (("donor", 6), ("recipient", 4))


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    return json.loads(depth.KEPT.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def at(kept) -> At:
    return At(kept)


def test_the_page_is_that_of_its_numbers(kept):
    text = depth.PAGE.read_text(encoding="utf-8")
    assert text == depth.page(kept)
    assert len(text.splitlines()) < 260
    pictures = sorted((depth.PAGE.parent / "img").glob("depth_*.png"))
    assert [p.name for p in pictures] == ["depth_effects.png", "depth_grid.png"]
    assert max(p.stat().st_size for p in pictures) < 120_000
    code = text.partition("```python\n")[2].partition("```")[0]
    namespace: dict[str, Any] = {"__name__": "page"}
    exec(compile(code, "depth.md", "exec"), namespace)
    assert namespace["figure"].data


def test_the_sum_holds(kept):
    assert all(one["identity"] < 1e-4 for one in kept["models"].values())


def test_what_is_said_of_writes_and_cosines_holds(kept, at):
    for model, depth_ in PAIRS:
        writes = [at.curve(model, "write", l) for l in range(depth_)]
        assert writes[0] > 5 * max(writes[1:])
        assert all(0.5 <= w <= 1.05 for w in writes[1:])
        names = ("write_cosine", "attention_cosine", "mlp_cosine")
        untrained = [x["value"] for x in kept["curves"] if x["model"] == f"{model}, untrained" and x["curve"] in names]
        assert max(map(abs, untrained)) < 0.04
    plain = [at.curve("donor, untrained", "write", l) for l in range(6)]
    assert plain == sorted(plain, reverse=True)
    assert at.curve("donor", "write", 3) < at.curve("donor", "write", 4) < at.curve("donor", "write", 5)
    attention = [at.curve("donor", "attention", l) for l in range(6)]
    assert attention == sorted(attention, reverse=True)
    cosines = [at.curve("donor", "write_cosine", l) for l in range(6)]
    assert min(cosines[1:]) > 0.1
    assert max(cosines) == cosines[5]
    assert max(at.curve("recipient", "attention_cosine", l) for l in (2, 3)) < -0.1
    assert min(at.curve("recipient", "mlp_cosine", l) for l in range(4)) > 0.05


def test_what_is_said_of_stream_and_attention_holds(kept, at):
    for model in kept["models"]:
        cosines = [
            at.curve(model, "final_cosine", l) for l in ("embeddings", *range(kept["models"][model]["n_layers"]))
        ]
        assert cosines == sorted(cosines)
    assert abs(at.curve("donor", "final_cosine", 1) - at.curve("donor, untrained", "final_cosine", 1)) < 0.05
    assert at.curve("donor", "overlap", 4) < 0.75
    assert abs(at.curve("donor", "pair_cosine", 5) - at.curve("donor, untrained", "pair_cosine", 5)) < 0.05
    assert at.curve("recipient", "pair_cosine", 3) < at.curve("recipient", "pair_cosine", 1) / 2
    for model, depth_ in PAIRS:
        for curve in ("attention_entropy", "attention_similarity"):
            layers = range(curve == "attention_similarity", depth_)
            assert all(at.curve(model, curve, l) < at.curve(f"{model}, untrained", curve, l) for l in layers)


def test_the_first_half_matters_more_to_later_tokens_than_the_second_and_than_untrained(at):
    """With the threshold of 1.5, and intervals apart."""
    for model, depth_ in PAIRS:
        trained, control = at.half(model), at.half(f"{model}, untrained")
        assert trained["low"] > 1.5
        assert trained["low"] > control["high"]
        effects = [at.output(model, "future", l) for l in range(depth_)]
        assert effects == sorted(effects, reverse=True)
        assert effects[0] > 2 * effects[1]
        assert effects[-1] < 1e-6
        assert all(at.output(f"{model}, untrained", "future", l) < 0.1 for l in range(depth_))
        assert at.half(model, "all")["value"] < 0.5 * trained["value"]
        assert 0.9 < at.half(model, "local")["value"] < 1.2
        local, erased = ([at.output(model, e, l) for l in range(depth_)] for e in ("local", "erase"))
        assert max(local) == local[-1]
        assert erased == sorted(erased, reverse=True)
    rest = {m: at.output(m, "future", 1) / at.output(m, "future", 4) for m in ("donor", "donor, untrained")}
    assert 0.75 < rest["donor"] / rest["donor, untrained"] < 1.33, "past layer 0, at about the untrained rate"


def test_what_is_said_of_scores_holds(at):
    assert at.score("donor", "future")["high"] < at.score("donor, untrained", "future")["low"]
    for model, _ in PAIRS:
        assert at.kind(model, "future", "plain")["high"] < at.kind(model, "future", "style")["low"]
        assert at.kind(model, "future", "plain")["score"] < 0.2


def test_layers_of_two_models_come_in_order(kept):
    """With the thresholds of 0.8, and below 0.3 for layers that change places."""
    for grid in kept["grids"]:
        assert grid["order"] >= 0.8
        assert abs(grid["chance"]["value"]) < 0.3
        assert all(e < 0.9 * m for e, m in zip(grid["errors"], grid["means"], strict=True))
        assert all(s > 0.99 * m for s, m in zip(grid["shuffled"], grid["means"], strict=True))
        assert min(grid["errors"]) > 0.5
    assert kept["grids"][0]["fixed_order"] < 0.8
    assert kept["grids"][2]["fixed_order"] is None
    assert best_matching({(0, 0): 1.0}) == {0: 0}


@pytest.mark.slow
def test_a_run_gives_the_numbers_of_the_page_again(kept, tmp_path: Path):
    """Within what another machine's arithmetic may change."""
    assert differences(depth.measure(tmp_path), kept) == []
