"""docs/probes.md is what its numbers say: the page is that of docs/probes.json, and its words hold of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from . import probes


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    return json.loads(probes.KEPT.read_text(encoding="utf-8"))


def test_the_page_is_that_of_its_numbers(kept):
    assert probes.PAGE.read_text(encoding="utf-8") == probes.page(kept)
    pictures = sorted((probes.PAGE.parent / "img").glob("probes_*.png"))
    assert [p.stem for p in pictures] == ["probes_answer", "probes_operand"]
    assert max(p.stat().st_size for p in pictures) < 100_000


def test_what_is_said_of_the_curves_holds(kept):
    for side in probes.SIDES:
        harm, answer, operand = (kept["curves"][side][name] for name in ("harm", "answer", "operand"))
        assert all(line["words"] >= line["accuracy"] for line in harm), "the words alone tell it as well as any layer"
        assert all(line["accuracy_high"] < line["words"] for line in answer), "less than of the bag of words"
        assert all(line["accuracy_low"] > 2 * line["chance"] for line in answer), "far above chance"
        assert all(line["selectivity_low"] > 0 for line in [*harm, *answer])
        assert all(line["accuracy_low"] > 2 * line["words"] for line in operand)
    donor, recipient = (kept["curves"][side]["operand"] for side in probes.SIDES)
    assert donor[0]["accuracy_high"] < donor[1]["accuracy_low"], "after its second block"
    assert recipient[0]["accuracy_low"] > 0.95, "from the start"


def test_what_is_said_of_directions_holds(kept):
    for side in probes.SIDES:
        by = {line["method"]: line for line in kept["steering"][side]}
        for way in ("towards", "away"):
            assert 0.2 < by["logistic"][way] / by["mean_difference"][way] < 0.5, "a quarter to half as far"
        assert by["random"]["towards_high"] < 0.5 * by["logistic"]["towards"]
        erased = kept["erased"][side]
        assert abs(erased["after"] - 0.5) < 0.03, "at chance within a few hundredths"
        assert erased["kl_low"] > 0, "not free"
        assert erased["perplexity"][1] > erased["perplexity"][0]
    assert all(line["effect_low"] > 0.5 for line in kept["pasted"])
