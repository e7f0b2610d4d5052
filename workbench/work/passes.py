"""What a model's passes cost: forward to a layer, with and without its head, generation with a cache, training of an adapter.

FLOPs are two a multiply-add of matrix products, those of attention over the keys that a token may see (causal; within the
window where there is one). Kernels that mask a full square do up to twice that of attention. Norms, rotations and activation
functions are bound by memory and not counted. Bytes are a lower bound: weights once for each batch, states in and out of each
block once, the cache once for each new token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..sites import Site
from .lengths import Lengths
from .shape import ITEMSIZE, BlockShape, ModelShape
from .work import Work

BATCH_TOKENS = 8192


def forward(
    shape: ModelShape,
    texts: Lengths,
    *,
    stop_after: int | None = None,
    head: str = "none",
    batch_tokens: int = BATCH_TOKENS,
    dtype: str | None = None,
) -> Work:
    """A forward pass over texts.

    stop_after: the last block that is run, all unless given. head: logits of no token ("none"), of the last one of each text
    ("last"), or of all ("all"). dtype: what the model runs in, its own unless given.

    >>> small = ModelShape("m", 4, 10, (BlockShape(50, 48, 8, 8),), 130, 8, "float32", 128)
    >>> forward(small, Lengths.of([3])).flops, 2 * 3 * (48 + 8 * 2)  # a token sees 2 keys at the mean
    (384.0, 384)
    """
    dtype = dtype or shape.dtype
    used = shape.blocks if stop_after is None else shape.blocks[: stop_after + 1]
    flops = sum(_over(block, texts) for block in used)
    flops += 2.0 * shape.head * {"none": 0.0, "last": texts.sequences, "all": texts.tokens}[head]
    numbers = sum(block.held for block in used) + (shape.head if head != "none" else 0)
    batches = math.ceil(texts.tokens / batch_tokens)
    moved = numbers * batches + 2.0 * texts.tokens * shape.width * len(used)
    return Work({dtype: flops}, moved=ITEMSIZE[dtype] * moved)


def generation(
    shape: ModelShape, prompts: Lengths, new_tokens: int, *, batch_size: int = 64, dtype: str | None = None
) -> Work:
    """Answers of `new_tokens` each, with a cache: the prompts once, the first token from them, then a pass for each further."""
    dtype = dtype or shape.dtype
    filled = forward(shape, prompts, head="last", batch_tokens=max(1, round(batch_size * prompts.mean)), dtype=dtype)
    steps, batches = max(new_tokens - 1, 0), math.ceil(prompts.sequences / batch_size)
    flops = 2.0 * shape.head * prompts.sequences * steps
    keys = 0.0
    for block in shape.blocks:
        for length, n in prompts.counts.items():
            seen = block.keys(length + steps, length) if steps else 0.0
            flops += n * steps * block.flops(seen)
            keys += n * steps * seen * block.cached
    weights = sum(block.held for block in shape.blocks) + shape.head
    return filled + Work({dtype: flops}, moved=ITEMSIZE[dtype] * (weights * steps * batches + keys))


def cache_bytes(shape: ModelShape, tokens: float, dtype: str | None = None) -> float:
    """Bytes of the cache of so many tokens, of all sequences together."""
    return tokens * sum(block.cached for block in shape.blocks) * ITEMSIZE[dtype or shape.dtype]


def training(
    shape: ModelShape,
    texts: Lengths,
    sites: Sequence[Site],
    *,
    batch_tokens: int = BATCH_TOKENS,
    dtype: str | None = None,
) -> Work:
    """Training an adapter at `sites` on texts, the model frozen: forward, and back to the first site that is edited.

    Weights have no gradients, so that backward costs of a matrix what forward does, and of attention's two products twice as
    much; no block below the first site is gone back through. What an adapter of small rank adds is not counted.
    """
    dtype = dtype or shape.dtype
    ahead = forward(shape, texts, head="all", batch_tokens=batch_tokens, dtype=dtype)
    first = min(s.layer + (s.point != "resid_pre") for s in sites)  # the first block that gradients pass through
    above = shape.blocks[first:]
    back = sum(_over(block, texts) + _over(block, texts, weights=False) for block in above)
    flops = back + 2.0 * shape.head * texts.tokens
    numbers = (sum(block.held for block in above) + shape.head) * math.ceil(texts.tokens / batch_tokens)
    return ahead + Work(
        {dtype: flops}, moved=ITEMSIZE[dtype] * (numbers + 2.0 * texts.tokens * shape.width * len(above))
    )


def store_bytes(
    shape: ModelShape, sites: Sequence[Site | str | int] | None, rows: float, dtype: str = "float32"
) -> float:
    """Bytes of the activations of so many rows at `sites`, every resid_post unless given; headers and tables not among them."""
    return rows * ITEMSIZE[dtype] * sum(shape.width_of(site) for site in shape.layers(sites))


def _over(block: BlockShape, texts: Lengths, weights: bool = True) -> float:
    """FLOPs of one block over texts; of its attention alone without `weights`."""
    own = block.flops(0.0) if not weights else 0.0
    return sum(n * length * (block.flops(block.keys(length)) - own) for length, n in texts.counts.items())
