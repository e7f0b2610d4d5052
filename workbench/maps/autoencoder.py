"""A small ReLU autoencoder from one side to the other: the reference that is not linear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError


@dataclass(frozen=True, eq=False)
class ReluMap:
    """y = relu((x - mean) @ read + bias) @ write + shift; it has no matrix, so no adapter folds through it."""

    mean: Float[Tensor, " d_in"]
    read: Float[Tensor, "d_in h"]
    bias: Float[Tensor, " h"]
    write: Float[Tensor, "h d_out"]
    shift: Float[Tensor, " d_out"]
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def d_in(self) -> int:
        return len(self.mean)

    @property
    def rank(self) -> int:
        """Hidden units: the most directions that it can carry."""
        return min(self.read.shape)

    @property
    def condition(self) -> float:
        """It has none: NaN."""
        return float("nan")

    def __call__(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The image of rows, in their dtype."""
        mean, read, bias, write, shift = (t.to(x) for t in (self.mean, self.read, self.bias, self.write, self.shift))
        return ((x - mean) @ read + bias).relu() @ write + shift


def fit_autoencoder(
    x: Float[Tensor, "n d_in"],
    y: Float[Tensor, "m d_out"],
    *,
    hidden: int = 128,
    steps: int = 500,
    batch_size: int = 256,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> ReluMap:
    """Trains y = W2 relu(W1 x + b1) + b2 by Adam on the mean squared error, both sides scaled to unit spread.

    Raises UserError for rows that do not pair, and for a side that never varies.

    Source: arXiv:2503.04429, eq. 1; there trained on tokens of a corpus.
    """
    if len(x) != len(y) or len(x) < 2:
        raise UserError(f"x and y must pair row by row, at least 2; got {len(x)} rows of x and {len(y)} rows of y")
    means, spreads = (x.float().mean(0), y.float().mean(0)), []
    for rows, mean in zip((x, y), means, strict=True):
        spreads.append(float((rows.float() - mean).square().mean().sqrt()))
    if not min(spreads) > 0:
        raise UserError("a side of the autoencoder is constant, so there is nothing to fit")
    a, b = ((rows.float() - mean) / spread for rows, mean, spread in zip((x, y), means, spreads, strict=True))
    generator = torch.Generator().manual_seed(seed)

    def start(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * (2 / rows) ** 0.5).to(a.device).requires_grad_()

    weights = [start(a.shape[1], hidden), torch.zeros(hidden, device=a.device).requires_grad_(),
               start(hidden, b.shape[1]), torch.zeros(b.shape[1], device=a.device).requires_grad_()]  # fmt: skip
    optimizer = torch.optim.Adam(weights, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(len(a), (min(batch_size, len(a)),), generator=generator).to(a.device)
            read, bias, write, shift = weights
            loss = ((a[rows] @ read + bias).relu() @ write + shift - b[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    read, bias, write, shift = (w.detach() for w in weights)
    meta = {"method": "autoencoder", "hidden": hidden, "steps": steps, "seed": seed, "n": len(x)}
    return ReluMap(means[0], read / spreads[0], bias, write * spreads[1], shift * spreads[1] + means[1], meta)
