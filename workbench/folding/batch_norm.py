"""RePaViT's feed-forward network: trained with idle channels and BatchNorm, then folded without any change of its outputs.

Source: arXiv:2505.21847, eq. 2 to 6. With s = gamma / sqrt(var + eps) of each norm, W_in' = diag(s_1) W_in and
W_out' = diag(s_2) W_out (biases alike), the channels that no activation acts on and the shortcut are one matrix:

    Z = act(Y W_in'[:, active] + b_in'[active]) W_out'[active] + Y W + b
    W = W_in'[:, idle] W_out'[idle] + I,   b = b_in'[idle] W_out'[idle] + b_out'

so that of the 2 rho d^2 weights of a network of rho d channels a share of 1 - theta + 1 / (2 rho) is left.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import UserError


def idle_count(theta: int | float, hidden: int) -> int:
    """How many of `hidden` channels a share theta is, rounded down; UserError outside of [0, 1).

    >>> idle_count(0.75, 16), idle_count(0.5, 5)
    (12, 2)
    """
    if isinstance(theta, bool) or not 0 <= theta < 1:
        raise UserError(f"theta is the share of channels that are idle, from 0 to less than 1; got {theta:g} (with none active "
                        "a network is linear, and models trained so collapse)")  # fmt: skip
    return math.floor(theta * hidden + 1e-9)


class ChannelIdleFFN(nn.Module):
    """Z = BN2(act on the first channels alone of BN1(Y) W_in) W_out + Y; the last share `theta` of the channels is idle.

    Over the last dimension of Y [..., d]; both norms are over all rows. theta 0 is the dense network.
    """

    def __init__(self, width: int, hidden: int, theta: float, act: nn.Module | None = None) -> None:
        super().__init__()
        self.active = hidden - idle_count(theta, hidden)
        self.norm_in, self.norm_mid = nn.BatchNorm1d(width), nn.BatchNorm1d(hidden)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.act = act or nn.GELU()

    def forward(self, hidden_states: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        made = self.up(_by_column(self.norm_in, hidden_states))
        made = torch.cat([self.act(made[..., : self.active]), made[..., self.active :]], -1)
        return self.down(_by_column(self.norm_mid, made)) + hidden_states


class ReparameterisedFFN(nn.Module):
    """Z = act(Y W_up + b_up) W_down + Y W + b: what a `ChannelIdleFFN` becomes, norms and shortcut folded in."""

    def __init__(self, width: int, active: int, act: nn.Module | None = None) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, active), nn.Linear(active, width, bias=False)
        self.linear = nn.Linear(width, width)
        self.act = act or nn.GELU()

    def forward(self, hidden_states: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        return self.down(self.act(self.up(hidden_states))) + self.linear(hidden_states)


def reparameterise(ffn: ChannelIdleFFN) -> ReparameterisedFFN:
    """The folded network of one that runs in eval mode: its norms as their running statistics are. Made in float64.

    >>> y, ffn = torch.randn(4, 8), ChannelIdleFFN(8, 32, theta=0.75).eval()
    >>> bool((reparameterise(ffn)(y) - ffn(y)).abs().max() < 1e-4)
    True
    """
    like, active = ffn.up.weight, ffn.active
    w_in, b_in = _folded_norm(ffn.norm_in, ffn.up)
    w_out, b_out = _folded_norm(ffn.norm_mid, ffn.down)
    made = ReparameterisedFFN(len(w_in), active, ffn.act).to(like)
    linear = w_in[:, active:] @ w_out[active:] + torch.eye(len(w_in)).to(w_in)
    with torch.no_grad():
        made.up.weight.copy_(w_in[:, :active].T)
        made.up.bias.copy_(b_in[:active])
        made.down.weight.copy_(w_out[:active].T)
        made.linear.weight.copy_(linear.T)
        made.linear.bias.copy_(b_in[active:] @ w_out[active:] + b_out)
    return made.train(ffn.training)


def _folded_norm(norm: nn.BatchNorm1d, after: nn.Linear) -> tuple[Float[Tensor, "d_in d_out"], Float[Tensor, " d_out"]]:
    """(W, b) of a projection that is given what a norm in eval mode makes of its input, float64."""
    mean: Any = norm.running_mean
    var: Any = norm.running_var
    weight = after.weight.detach().double().T
    scale = norm.weight.detach().double() / (var.double() + norm.eps).sqrt()
    shift = norm.bias.detach().double() - mean.double() * scale
    return scale[:, None] * weight, shift @ weight + after.bias.detach().double()


def _by_column(norm: nn.BatchNorm1d, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
    return norm(x.reshape(-1, x.shape[-1])).view(x.shape)
