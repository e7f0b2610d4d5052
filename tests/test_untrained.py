"""An untrained model has the shape of its model, none of its weights, and leaves torch's generator alone."""

from __future__ import annotations

import pytest
import torch

from workbench.errors import UserError
from workbench.models import load
from workbench.untrained import untrained_like

from .conftest import make_module, word_tokenizer


def test_it_is_of_one_shape_and_of_other_weights(small_model):
    state = torch.get_rng_state()
    made = untrained_like(small_model, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert made.name == f"{small_model.name}, untrained"
    assert (made.n_layers, made.width, made.dtype) == (small_model.n_layers, small_model.width, small_model.dtype)
    mine, theirs = (dict(m.module.named_parameters()) for m in (made, small_model))
    assert {n: p.shape for n, p in mine.items()} == {n: p.shape for n, p in theirs.items()}
    weights = [n for n, p in mine.items() if p.ndim > 1]
    assert not any(torch.equal(mine[n], theirs[n]) for n in weights)
    again, other = untrained_like(small_model, seed=3), untrained_like(small_model, seed=4)
    assert all(torch.equal(p, mine[n]) for n, p in again.module.named_parameters())
    assert not torch.equal(dict(other.module.named_parameters())[weights[0]], mine[weights[0]])


def test_half_precision_stays_half():
    half = load(make_module("llama").bfloat16(), tokenizer=word_tokenizer())
    assert untrained_like(half).dtype == torch.bfloat16


def test_what_cannot_be_made_again_is_refused(llama):
    llama.module.config.quantization_config = {"bits": 4}
    with pytest.raises(UserError, match=r"are packed .*or leave the control out"):
        untrained_like(llama)
    del llama.module.config.quantization_config

    class Wrapped(type(llama.module)):
        def __init__(self, config, adapter):
            super().__init__(config)

    llama.module.__class__ = Wrapped
    with pytest.raises(UserError, match="no untrained Wrapped can be made from its configuration alone"):
        untrained_like(llama)
