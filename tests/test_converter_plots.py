"""Figures of a converter show its numbers."""

from __future__ import annotations

import pytest
import torch

from workbench import converter_plots as plots
from workbench.adapters.adapter import LowRank
from workbench.captures import capture_of_maps
from workbench.convert import Converter
from workbench.maps.agreement import agreement_of
from workbench.maps.linear_map import LinearMap
from workbench.sites import Site


def diagonal(*values: float) -> LinearMap:
    return LinearMap(torch.diag(torch.tensor(values, dtype=torch.float32)), torch.zeros(len(values)))


def test_counts_are_drawn_by_cell_and_none_where_there_is_nothing():
    y = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    found = agreement_of(LinearMap.identity(3), y, y, cells=5)
    heat, line = plots.predicted_against_actual(found).data
    assert heat.z[0][4] is None
    assert heat.customdata[2][2] == int(found.counts[2, 2])
    assert heat.z[2][2] == pytest.approx(torch.log10(found.counts[2, 2].double()).item())
    assert list(line.x) == list(line.y) == [-4, 4]


def test_spectra_end_at_their_rank():
    figure = plots.map_spectra(Converter(Site(0), Site(1), diagonal(3, 2, 1), diagonal(5, 0, 0)))
    there, _, back, _ = figure.data
    assert (list(there.y), list(back.y)) == ([3, 2, 1], [5])
    assert "rank 1, condition 1" in back.name


def test_capture_has_its_chance():
    part = LowRank(torch.eye(3)[:, :1], torch.zeros(1), torch.eye(3)[2:])
    found = capture_of_maps(part, diagonal(3, 2, 1), diagonal(3, 2, 1))
    band, chance, read, write = plots.capture_curves(found).data
    assert list(chance.y) == pytest.approx([(k / 3) ** 0.5 for k in (1, 2, 3)])
    assert (list(read.y), list(write.y)) == ([1, 1, 1], [0, 0, 1])
    assert len(band.x) == 6
