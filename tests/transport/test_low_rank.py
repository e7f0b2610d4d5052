"""A site of fewer directions than columns, at the grid's own precision: no figure counts the rounding of a product."""

from __future__ import annotations

import pytest
import torch

from workbench.sites import Site
from workbench.transport import transport_grid

from .streams import write_stream


def test_an_exact_map_onto_few_directions_has_a_whitened_r2_of_one(tmp_path):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6000, 48, generator=g)
    y = x.double() @ (torch.randn(48, 12, generator=g) @ torch.randn(12, 48, generator=g)).double() / 12**0.5
    store = write_stream(tmp_path / "s", {Site(0): x, Site(1): y.float()}, 20)
    cell = transport_grid(store, control=False, alpha=1e-6, baselines=()).cell(0, 1)
    assert cell["r2_whitened"] == pytest.approx(1, abs=1e-4)
