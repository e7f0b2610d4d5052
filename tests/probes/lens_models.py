"""Small models of which a lens knows the truth, and the reference formulas written out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.conftest import make_module, word_tokenizer
from workbench.models import Model, load

TEXTS = [" ".join(f"w{(7 * i + 11 * j + i * j) % 170}" for j in range(4 + i % 9)) for i in range(80)]


def planted(family: str, still: int, seed: int = 0) -> Model:
    """A model whose blocks from `still` on add nothing: from the output of the block before it all is said."""
    module = make_module(family, seed)
    found = load(module, tokenizer=word_tokenizer(), prove=False)
    with torch.no_grad():
        for layer in range(still, found.n_layers):
            for name, parameter in found.block(layer).named_parameters():
                if any(part in name for part in ("o_proj", "down_proj", "c_proj", "dense_4h_to_h", "attention.dense")):
                    parameter.zero_()
    return found


def hidden(model: Model, ids: Tensor) -> list[Tensor]:
    """The states at the sites of a lens, as transformers gives them: the embeddings and each block, the last unnormed."""
    end: list[Any] = []
    hook = model.block(model.n_layers - 1).register_forward_hook(
        lambda _, __, out: end.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.inference_mode():
        out = model.module(ids[None], output_hidden_states=True, use_cache=False)
    hook.remove()
    return [*(state[0] for state in out.hidden_states[:-1]), end[0][0]]
