"""What a profile would cost, before it is made: rows, bytes, padding, and an estimate of its time."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..work.room import disk_free, memory_free
from ..work.work import duration
from .plan import Block, Plan, make_plan
from .room import sums_bytes
from .run import BlockRunner
from .sums import Pairs, checked_pairs
from .told import passes_of, sums_flops

if TYPE_CHECKING:
    from ..models import Model


@dataclass(frozen=True)
class Cost:
    """The cost of a profile. `seconds` is an estimate, from timing a few of its batches; the rest is exact."""

    prompts: int
    rows: int
    tokens: int
    bytes: int
    blocks: int
    sites: list[str]
    dtype: str
    padding: float
    """the share of what the model reads that is padding"""
    free: int
    """bytes free on the disk that would hold the store"""
    seconds: float
    moments: bool = False
    """whether this is what moments cost: `bytes` are those of the sums"""
    memory: int = 0
    """bytes free where the sums of moments are held"""
    flops: float = 0.0
    """of the forward passes, counted"""
    sums_flops: float = 0.0
    """of the moments, counted"""

    def __str__(self) -> str:
        room = "" if self.bytes <= self.free else " - TOO LITTLE"
        held, summed = [], f", and {self.sums_flops:.3g} of the sums" if self.moments else ""
        if self.moments:
            short = "" if self.bytes <= self.memory else " - TOO LITTLE"
            held = [
                f"{self.bytes / 2**20:.1f} MiB of sums to hold, {self.memory / 2**20:.0f} MiB of memory free{short}"
            ]
        return "\n".join([
            f"{self.rows} rows of {self.prompts} prompts at {len(self.sites)} sites ({', '.join(self.sites[:6])}"
            f"{', ...' if len(self.sites) > 6 else ''}) in {self.dtype}, {self.blocks} block{'s' if self.blocks > 1 else ''}",
            f"{self.tokens} tokens through the model, {self.padding:.1%} of what it reads is padding",
            *held,
            f"{self.bytes / 2**20:.1f} MiB to write, {self.free / 2**20:.0f} MiB free{room}",
            f"about {duration(self.seconds)} for the forward passes (an estimate, from a few batches), {self.flops:.3g} "
            f"FLOPs{summed}",
        ])  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def profile_cost(
    model: Model,
    prompts: Any,
    out: str | Path | None = None,
    *,
    moments: bool = False,
    folds: int = 1,
    pairs: Pairs | None = None,
    **options: Any,
) -> Cost:
    """What `profile_model(model, prompts, out, **options)` would cost; nothing is written.

    options: sites, tokens, batch_tokens, dtype, max_length, stride. Raises what `profile_model` raises for them.
    moments: what `profile_moments` would cost, with its `folds` and `pairs`. Its sums are held where the model is.
    """
    plan = make_plan(model, prompts, for_store=not moments, **options)
    size, memory, sums = plan.n_bytes, 0, 0.0
    if moments:
        named = checked_pairs(model, plan, folds, pairs)
        size, sums = sums_bytes(plan, named, folds), sums_flops(plan, plan.blocks, named, model.device.type)
        memory = memory_free(model.device)
    batches = [(block, batch) for block in plan.blocks for batch in plan.batches(block)]
    sizes = [len(batch) * int(plan.spool.lengths[batch].max()) for _, batch in batches]
    return Cost(
        prompts=len(plan.prompts), rows=plan.n_rows, tokens=plan.n_tokens, bytes=size, blocks=len(plan.blocks),
        sites=[str(site) for site in plan.sites], dtype=plan.dtype, padding=1 - plan.n_tokens / sum(sizes),
        free=disk_free(out if out is not None else Path.cwd()), seconds=_estimate(model, plan, batches, sizes),
        moments=moments, memory=memory, flops=passes_of(model, plan).flops, sums_flops=sums,
    )  # fmt: skip


def _estimate(model: Model, plan: Plan, batches: list[tuple[Block, list[int]]], sizes: list[int]) -> float:
    """Seconds for all batches, by the time per token of a large, a middling and a small one (each run once before)."""
    order = sorted(range(len(batches)), key=lambda i: sizes[i])
    chosen = sorted({order[-1], order[len(order) // 2], order[0]}, key=lambda i: -sizes[i])
    runner = BlockRunner(model, plan)
    spent, read = 0.0, 0
    for i in chosen:
        for warm in (False, True):
            start = time.perf_counter()
            runner.run_batch(*batches[i])
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            if warm:
                spent, read = spent + time.perf_counter() - start, read + sizes[i]
    return spent / read * sum(sizes)
