"""Feed-forward networks are found in every family, and what cannot be folded is refused with its reason."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import nn

from workbench.errors import UserError
from workbench.folding.ffn import FFN, find_ffns
from workbench.folding.fold import ffns_of

from ..conftest import LAYERS, WIDTH, make_model

PLAIN = {"gpt2": (4 * WIDTH, ("c_fc",)), "gpt_neox": (96, ("dense_h_to_4h",)), "falcon": (4 * WIDTH, ("dense_h_to_4h",)),
         "bloom": (4 * WIDTH, ("dense_h_to_4h",)), "mpt": (4 * WIDTH, ("up_proj",)), "phi": (96, ("fc1",))}  # fmt: skip
GATED = {"llama": 1, "gemma2": 1, "qwen3": 1, "olmo2": 1, "phi3": 2}


@pytest.mark.parametrize("family", PLAIN)
def test_plain_networks_are_found(family):
    hidden, inputs = PLAIN[family]
    found = ffns_of(make_model(family))
    assert len(found) == LAYERS
    assert {(f.hidden, f.width, f.inputs, f.gated, f.parts) for f in found} == {(hidden, WIDTH, inputs, False, 1)}


@pytest.mark.parametrize("family", GATED)
def test_gated_networks_are_found(family):
    found = ffns_of(make_model(family))
    assert len(found) == LAYERS
    assert {(f.hidden, f.gated, f.parts, len(f.inputs) * f.parts) for f in found} == {(96, True, GATED[family], 2)}


@pytest.mark.parametrize("kind", ["ViT", "DeiT"])
def test_vision_transformers_have_the_same_networks(kind):
    config = getattr(tf, f"{kind}Config")(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                          image_size=16, patch_size=8)  # fmt: skip
    model = getattr(tf, f"{kind}ForImageClassification")(config).eval()
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
    found = find_ffns(model, list(blocks), lambda: model(torch.randn(2, 3, 16, 16)))
    assert [(f.hidden, f.width, f.gated) for f in found] == [(64, 32, False)] * 2


def test_a_network_is_kept_in_a_config():
    ffn = ffns_of(make_model("llama"))[1]
    assert FFN.from_dict(ffn.as_dict()) == ffn


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("mixtral", "the feed-forward network of block 0 is a mixture of experts"),
        (
            "qwen2_moe",
            "is a mixture of experts, each of which sees tokens of its own; only dense networks can be folded",
        ),
        ("opt", "block 0: no module of it is a feed-forward network of plain Linear layers"),
    ],
)
def test_what_cannot_be_folded_is_told_in_one_line(family, words):
    with pytest.raises(UserError, match=words) as told:
        ffns_of(make_model(family))
    assert "\n" not in str(told.value)
