"""Rows for the tests of maps: noise, a pair with an uneven spectrum, moments of folds."""

from __future__ import annotations

import torch

from workbench.maps.moments import Moments

F64 = torch.float64


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def activations(n: int, d: int, d_out: int | None = None, error: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows with a decaying spectrum, an offset and a few massive rows, and their noisy image."""
    x = noise(n, d) @ (torch.logspace(0, -1.5, d, dtype=F64)[:, None] * torch.linalg.qr(noise(d, d, seed=1)).Q) + 3
    x[::250] *= 8
    return x, x @ noise(d, d_out or d, seed=2) / d**0.5 + error * noise(n, d_out or d, seed=3) - 1


def moments(x: torch.Tensor, y: torch.Tensor) -> Moments:
    return Moments().update({"x": x, "y": y})


def folds(x: torch.Tensor, y: torch.Tensor, count: int = 5) -> list[Moments]:
    """Contiguous blocks, as KFold(shuffle=False) cuts them."""
    return [moments(a, b) for a, b in zip(x.tensor_split(count), y.tensor_split(count), strict=True)]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())
