"""The same architecture before training: the control of whatever is said to be learnt."""

from __future__ import annotations

import copy
from typing import Any

import torch

from .errors import UserError
from .models import Model, load


def untrained_like(model: Model, seed: int = 0) -> Model:
    """A model of the same configuration, tokenizer, device and dtype with weights as its family draws them before training.

    It takes as much memory as the model itself. torch's generator is left as it was. Raises UserError for weights that lie on
    several devices or are packed, and for a model that is no plain Hugging Face one (an adapter around it, say).

    >>> untrained_like(load("bundled:donor")).name     # doctest: +SKIP
    'bundled:donor, untrained'
    """
    module: Any = model.module
    config = getattr(module, "config", None)
    places = {p.device for p in module.parameters()}
    if len(places) > 1 or model.device.type == "meta":
        raise UserError(f"the weights of {model.name} lie on {len(places)} devices, and an untrained model of its size needs "
                        "one; leave the control out, or load the model on one device")  # fmt: skip
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"the weights of {model.name} are packed ({type(module).__name__}); an untrained model is made in "
                        "float16, bfloat16 or float32: load it so, or leave the control out")  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU, the same ones for every device
        torch.default_generator.manual_seed(seed)
        try:
            made = type(module)._from_config(
                copy.deepcopy(config), dtype=model.dtype
            )  # what is kept in float32 stays so
        except (TypeError, AttributeError, ValueError) as err:
            raise UserError(f"no untrained {type(module).__name__} can be made from its configuration alone ({err}); load the "
                            "plain model, or leave the control out") from err  # fmt: skip
    found = load(made.to(model.device), tokenizer=model.tokenizer, blocks=model.blocks_path, prove=False)
    found.name = f"{model.name}, untrained"
    return found
