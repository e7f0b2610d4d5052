"""The benchmark of folding runs, and its page is told; its figures are for its table alone."""

from __future__ import annotations

import pytest

from .fold_bench import language, paper
from .tables import SECTIONS


def test_networks_and_models_are_timed_and_told():
    found = language(2, 4, 1, width=64, repeats=1)
    assert found["weights"] == pytest.approx(0.375)
    told = SECTIONS["fold"].tell({"models": [found], "paper": paper(2, 4, width=32, repeats=1)})
    assert "| 8 |" in told
    assert "before it is folded" in told
