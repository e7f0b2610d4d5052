"""Half the work, the same product: strips narrower than the matrix, and one strip."""

from __future__ import annotations

import pytest
import torch

from workbench.maps import symmetric
from workbench.maps.symmetric import eigh, gram, quadratic_diagonal, symmetric_product


@pytest.mark.parametrize("strip", [1, 3, 7, 100])
def test_strips_give_the_whole_product(strip, monkeypatch):
    monkeypatch.setattr(symmetric, "STRIP", {"cpu": strip})
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(20, width, generator=g, dtype=torch.float64) for width in (7, 5))
    s = symmetric_product(x.T, x)
    torch.testing.assert_close(s, x.T @ x)
    assert strip >= 7 or torch.equal(s, s.T)
    torch.testing.assert_close(quadratic_diagonal(x @ x.T, w), (w.T @ x @ x.T @ w).diagonal())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[::2, 1:], lambda x: x.T])
@pytest.mark.parametrize("wide", [1, 1024])
def test_a_product_with_itself_of_any_view(dtype, view, wide, monkeypatch):
    monkeypatch.setattr(symmetric, "WIDE", wide)
    x = view(torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).to(dtype))
    assert wide > 1 or dtype == torch.bfloat16 or torch.equal(gram(x), gram(x).T)
    torch.testing.assert_close(gram(x), x.T @ x)


def test_eigenvectors_are_torchs_but_for_their_signs(monkeypatch):
    monkeypatch.setattr(symmetric, "WIDE", 1)
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values, vectors = eigh(gram(x))
    known_values, known_vectors = torch.linalg.eigh(gram(x))
    torch.testing.assert_close(values, known_values)
    torch.testing.assert_close((vectors.T @ known_vectors).abs(), torch.eye(12, dtype=torch.float64))
