"""The parameters of an adapter while it is trained: one module for each site, in units of the model's profile."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import UserError
from .low_rank import LowRank

KINDS = ("nodireft", "loreft", "direft", "vector")
ORTHONORMAL = ("loreft", "direft")
"""kinds that write in R', the rows of which are orthonormal"""


@dataclass(frozen=True, eq=False)
class Scale:
    """The mean of a profile at a site [d], and its spread: the root of the mean squared distance to the mean."""

    mean: Float[Tensor, " d"]
    spread: float

    @classmethod
    def of(cls, states: Float[Tensor, "n d"]) -> Scale:
        """Raises UserError for fewer than two rows, or rows that are all the same."""
        mean = states.float().mean(0)
        found = float((states.float() - mean).square().sum(1).mean().sqrt())
        if not found > 0:
            raise UserError("the profile at a site does not vary; profile at least two prompts that differ")
        return cls(mean, found)


class TrainablePart(nn.Module):
    """The parameters of one site, in units of the profile: states are centred and each coordinate is about 1.

    A learning rate then means the same on a residual stream of norm 1 and of norm 1,000. `low_rank` gives the
    parameters in the units of the model: delta(h) = (h @ V + b) @ U. Every kind begins with a delta of 0.
    """

    mean: Tensor

    def __init__(self, kind: str, scale: Scale, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        width = len(scale.mean)
        q = torch.linalg.qr(torch.randn(width, rank, generator=generator)).Q
        self.kind, self.scale = kind, scale
        self.read = nn.Parameter(torch.zeros(width, rank) if kind == "direft" else q.clone())
        self.bias = nn.Parameter(torch.zeros(rank))
        self.write = nn.Parameter(q.T.clone() if kind in ORTHONORMAL else torch.zeros(rank, width))
        self.register_buffer("mean", scale.mean)
        self.unit = scale.spread / width**0.5  # of one coordinate

    def low_rank(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.kind in ORTHONORMAL:  # (h W' + b - h R) R' with R of orthonormal columns; direft is without the - h R
            rotation = torch.linalg.qr(self.write.T).Q
            v = self.read - rotation if self.kind == "loreft" else self.read
            return v, self.bias * self.unit - self.mean @ v, rotation.T
        if self.kind == "vector":
            return torch.zeros_like(self.read), torch.ones_like(self.bias), self.write * self.unit
        v = self.read / self.unit
        return v, self.bias - self.mean @ v, self.write * self.unit

    def frozen(self) -> LowRank:
        v, b, u = (t.detach().cpu().clone().contiguous() for t in self.low_rank())
        return LowRank(v, b, u)

    def delta(self, h: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        v, b, u = (t.to(h.device) for t in self.low_rank())  # a spread model's block may lie elsewhere
        return ((h.float() @ v + b) @ u).to(h.dtype)
