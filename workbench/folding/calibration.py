"""What the channels of feed-forward networks do on some rows, summed up batch by batch: no activation is kept.

Of each channel, with u what its activation is given and z what the output projection is given: z ~ a u + c, and the score
E[(z - a u - c)^2] ||w_out||^2, what that costs the network's output. A gated channel silu(g) * v is a product of two maps of
x and has no such line: its score is that of the best linear map of x itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..anatomy.hooks import Hooks, hidden_of, state_in
from ..errors import UserError
from ..maps.linear_map import LinearMap
from ..maps.moments import Moments, total
from ..maps.ridge import RidgeFit, fit_ridge_targets
from ..rendering import pad
from .ffn import FFN, weight_of

if TYPE_CHECKING:
    from ..models import Model

ROWS = 2048
"""rows whose squares are formed in float64 at a time"""
ROUNDING = 1e-12
"""a residual below this share of a channel's variance is rounding"""
FOLDS = 4
Batch = tuple[Callable[[], Any], Bool[Tensor, "_b _t"] | None]
"""what runs one forward pass, and which of its rows count (None: all)"""


@dataclass(frozen=True, eq=False)
class Passing:
    """What went through one network in one pass: rows of its input x, of u (None where gated), of z, and of its output."""

    x: Float[Tensor, "n d"]
    u: Float[Tensor, "n h"] | None
    z: Float[Tensor, "n h"]
    y: Float[Tensor, "n d"]


@dataclass(frozen=True, eq=False)
class Channels:
    """The channels of one network on n rows, float64 on the CPU, each [h]."""

    n: int
    mean: Float[Tensor, " h"]
    """of z"""
    variance: Float[Tensor, " h"]
    error: Float[Tensor, " h"]
    """E[(z - a u - c)^2]; where gated that of the best linear map of x"""
    weight: Float[Tensor, " h"]
    """||w_out||^2"""
    slope: Float[Tensor, " h"] | None = field(repr=False)
    """a; None where gated"""
    offset: Float[Tensor, " h"] | None = field(repr=False)
    """c; None where gated"""

    @property
    def score(self) -> Float[Tensor, " h"]:
        """What replacing a channel by its line costs the output, in units of its square: error * ||w_out||^2."""
        return self.error * self.weight

    @property
    def r2(self) -> Float[Tensor, " h"]:
        """1 - error / variance; 1 of a channel that never varies."""
        return torch.where(self.variance > 0, 1 - self.error / self.variance, 1.0)


class ChannelSums:
    """Sums over rows from which `Channels` are made; float64, about the first batch's means."""

    def __init__(self, gated: bool) -> None:
        self.gated, self.n = gated, 0
        self.sums: dict[str, Tensor] = {}
        self.shift: dict[str, Tensor] = {}

    def update(self, found: Passing) -> ChannelSums:
        """Adds the rows of one pass."""
        of = found.x if self.gated else found.u
        assert of is not None
        if not self.shift:
            self.shift = {"u": of.double().mean(0), "z": found.z.double().mean(0)}
        for u, z in zip(of.split(ROWS), found.z.split(ROWS), strict=True):
            a, b = u.double() - self.shift["u"], z.double() - self.shift["z"]
            self.n += len(a)
            self._add("u", a.sum(0))
            self._add("z", b.sum(0))
            self._add("zz", b.square().sum(0))
            self._add("uu", a.T @ a if self.gated else a.square().sum(0))
            self._add("uz", a.T @ b if self.gated else (a * b).sum(0))
        return self

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def channels(self, weight: Float[Tensor, " h"], alpha: float = 1e-6) -> Channels:
        """The lines of all channels. alpha: relative ridge of the maps of x, where gated."""
        if self.n < 2:
            raise UserError(f"{self.n} rows do not make a line; give more prompts")
        s, n = self.sums, self.n
        var = (s["zz"] - s["z"].square() / n) / n
        mean = self.shift["z"] + s["z"] / n
        if self.gated:
            sxx = s["uu"] - torch.outer(s["u"], s["u"]) / n
            sxz = s["uz"] - torch.outer(s["u"], s["z"]) / n
            penalty = alpha * sxx.diagonal().mean()
            w = torch.linalg.solve(sxx + penalty * torch.eye(len(sxx)).to(sxx), sxz)
            error = var + ((w * (sxx @ w)).sum(0) - 2 * (w * sxz).sum(0)) / n
            error = error * n / max(n - len(sxx) - 1, 1)  # of new rows: a map of d inputs fits that much by itself
            slope = offset = None
        else:
            var_u = (s["uu"] - s["u"].square() / n) / n
            cov = (s["uz"] - s["u"] * s["z"] / n) / n
            slope = torch.where(var_u > 0, cov / var_u, 0.0)
            offset = mean - slope * (self.shift["u"] + s["u"] / n)
            error = var - slope * cov
        error = torch.where(error > ROUNDING * var, error, 0.0)
        cpu = [t if t is None else t.cpu() for t in (mean, var.clamp_min(0), error, weight, slope, offset)]
        return Channels(n, *cpu)  # type: ignore[arg-type]


@contextmanager
def passing(
    model: nn.Module, ffns: Sequence[FFN], take: Callable[[int, Passing], Any], kept: list[Any]
) -> Iterator[None]:
    """Calls `take(layer, rows)` when a network has run, in every pass inside the block.

    kept: one entry, the mask [b, t] of the rows that count in the pass that runs, or None.
    """
    held: dict[tuple[int, str], Tensor] = {}

    def rows(x: Tensor) -> Tensor:
        mask = kept[0]
        return x.reshape(-1, x.shape[-1]) if mask is None else x.reshape(-1, x.shape[-1])[mask.to(x.device).flatten()]

    def projected(layer: int, _: nn.Module, __: Any, output: Tensor) -> None:
        held[layer, "u"] = rows(output.detach())

    def given(layer: int, _: nn.Module, args: Any) -> None:
        held[layer, "z"] = rows(args[0].detach())

    def ended(layer: int, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        x, u, z = rows(state_in(args, kwargs).detach()), held.pop((layer, "u"), None), held.pop((layer, "z"))
        take(layer, Passing(x, u, z, rows(hidden_of(output).detach())))

    with torch.inference_mode(), Hooks(model) as hooks:
        for layer, ffn in enumerate(ffns):
            module = ffn.module(model)
            if not ffn.gated:
                up = module.get_submodule(ffn.inputs[0])
                hooks.add(up.register_forward_hook(partial(projected, layer)))
            hooks.add(module.get_submodule(ffn.output).register_forward_pre_hook(partial(given, layer)))
            hooks.add(module.register_forward_hook(partial(ended, layer), with_kwargs=True))
        yield


def calibrate(model: nn.Module, ffns: Sequence[FFN], batches: Iterable[Batch]) -> tuple[Channels, ...]:
    """The channels of every network over the rows of some batches, in one pass."""
    sums = [ChannelSums(ffn.gated) for ffn in ffns]
    kept: list[Any] = [None]
    with passing(model, ffns, lambda layer, found: sums[layer].update(found), kept):
        for run, mask in batches:
            kept[0] = mask
            run()
    weights = [weight_of(f.module(model).get_submodule(f.output)).detach().double().square().sum(1) for f in ffns]
    return tuple(one.channels(weight) for one, weight in zip(sums, weights, strict=True))


def refit_maps(
    model: nn.Module,
    ffns: Sequence[FFN],
    idle: Mapping[str, Sequence[Int[Tensor, " _k"]]],
    batches: Iterable[Batch],
    *,
    alpha: Any = "cv",
) -> dict[str, list[RidgeFit | None]]:
    """Ridge maps from each network's input to what its idle channels add to its output, from one pass over the batches.

    Args:
        idle: the idle channels of every network, for each of several choices by name.
        alpha: of the ridge: "cv" (whole batches are the folds), "gcv", or a number in mean diagonals of X'X.

    Returns the fit of each choice and network; None where it has no idle channel.
    """
    parts = [
        [Moments(pairs=[("x", f"t:{name}") for name in idle], products=torch.float32) for _ in ffns]
        for _ in range(FOLDS)
    ]
    kept: list[Any] = [None]
    which = [0]
    downs = [weight_of(ffn.module(model).get_submodule(ffn.output)).detach() for ffn in ffns]
    index = {name: [i.to(down.device) for i, down in zip(sets, downs, strict=True)] for name, sets in idle.items()}

    def take(layer: int, found: Passing) -> None:
        blocks = {"x": found.x.float()}
        for name, sets in index.items():
            blocks[f"t:{name}"] = found.z[:, sets[layer]].float() @ downs[layer][sets[layer]].float()
        parts[which[0]][layer].update(blocks)

    count = 0
    with passing(model, ffns, take, kept):
        for count, (run, mask) in enumerate(batches, 1):
            kept[0], which[0] = mask, (count - 1) % FOLDS
            run()
    if not count:
        raise UserError("no rows to fit a map on; give more prompts")
    chosen: Any = "gcv" if alpha == "cv" and count < 2 else alpha
    found: dict[str, list[RidgeFit | None]] = {name: [] for name in idle}
    for layer in range(len(ffns)):
        folds = [part[layer].to("cpu") for part in parts if part[layer].n]
        whole = total(folds)
        live = [name for name, sets in idle.items() if len(sets[layer])]
        moving = [name for name in live if float(whole.squares(f"t:{name}").sum()) > 0]
        fits = (
            fit_ridge_targets(folds, "x", [f"t:{n}" for n in moving], alpha=chosen, metric="weighted") if moving else {}
        )
        for name in idle:
            fit = fits.get(f"t:{name}")
            if fit is None and name in live:  # channels that never vary: their sum is a constant
                constant = LinearMap(torch.zeros(ffns[layer].width, ffns[layer].width), whole.mean(f"t:{name}").float())
                fit = RidgeFit(constant, 0.0, 0.0, ())
            found[name].append(fit)
    return found


def text_batches(model: Model, sequences: Sequence[Sequence[int]], *, tokens: int = 4096) -> list[Batch]:
    """Passes of a language model over encoded texts, of like length together; every token of a text counts, BOS too."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    groups: list[list[int]] = [[]]
    for i in order:
        if groups[-1] and len(sequences[i]) * (len(groups[-1]) + 1) > tokens:
            groups.append([])
        groups[-1].append(i)
    found: list[Batch] = []
    for group in groups:
        ids, mask = pad([list(sequences[i]) for i in group], model.pad_id, "right")
        found.append((partial(model.run, ids, mask), mask.bool()))
    return found


def image_batches(model: nn.Module, pixels: Float[Tensor, "n c h w"], *, size: int = 64) -> list[Batch]:
    """Passes of an image model over images, `size` at a time; every patch counts."""
    device = next(model.parameters()).device
    return [(partial(model, pixel_values=part.to(device)), None) for part in pixels.split(size)]
