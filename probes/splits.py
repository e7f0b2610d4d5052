"""Which rows of a store a probe looks at, and which of their prompts are held out from it."""

from __future__ import annotations

import re

import numpy as np
from jaxtyping import Bool, Int64

from workbench.errors import UserError

from .labels import Labels

POLICIES = "all, last, first, first:n, last:n, every:n, or a number (3 the fourth, -1 the last)"


def rows_at(policy: str, prompt_index: Int64[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Which rows of a store a policy names, by their place among the rows that the store keeps of their prompt.

    prompt_index: the prompt of each row; it never falls. Raises UserError for an unknown policy.

    >>> rows_at("last", np.array([0, 0, 0, 1, 1])).tolist()
    [False, False, True, False, True]
    """
    start = np.r_[True, prompt_index[1:] != prompt_index[:-1]] if len(prompt_index) else np.zeros(0, dtype=bool)
    first = np.flatnonzero(start)
    length = np.diff(np.r_[first, len(prompt_index)])
    place = np.arange(len(prompt_index)) - np.repeat(first, length)
    left = np.repeat(length, length) - place
    if policy == "all":
        return np.ones(len(prompt_index), dtype=bool)
    if policy in ("first", "last"):
        return place == 0 if policy == "first" else left == 1
    if match := re.fullmatch(r"-?\d{1,6}", policy):
        number = int(match[0])
        return place == number if number >= 0 else left == -number
    if match := re.fullmatch(r"(first|last|every):([1-9]\d{0,5})", policy):
        count = int(match[2])
        return place < count if match[1] == "first" else left <= count if match[1] == "last" else place % count == 0
    raise UserError(f"unknown positions {policy[:40]!r}; allowed: {POLICIES}")


def held_out(labels: Labels, share: float = 0.25, seed: int = 0) -> Bool[np.ndarray, " n"]:
    """Which rows are held out: whole groups, drawn by a hash of the group and the seed.

    Groups are dealt class by class, each to the rarest of its classes, so that every class is on both sides; of the same
    prompts with the same labels the same are held out, whatever the store, the layer or the order of the rows.
    Raises UserError for a share outside of 0 to 1, and where a side would lack all but one class.
    """
    if not 0 < share < 1:
        raise UserError(f"holdout is the share of the prompts that no probe sees, between 0 and 1; got {share:g}")
    groups, which = np.unique(labels.groups, return_inverse=True)
    if len(groups) < 2:
        raise UserError(
            "all rows are of one prompt (or group), so nothing can be held out; give more prompts, or other groups"
        )
    keys = _mixed(groups, seed)
    stratum = _rarest(labels, which, len(groups))
    out = np.zeros(len(groups), dtype=bool)
    for one in np.unique(stratum):
        mine = np.flatnonzero(stratum == one)
        count = min(max(round(share * len(mine)), 1), len(mine) - 1)
        out[mine[np.argsort(keys[mine], kind="stable")[:count]]] = True
    if not out.any():
        out[np.argmin(keys)] = True  # every group has a class of its own; what lacks then is told below
    chosen = out[which]
    if labels.classes:
        for side, part in (("learned from", ~chosen), ("tested on", chosen)):
            if len(np.unique(labels.values[part])) < 2:
                raise UserError(f"label {labels.name!r}: the prompts {side} would have one class only; each prompt (or group) "
                                "has one class of its own: give more prompts, or other groups")  # fmt: skip
    return chosen


def _rarest(labels: Labels, which: np.ndarray, n_groups: int) -> np.ndarray:
    """The stratum of each group: of its classes the one that the fewest groups have; of quantities, none."""
    if not labels.classes:
        return np.zeros(n_groups, dtype=np.int64)
    pairs = np.unique(np.stack([which, labels.values], 1), axis=0)
    common = np.bincount(pairs[:, 1], minlength=len(labels.classes))
    order = np.lexsort([pairs[:, 1], common[pairs[:, 1]], pairs[:, 0]])
    first = np.r_[True, np.diff(pairs[order, 0]) > 0]
    return pairs[order, 1][first]


def _mixed(groups: np.ndarray, seed: int) -> np.ndarray:
    """A number for each group that depends on it and the seed alone (the mixing of splitmix64)."""
    with np.errstate(over="ignore"):
        z = groups.view(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def sample(labels: Labels, most: int, seed: int = 0) -> Labels:
    """At most so many of the rows, drawn at random; the note says so."""
    if len(labels) <= most:
        return labels
    index = np.sort(np.random.default_rng(seed).choice(len(labels), most, replace=False))
    return labels.take(index, f"{most:,} of {len(labels):,} rows, drawn at random (seed {seed})")
