"""The tokens that name a feature: planted ones are found, batches change nothing."""

from __future__ import annotations

import pytest
import torch

from probes.dictionaries import Dictionary
from probes.feature_tokens import top_tokens
from workbench.errors import UserError


def axes(d: int, kind: str = "relu", **options) -> Dictionary:
    return Dictionary(torch.eye(d), torch.zeros(d), torch.eye(d), torch.zeros(d), kind, **options)


def test_planted_tokens_are_found():
    """Feature i fires on word i, harder the later in the text; feature 4 never."""
    words = [f"w{i % 4}" for i in range(40)]
    rows = torch.zeros(40, 5)
    rows[torch.arange(40), torch.arange(40) % 4] = torch.arange(1.0, 41.0)
    for size in (40, 7):
        found = top_tokens(axes(5), rows.split(size), 3, texts=words)
        assert found.names == ("w0", "w1", "w2", "w3", "(silent)")
        assert found.rows[0].tolist() == [36, 32, 28]
        assert found.values[0].tolist() == [37.0, 33.0, 29.0]
        assert found.rows[4].tolist() == [-1, -1, -1]
        assert found.rate.tolist() == pytest.approx([0.25] * 4 + [0.0])
    chosen = top_tokens(axes(5, "topk", k=1), rows, 3, texts=words, features=[2])
    assert chosen.names == ("w2",)
    assert chosen.frame().loc[2, "tokens"] == ["w2", "w2", "w2"]


def test_of_equal_activations_the_earlier_batches_are_named():
    rows, words = torch.ones(30, 1), [str(i) for i in range(30)]
    for size in (30, 4):
        assert set(top_tokens(axes(1), rows.split(size), 30, texts=words).rows[0].tolist()) == set(range(30))
        assert top_tokens(axes(1), rows.split(1), 2, texts=words).rows[0].tolist() == [0, 1]


def test_what_does_not_fit_is_told():
    rows = torch.ones(3, 2)
    with pytest.raises(UserError, match="need texts"):
        top_tokens(axes(2), rows)
    with pytest.raises(UserError, match="got 2 texts for 3 rows"):
        top_tokens(axes(2), rows, texts=["a", "b"])
    with pytest.raises(UserError, match="at least 1 token"):
        top_tokens(axes(2), rows, 0, texts=["a"])
    with pytest.raises(UserError, match="reads rows of width 3; got width 2"):
        top_tokens(axes(3), rows, texts=["a", "b", "c"])
