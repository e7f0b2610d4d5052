"""LoRA folders of random numbers, as peft writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .conftest import make_module

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "donor", "init_lora_weights": True}
TARGETS = {"llama": "model.layers.{}.mlp.down_proj", "gpt2": "transformer.h.{}.mlp.c_proj"}


def lora_folder(
    path: Path, family: str = "llama", layers: Sequence[int] = (1,), size: float = 0.3, rank: int = 2, **config: Any
) -> Path:
    """A LoRA as peft would write it, of random numbers."""
    draw, tensors = torch.Generator().manual_seed(1), {}
    module = make_module(family)
    for name in (TARGETS[family].format(layer) for layer in layers):
        one = module.get_submodule(name)
        d_in, d_out = (one.nx, one.nf) if family == "gpt2" else (one.in_features, one.out_features)
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, d_in, generator=draw) / d_in**0.5
        tensors[f"base_model.model.{name}.lora_B.weight"] = size * torch.randn(d_out, rank, generator=draw)
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(tensors, path / "adapter_model.safetensors")
    return path
