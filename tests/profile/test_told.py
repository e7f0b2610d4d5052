"""A finished profile says what it cost in the FLOPs that its plan counted, and of a resumed one what was done now."""

from __future__ import annotations

import logging
import re

import pytest

from workbench.profile import plan as profile_plan
from workbench.profile import profile_model
from workbench.profile.cost import profile_cost
from workbench.profile.plan import make_plan
from workbench.profile.sums import profile_moments
from workbench.profile.told import passes_of, tell
from workbench.prompts import PromptSet

from ..conftest import make_model

PROMPTS = PromptSet.load(
    [{"id": str(i), "prompt": " ".join(f"w{(5 * i + j) % 150}" for j in range(3 + i % 7))} for i in range(12)]
)


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


def said(caplog: pytest.LogCaptureFixture) -> str:
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("profiled")]
    return line


def test_a_profile_says_the_flops_that_were_planned(model, tmp_path, caplog):
    planned = profile_cost(model, PROMPTS, sites=[0, 1])
    with caplog.at_level(logging.INFO, "workbench"):
        profile_model(model, PROMPTS, tmp_path / "s", sites=[0, 1])
    assert f"{planned.tokens} tokens" in said(caplog)
    assert f"{planned.flops:.3g} FLOPs" in said(caplog)


def test_moments_say_their_sums_too(model, tmp_path, caplog):
    planned = profile_cost(model, PROMPTS, moments=True, folds=2)
    with caplog.at_level(logging.INFO, "workbench"):
        profile_moments(model, PROMPTS, tmp_path / "m", folds=2)
    assert planned.sums_flops > 0
    assert f"{planned.flops:.3g} FLOPs of passes and {planned.sums_flops:.3g} of sums" in said(caplog)
    assert f"{planned.sums_flops:.3g} of the sums" in str(planned)


def test_of_a_part_of_the_blocks_their_own_are_counted(model, monkeypatch, caplog):
    monkeypatch.setattr(profile_plan, "BLOCK_ROWS", 5)
    plan = make_plan(model, PROMPTS)
    parts = [plan.blocks[:1], plan.blocks[1:]]
    assert len(plan.blocks) > 1
    assert sum(passes_of(model, plan, part).flops for part in parts) == pytest.approx(passes_of(model, plan).flops)
    with caplog.at_level(logging.INFO, "workbench"):
        tell(model, plan, parts[1], 2.0)
        tell(model, plan, [], 2.0)
    tokens = sum(plan.tokens_of(block) for block in parts[1])
    flops = passes_of(model, plan, parts[1]).flops
    assert re.search(
        rf"{tokens} tokens in 2 s, {re.escape(f'{flops:.3g}')} FLOPs \({re.escape(f'{flops / 2:.3g}')} a", said(caplog)
    )
