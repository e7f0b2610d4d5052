"""Room: what memory and disk are free, and what a model's pass takes of them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from .passes import cache_bytes
from .shape import ITEMSIZE, ModelShape


def memory_free(device: torch.device) -> int:
    """Bytes that are free on a device, or on the host."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    try:
        told = Path("/proc/meminfo").read_text(encoding="ascii")
        return int(told.split("MemAvailable:")[1].split()[0]) << 10
    except (OSError, IndexError, ValueError):  # a system that does not say what is free, only what there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def disk_free(folder: str | Path) -> int:
    """Bytes free on the disk where a folder is, or would be made."""
    path = Path(folder).expanduser().absolute()
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.is_dir())).free


def pass_bytes(shape: ModelShape, batch_tokens: float, *, dtype: str | None = None, logits: float = 0.0) -> float:
    """Bytes that a forward pass takes at its peak, about: the weights, and of one block's batch its states, its queries, keys
    and values and what is inside its MLP; `logits` rows of logits in float32 beside their own dtype.

    >>> pass_bytes(ModelShape("m", 4, 10, (), 130, 8, "float32", 128), 0)
    520.0
    """
    size = ITEMSIZE[dtype or shape.dtype]
    inner = shape.mlp_act or 4 * shape.width
    widest = max((block.scores + block.cached for block in shape.blocks), default=0)
    states = batch_tokens * (4.0 * shape.width + 3.0 * inner + widest)
    return float(shape.bytes(dtype)) + size * states + logits * shape.vocabulary * (size + 4.0)


def generation_bytes(shape: ModelShape, cached: float, prompt_tokens: float, *, dtype: str | None = None) -> float:
    """Bytes that generation takes at its peak, about: reading the prompts, and a cache of so many tokens."""
    return pass_bytes(shape, prompt_tokens, dtype=dtype) + cache_bytes(shape, cached, dtype)


def training_bytes(shape: ModelShape, batch_tokens: float, first: int, *, dtype: str | None = None) -> float:
    """Bytes that training an adapter takes at its peak, about: a forward pass with all logits and their gradients, and of
    every block from `first` on what its backward pass needs."""
    size = ITEMSIZE[dtype or shape.dtype]
    inner = shape.mlp_act or 4 * shape.width
    kept = sum(6.0 * shape.width + 4.0 * inner + block.scores + block.cached for block in shape.blocks[first:])
    return pass_bytes(shape, batch_tokens, dtype=dtype, logits=2 * batch_tokens) + size * batch_tokens * kept
