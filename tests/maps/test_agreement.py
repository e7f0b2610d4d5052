"""Predicted against actual, counted in cells: of perfect maps, of the mean, of outliers."""

from __future__ import annotations

import pytest
import torch

from workbench.errors import UserError
from workbench.maps.agreement import agreement_of
from workbench.maps.linear_map import LinearMap


def rows(n: int = 500, d: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_a_perfect_map_lies_on_the_diagonal_whatever_the_size_of_its_outputs():
    y = rows() * torch.tensor([1e-3, 1.0, 50.0, 1e4]) + torch.tensor([5.0, 0.0, -3.0, 1e5])
    found = agreement_of(LinearMap.identity(4), y, y)
    assert int(found.counts.sum()) == int(found.counts.diagonal().sum()) == 2000
    assert (found.n_rows, found.n_outputs) == (500, 4)
    assert found.r2_weighted == pytest.approx(1)
    per_column = found.counts.sum(0)
    assert torch.equal(per_column, found.counts.sum(1))


def test_predicting_the_mean_fills_one_column_and_scores_nothing():
    y = rows()
    found = agreement_of(LinearMap(torch.zeros(4, 4), y.mean(0)), y, y, cells=21)
    assert (found.counts.sum(0) > 0).nonzero().flatten().tolist() == [10]  # the middle one
    assert found.r2_uniform == pytest.approx(0, abs=1e-6)


def test_actual_goes_down_and_predicted_across():
    y = rows(d=1)
    found = agreement_of(LinearMap(torch.full((1, 1), 0.5), torch.zeros(1)), y, y, cells=9)
    down, across = found.counts.sum(1), found.counts.sum(0)
    assert int((down > 0).sum()) > int((across > 0).sum())


def test_what_lies_beyond_the_edges_is_counted_there_and_told():
    y = rows()
    x = y.clone()
    x[0, 0] = 1e6
    found = agreement_of(LinearMap.identity(4), x, y, reach=6.0)
    assert found.outside == 1
    assert int(found.counts.sum()) == 2000
    assert int(found.counts[:, -1].sum()) == 1


def test_outputs_that_never_vary_are_left_out():
    y = rows()
    y[:, 2] = 7
    found = agreement_of(LinearMap.identity(4), y, y)
    assert found.n_outputs == 3
    assert int(found.counts.sum()) == 1500


def test_it_shows_itself():
    found = agreement_of(LinearMap.identity(4), rows(), rows())
    assert "500 rows x 4 outputs" in repr(found)
    assert "<td>2,000</td>" in found._repr_html_()


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(
        UserError, match="x and y must pair row by row, two rows at least; got 3 rows of x and 4 rows of y"
    ):
        agreement_of(LinearMap.identity(4), rows(3), rows(4))
    with pytest.raises(UserError, match="no output varies"):
        agreement_of(LinearMap.identity(4), rows(3), torch.ones(3, 4))
