"""Scores by shard are the scores of all rows, and their errors those of leaving shards out by hand."""

from __future__ import annotations

import pytest
import torch

from workbench.errors import UserError
from workbench.maps import LinearMap, Moments, Whitener, score_map, total
from workbench.maps.jackknife import leave_out_shards
from workbench.maps.shard_scores import ShardScores


def make(d: int = 5, sizes: tuple[int, ...] = (30, 20, 25, 40)) -> tuple[Moments, list[Moments], LinearMap]:
    g = torch.Generator().manual_seed(0)
    turn = torch.randn(d, d, generator=g, dtype=torch.float64)

    def rows(n: int) -> Moments:
        x = 3 + torch.randn(n, d, generator=g, dtype=torch.float64)
        return Moments().update({"x": x, "y": x @ turn + torch.randn(n, d, generator=g, dtype=torch.float64)})

    wrong = turn + 0.1 * torch.randn(d, d, generator=g, dtype=torch.float64)
    return rows(200), [rows(n) for n in sizes], LinearMap(wrong, torch.ones(d, dtype=torch.float64))


def test_figures_and_errors_are_those_of_all_rows_and_of_leaving_shards_out():
    train, shards, fitted = make()
    white = Whitener.of_block(train, "y")
    found = ShardScores.of(fitted, shards, "x", "y", train=train, precision=white.inverse_root @ white.inverse_root)

    def by_hand(moments: Moments) -> torch.Tensor:
        score = score_map(fitted, moments, "x", "y", train=train)
        return torch.tensor([score.r2_uniform, score.r2_weighted, score.r2_whitened, *score.per_output.tolist()])

    expected = leave_out_shards(by_hand, shards)
    for mine, part in ((found.overall, slice(3)), (found.per_output, slice(3, None))):
        assert torch.allclose(mine.value, expected.value[part].double(), atol=1e-6)
        assert torch.allclose(mine.error, expected.error[part].double(), atol=1e-5)
    assert torch.allclose(found.sse.sum(0), score_map(fitted, total(shards), "x", "y").sse)


def test_without_a_precision_there_is_no_whitened_score():
    train, shards, fitted = make()
    overall = ShardScores.of(fitted, shards, "x", "y", train=train).overall
    assert overall.value.isnan().tolist() == [False, False, True]


def test_one_shard_is_refused_and_so_is_a_constant_target():
    train, shards, fitted = make()
    with pytest.raises(UserError, match="at least 2 shards of held-out rows; got 1"):
        ShardScores.of(fitted, [shards[0], Moments()], "x", "y", train=train)
    still = [Moments().update({"x": torch.randn(9, 5), "y": torch.ones(9, 5)}) for _ in range(2)]
    with pytest.raises(UserError, match="y is constant in the rows to score"):
        ShardScores.of(fitted, still, "x", "y", train=train)
