"""Depth scores: the planted place is found, with an interval that is of the prompts."""

from __future__ import annotations

import pytest
import torch

from probes.depth_score import depth_score, depth_scores
from workbench.errors import UserError


def test_the_place_of_the_effect_is_the_score():
    one = torch.zeros(6, 40)
    one[3] = 2.0
    found = depth_score(one)
    assert (found.value, found.low, found.high) == (3, 3, 3)
    assert depth_score(one * 7).value == 3, "whatever the size of the effects"
    assert depth_score(torch.ones(3, 5), [0, 4, 8]).value == 4


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    shape = torch.tensor([4.0, 2.0, 1.0, 1.0])
    truth = float((torch.arange(4) * shape).sum() / shape.sum())
    inside = 0
    for _ in range(200):
        found = depth_score(shape[:, None] * torch.empty(4, 50).exponential_(generator=generator))
        inside += found.low <= truth <= found.high
    assert 180 <= inside <= 198


def test_kinds_of_prompts_have_scores_of_their_own():
    effects = torch.cat(
        [torch.tensor([[1.0], [0.0], [1.0]]).repeat(1, 3), torch.tensor([[0.0], [0.0], [1.0]]).repeat(1, 3)], 1
    )
    table = depth_scores(effects, ["easy"] * 3 + ["hard"] * 2 + [None])
    assert table["group"].tolist() == ["all", "easy", "hard"]
    assert table["score"].tolist()[1:] == [1, 2]
    assert table["prompts"].tolist() == [6, 3, 2]


@pytest.mark.parametrize(
    "effects", [torch.zeros(3, 4), torch.tensor([[1.0], [-1.0]]), torch.tensor([[1.0], [torch.nan]])]
)
def test_effects_without_a_place_are_refused(effects):
    with pytest.raises(UserError, match="effects that are finite, not negative, and not all zero"):
        depth_score(effects)


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="2 layers do not fit effects of 3"):
        depth_score(torch.ones(3, 4), [0, 1])
    with pytest.raises(UserError, match="1 groups do not fit effects of 4 prompts"):
        depth_scores(torch.ones(3, 4), ["a"])
