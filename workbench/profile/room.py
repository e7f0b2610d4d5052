"""How much memory sums take, and whether it is there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations

import torch

from ..errors import UserError
from ..work.room import memory_free
from .plan import Plan


def moments_bytes(widths: Mapping[str, int], pairs: Iterable[tuple[str, str]] | None = None, folds: int = 1) -> int:
    """The bytes of moments: of float64 sums and products of blocks with these widths, for each fold.

    pairs: as of `Moments`: None keeps the products of all blocks with each other, an empty list those within each.

    >>> moments_bytes({"a": 2, "b": 3}), moments_bytes({"a": 2, "b": 3}, [], folds=2)   # 8 * (2*2 + 2*3 + 3*3 + 2*(2+3))
    (232, 368)
    """
    if pairs is None:
        kept = set(combinations(sorted(widths), 2))
    else:
        kept = {(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]}
    products = sum(width**2 for width in widths.values()) + sum(widths[a] * widths[b] for a, b in kept)
    return 8 * folds * (products + 2 * sum(widths.values()))


def sums_bytes(plan: Plan, pairs: list[tuple[str, str]] | None, folds: int) -> int:
    return moments_bytes({str(site): width for site, width in plan.widths.items()}, pairs, folds)


def check_sums_room(
    device: torch.device, plan: Plan, pairs: list[tuple[str, str]] | None, folds: int, saved: bool
) -> None:
    """Refuses sums that do not fit where they are held; a fold that is saved stands in the host's memory once more."""
    one = sums_bytes(plan, pairs, 1)
    host = one if saved else 0
    rooms = {device: folds * one + (host if device.type == "cpu" else 0)}
    if device.type == "cuda":
        rooms[torch.device("cpu")] = 2 * host
    for where, needed in rooms.items():
        if needed > memory_free(where):
            raise UserError(f"the moments of {len(plan.sites)} sites in {folds} fold{'s' if folds > 1 else ''} need "
                            f"{needed / 2**30:.1f} GiB on {where}, which has {memory_free(where) / 2**30:.1f} GiB free; "
                            "give fewer sites, fewer folds, or the pairs to keep: pairs=[...] (--pairs none keeps "
                            "products within each site only)")  # fmt: skip
