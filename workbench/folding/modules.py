"""The folded feed-forward network: the family's own module, of fewer channels, and one linear map beside it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ..maps.linear_map import LinearMap
from .ffn import FFN, weight_of


class FoldedFFN(nn.Module):
    """y = inner(x) + x @ W + b: `inner` is the network that was there with its active channels alone.

    inner keeps its own code, so that what a family does around its projections (a residual that it adds, dropout) stays.
    """

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner = inner
        like = next(inner.parameters())
        self.linear = nn.Linear(width, width, device=like.device, dtype=like.dtype)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.inner(hidden_states, *args, **kwargs) + self.linear(hidden_states)


def shrink(module: nn.Module, ffn: FFN, active: int) -> nn.Module:
    """Replaces the projections of a network by ones of `active` channels with values of no meaning, in place."""
    for name in (*ffn.inputs, ffn.output):
        parent, _, leaf = name.rpartition(".")
        holder, old = module.get_submodule(parent), module.get_submodule(name)
        size = (active, ffn.width) if name == ffn.output else (ffn.width, active * ffn.parts)
        setattr(holder, leaf, _projection(old, *size))
    return module


def _projection(old: Any, d_in: int, d_out: int) -> nn.Module:
    like, bias = old.weight, old.bias is not None
    if isinstance(old, nn.Linear):
        return type(old)(d_in, d_out, bias=bias, device=like.device, dtype=like.dtype)
    with torch.device(like.device):  # GPT-2's Conv1D: [d_in, d_out], always with a bias
        return type(old)(d_out, d_in).to(like.dtype)


def folded_module(module: nn.Module, ffn: FFN, idle: Int[Tensor, " k"], linear: LinearMap) -> FoldedFFN:
    """The folded form of a network, which is left as it is.

    idle: the channels that `linear`, y = x @ W + b, takes the place of.
    """
    keep = torch.ones(ffn.hidden, dtype=torch.bool)
    keep[idle] = False
    index = keep.nonzero()[:, 0]
    inner = copy.deepcopy(module)
    # a network's weights are held twice for a moment, a block at a time
    folded = FoldedFFN(shrink(inner, ffn, len(index)), ffn.width)
    with torch.no_grad():
        for name in ffn.inputs:
            old: Any = module.get_submodule(name)
            new: Any = inner.get_submodule(name)
            rows = torch.cat([index + part * ffn.hidden for part in range(ffn.parts)]).to(old.weight.device)
            weight_of(new).copy_(weight_of(old)[:, rows])
            if old.bias is not None:
                new.bias.copy_(old.bias[rows])
        old, new = module.get_submodule(ffn.output), inner.get_submodule(ffn.output)
        weight_of(new).copy_(weight_of(old)[index.to(old.weight.device)])
        if old.bias is not None:
            new.bias.copy_(old.bias)
        folded.linear.weight.copy_(linear.weight.T)
        folded.linear.bias.copy_(linear.bias)
    return folded.train(module.training)
