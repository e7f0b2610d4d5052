"""Counted work of what was timed, by formula from the sizes that a result records: GFLOP, GB and their rates."""

from __future__ import annotations

from functools import cache
from typing import Any

import transformers as tf

from workbench.maps import counts
from workbench.work import Lengths, ModelShape, forward, generation

ALPHAS, FOLDS = 8, 5  # of maps_bench


@cache
def gpt2(width: int = 768, layers: int = 12) -> ModelShape:
    """GPT-2's shape; small unless given."""
    return ModelShape.of_config(tf.GPT2Config(n_embd=width, n_layer=layers, n_head=max(1, width // 64)))


@cache
def llama_8b() -> ModelShape:
    from ..pages.scale import MODELS

    return ModelShape.of_numbers("8B", MODELS["Llama-3.1-8B"])


def profile_flops(found: dict[str, Any], way: str) -> float:
    """FLOPs of one way of the section on speed: of all tokens that are run, padding among them, as texts of a mean length."""
    shape = gpt2() if found["device"] == "cpu" else llama_8b()
    padded = found["tokens"] / (1 - found["padding"])
    texts = Lengths.even(padded, (found.get("shortest", 32) + found.get("longest", 256)) / 2)
    if "layers" in way:
        return forward(shape, texts, stop_after=int(way.split()[0]) - 1).flops
    return forward(shape, texts, head="all").flops


def fit_flops(n: int, d: int, pairs: int = 1, layers: int = 2, *, folds: int = FOLDS) -> tuple[float, float]:
    """(of moments, of fits) of one pair, or of all pairs of some layers."""
    if pairs == 1:
        return counts.moments_flops(n, [d, d]), counts.ridge_flops(d, [d], alphas=ALPHAS, folds=folds)
    fits = sum(counts.ridge_flops(d, [d] * (layers - 1 - i), alphas=ALPHAS, folds=folds) for i in range(layers - 1))
    return counts.moments_flops(n, [d] * layers), fits


def fold_flops(found: dict[str, Any], rank: int = 8) -> dict[str, float]:
    """Of the section on pasting: through the Gram, by pseudo-inverses, and by both sides' factors, of one layer each."""
    n, (recipient, donor) = found["n"], found["widths"]
    factors = counts.factor_flops(n, recipient) + counts.factor_flops(n, donor)
    dense = counts.pinv_flops(n, recipient, donor) + counts.pinv_flops(n, donor, recipient)
    return {"gram": counts.gram_fold_flops(n, recipient, donor, rank),
            "dense": dense + counts.formed_fold_flops(recipient, donor, rank),
            "ridge": factors + counts.solver_fold_flops(n, recipient, donor, rank)}  # fmt: skip


def step_flops(found: dict[str, Any], rank: int = 8) -> dict[str, float]:
    """Of one token in generation: the plain model, what a paste adds, and what converting at each step adds."""
    shape, width = gpt2(), 768
    donor = width + width // 3
    tokens = found["batch"] * found["tokens"]
    plain = generation(shape, Lengths.of([found.get("prompt", 32)] * found["batch"]), found["tokens"]).flops / tokens
    return {"plain": plain, "paste": found["layers"] * 4.0 * width * rank,
            "each_step": found["layers"] * (4.0 * width * donor + 4.0 * donor * rank)}  # fmt: skip


def rate(flops: float, seconds: float) -> tuple[str, str]:
    """GFLOP, and GFLOP/s.

    >>> rate(3e9, 2.0)
    ('3', '1.5')
    """
    return f"{flops / 1e9:,.3g}" if flops < 1e12 else f"{flops / 1e9:,.0f}", f"{flops / seconds / 1e9:,.3g}"
