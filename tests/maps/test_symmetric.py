"""Half the work, the same product: strips narrower than the matrix, and one strip."""

from __future__ import annotations

import pytest
import torch

from workbench.maps import symmetric
from workbench.maps.symmetric import quadratic_diagonal, symmetric_product


@pytest.mark.parametrize("strip", [1, 3, 7, 100])
def test_strips_give_the_whole_product(strip, monkeypatch):
    monkeypatch.setattr(symmetric, "STRIP", {"cpu": strip})
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(20, width, generator=g, dtype=torch.float64) for width in (7, 5))
    s = symmetric_product(x.T, x)
    torch.testing.assert_close(s, x.T @ x)
    assert strip >= 7 or torch.equal(s, s.T)
    torch.testing.assert_close(quadratic_diagonal(x @ x.T, w), (w.T @ x @ x.T @ w).diagonal())
