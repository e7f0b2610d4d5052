"""docs/scale.md is what its numbers say, its numbers are what the formulas say, and its words hold of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from workbench.work import ModelShape

from . import scale
from .transport import rounded


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    return json.loads(scale.KEPT.read_text(encoding="utf-8"))


def test_the_page_is_that_of_its_numbers(kept):
    assert scale.PAGE.read_text(encoding="utf-8") == scale.page(kept)
    assert scale.figures(None, kept) == {}


def test_the_numbers_are_those_of_the_formulas(kept):
    shape = ModelShape.of_numbers("Llama-3.1-8B", scale.MODELS["Llama-3.1-8B"])
    assert rounded(scale.costs(shape)) == [line for line in kept["costs"] if line["model"] == shape.name]
    assert rounded(scale._model(shape)) == kept["models"][0]


def test_the_models_are_as_large_as_their_cards_say(kept):
    found = {m["name"]: m["parameters"] for m in kept["models"]}
    assert found == {"Llama-3.1-8B": 8_030_261_248, "Llama-3.3-70B": 70_553_706_496, "Llama-3.1-405B": 405_853_388_800}


def test_what_is_said_of_disk_and_memory_holds(kept):
    def of(model: str, way: str) -> dict[str, Any]:
        return scale.line(kept, model, way, 1e9)

    for model in scale.MODELS:
        assert of(model, "stored, all layers")["binds"] == "disk"
        for way in ("moments, 4 sites, all pairs", "moments, all layers, neighbours", "moments, all layers, all pairs"):
            assert of(model, way)["binds"] == "compute"
            assert of(model, way)["disk"] == scale.line(kept, model, way, 1e6)["disk"], "do not grow with the tokens"
    assert of("Llama-3.1-8B", "moments, all layers, all pairs")["needed"] == 2, "the memory of two GPUs"


def test_what_is_said_of_the_check_holds(kept):
    for line in kept["check"]["lines"]:
        assert 0.95 < line["ratio"] <= 1.001, line["what"]  # of attention the half that is needed
    for line in kept["check"]["bytes"]:
        assert line["predicted"] == line["found"]


@pytest.mark.slow
def test_the_check_runs_on_little(tmp_path):
    found = scale.checked(tmp_path, width=64, layers=3, texts=4, words=20, repeats=1)
    assert all(line["measured_s"] > 0 for line in found["lines"])
