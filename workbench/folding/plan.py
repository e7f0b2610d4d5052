"""Which channels of a model's feed-forward networks are idle, and the linear map that takes the place of each network's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ..errors import UserError
from ..maps.linear_map import LinearMap
from ..maps.ridge import RidgeFit
from .batch_norm import idle_count
from .calibration import Channels
from .ffn import FFN, weight_of
from .modules import FoldedFFN, folded_module

Method = str
"""one of METHODS"""
METHODS: tuple[Method, ...] = ("identity", "mean", "affine", "refit")
GATED: tuple[Method, ...] = ("mean", "refit")
"""those that a gated network has; `mean` is a control"""
CATASTROPHE = ("identity leaves out the activation of channels that were trained with it, which ruins a trained model; it is "
               "for networks that were trained with idle channels (RePaViT), and is shown here to say so")  # fmt: skip
Theta = float | int | Sequence[float]


@dataclass(frozen=True, eq=False)
class FoldPlan:
    """What becomes of every network of a model: its idle channels, and the map y = x @ W + b in their place."""

    ffns: tuple[FFN, ...]
    idle: tuple[Int[Tensor, " _k"], ...] = field(repr=False)
    maps: tuple[LinearMap | None, ...] = field(repr=False)
    """None where a network has no idle channel"""
    method: Method = "refit"
    theta: tuple[float, ...] = ()

    @property
    def ratio(self) -> float:
        """The weights of the folded networks over those before, biases aside: 1 - theta + 1 / (2 rho) where not gated."""
        before = after = 0
        for ffn, idle in zip(self.ffns, self.idle, strict=True):
            each = ffn.width * (3 if ffn.gated else 2)
            before += each * ffn.hidden
            after += each * (ffn.hidden - len(idle)) + (ffn.width**2 if len(idle) else 0)
        return after / before

    def modules(self, model: nn.Module) -> dict[str, FoldedFFN]:
        """The folded form of each network that has idle channels, by its path; `model` is left as it is."""
        return {
            ffn.path: folded_module(ffn.module(model), ffn, idle, linear)
            for ffn, idle, linear in zip(self.ffns, self.idle, self.maps, strict=True)
            if linear is not None
        }


def shares(theta: Theta, n_layers: int) -> tuple[float, ...]:
    """theta of every layer, of one number or one for each; UserError outside of [0, 1) or for another count."""
    given = [theta] * n_layers if isinstance(theta, int | float) else list(theta)
    if len(given) != n_layers:
        raise UserError(f"theta has {len(given)} values for {n_layers} layers; give one, or one for each layer")
    for value in given:
        idle_count(value, 1)
    return tuple(float(value) for value in given)


def linear_schedule(theta: float, n_layers: int) -> tuple[float, ...]:
    """The paper's schedule: theta rises from 2 theta - 1 (at least 0), its mean about theta, and the last layer is dense.

    >>> linear_schedule(0.5, 4)
    (0.0, 0.5, 0.99, 0.0)
    """
    idle_count(theta, 1)
    first, last = max(0.0, 2 * theta - 1), min(1.0, 2 * theta)
    steps = max(1, n_layers - 2)
    return (*(round(min(0.99, first + (last - first) * i / steps), 6) for i in range(n_layers - 1)), 0.0)


def least(channels: Sequence[Channels], theta: Theta) -> list[Int[Tensor, " _k"]]:
    """The idle channels of each network: the share theta with the lowest scores, in ascending order."""
    counts = [idle_count(share, len(c.score)) for share, c in zip(shares(theta, len(channels)), channels, strict=True)]
    return [c.score.argsort(stable=True)[:k].sort().values for c, k in zip(channels, counts, strict=True)]


def drawn(channels: Sequence[Channels], theta: Theta, seed: int = 0) -> list[Int[Tensor, " _k"]]:
    """As many channels, drawn at random: the control of `least`."""
    generator = torch.Generator().manual_seed(seed)
    counts = [idle_count(share, len(c.score)) for share, c in zip(shares(theta, len(channels)), channels, strict=True)]
    return [torch.randperm(len(c.score), generator=generator)[:k].sort().values
            for c, k in zip(channels, counts, strict=True)]  # fmt: skip


def plan_fold(
    model: nn.Module,
    ffns: Sequence[FFN],
    channels: Sequence[Channels],
    idle: Sequence[Int[Tensor, " _k"]],
    method: Method,
    fits: Sequence[RidgeFit | None] | None = None,
) -> FoldPlan:
    """The maps of one method for these idle channels.

    identity: u itself in place of act(u); mean: the mean of act(u); affine: a u + c; refit: `fits`, from `refit_maps`.

    Raises UserError for an unknown method, a refit without fits, and for a gated network by any but refit and mean.
    """
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}; allowed: {', '.join(METHODS)}")
    gated = next((ffn for ffn in ffns if ffn.gated), None)
    if gated is not None and method not in GATED:
        raise UserError(f"{gated.path} is gated: its channel act(g) * v is a product of two maps of x, so that it has no "
                        f"a u + c for {method!r} to take; use refit, which fits the channels' sum to x itself")  # fmt: skip
    if method == "refit":
        if fits is None:
            raise UserError("a refit needs its fits; make them with refit_maps for the same idle channels")
        maps = tuple(None if fit is None else fit.map for fit in fits)
    else:
        maps = tuple(
            _map(model, f, c, i, method) if len(i) else None for f, c, i in zip(ffns, channels, idle, strict=True)
        )
    theta = tuple(len(i) / ffn.hidden for ffn, i in zip(ffns, idle, strict=True))
    return FoldPlan(tuple(ffns), tuple(idle), maps, method, theta)


def _map(model: nn.Module, ffn: FFN, channels: Channels, idle: Tensor, method: Method) -> LinearMap:
    """W = W_in[:, idle] diag(a) W_out[idle] and b = (a b_in + c)[idle] W_out[idle], in float64."""
    module = ffn.module(model)
    out = weight_of(module.get_submodule(ffn.output)).detach().double().cpu()[idle]
    if method == "mean":
        return LinearMap(torch.zeros(ffn.width, ffn.width), (channels.mean[idle] @ out).float(), {"method": method})
    up = module.get_submodule(ffn.inputs[0])
    w_in = weight_of(up).detach().double().cpu()[:, idle]
    b_in = torch.zeros(len(idle)).double() if up.bias is None else up.bias.detach().double().cpu()[idle]
    slope, offset = torch.ones_like(b_in), torch.zeros_like(b_in)
    if method == "affine":
        assert channels.slope is not None
        assert channels.offset is not None
        slope, offset = channels.slope[idle], channels.offset[idle]
    weight, bias = (w_in * slope) @ out, (slope * b_in + offset) @ out
    return LinearMap(weight.float(), bias.float(), {"method": method})


@contextmanager
def swapped(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside the block the modules at these paths are others; what was there comes back, an exception included."""
    before = {path: model.get_submodule(path) for path in modules}
    try:
        for path, module in modules.items():
            put(model, path, module)
        yield
    finally:
        for path, module in before.items():
            put(model, path, module)


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts a module at a path of another."""
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
