"""A small seeded set of synthetic images in ten classes, for vision transformers trained on a CPU in a minute.

Each image is a bright shape (disc, square, ring, cross or stripes) of a random size, place, turn and tint over noise and a
gradient; its class is the shape, and whether its texture is fine or coarse.
"""

from __future__ import annotations

import torch

SIZE, CLASSES = 24, 10


def images(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(pixels [n, 3, 24, 24] about -2 to 2, classes [n])."""
    draw = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, generator=draw)

    labels = torch.randint(0, CLASSES, (n,), generator=draw)
    shape, fine = labels % 5, (labels >= 5)[:, None, None]
    axis = torch.arange(SIZE).float()
    y, x = axis[None, :, None] - uniform(9, 14), axis[None, None, :] - uniform(9, 14)
    turn, radius = uniform(0, 0.5), uniform(6, 9)
    u, v = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()
    distance, side = (u**2 + v**2).sqrt(), torch.maximum(u.abs(), v.abs())
    masks = torch.stack([
        distance < radius, side < 0.85 * radius, (distance < radius) & (distance > 0.55 * radius),
        (side < radius) & (torch.minimum(u.abs(), v.abs()) < 0.3 * radius), (side < radius) & ((u / 2.2).sin() > 0),
    ])  # fmt: skip
    mask = masks[shape, torch.arange(n)].float()
    period = torch.where(fine, 2.2, 5.0)
    texture = 0.6 + 0.4 * ((x + y) * 2 * torch.pi / period).sin()
    colour, ground = (torch.randn(n, 3, 1, 1, generator=draw) for _ in range(2))
    gradient = ground * (axis / SIZE - 0.5)[None, None, None, :]
    noise = 0.35 * torch.randn(n, 3, SIZE, SIZE, generator=draw)
    return (0.4 * gradient + (1.2 + 0.3 * colour) * (mask * texture)[:, None] + noise), labels
