"""Whether there are rows enough for a fit, and how many would be."""

from __future__ import annotations

import math

from ..errors import UserError
from .moments import Moments
from .spectrum import constant_floor

PLENTY_FREE, PLENTY_PENALISED = 10, 2
"""rows per dimension of the source below which a fit without and with a penalty comes with a warning: noise adds d/n
to the in-sample R2 of the one; the other is past the double-descent peak of 0.7 to 1.5"""
FLOOR_PENALISED = 0.1
"""rows per dimension below which even a penalised map is refused"""


def check_counts(
    train: Moments, source: str, target: str, *, penalised: bool, method: str = "a map"
) -> tuple[str, ...]:
    """Notes on a training set, one line each, in their order: too few rows, columns that never vary.

    Raises:
        UserError: fewer rows than any fit of this kind can stand, or a side that never varies at all.

    >>> import torch
    >>> check_counts(Moments().update({"x": torch.randn(30, 4), "y": torch.randn(30, 4)}), "x", "y", penalised=False)
    ('30 rows are few for width 4 (n/d = 7.50): have at least 40',)
    """
    n, d = train.n, train.width(source)
    floor = max(2, math.ceil(FLOOR_PENALISED * d)) if penalised else d + 2
    if n < floor:
        advice = "profile more prompts" if penalised else "profile more prompts, or use ridge"
        raise UserError(f"{method} from width {d} needs at least {floor} rows; got {n}: {advice}")
    notes = []
    needed = d * (PLENTY_PENALISED if penalised else PLENTY_FREE)
    if n < needed:
        notes.append(f"{n} rows are few for width {d} (n/d = {n / d:.2f}): have at least {needed}")
    for name in (source, target):
        still = int((train.squares(name) <= constant_floor(train, name)).sum())
        if still == train.width(name):
            raise UserError(f"{name} is constant, so there is nothing to fit")
        if still:
            notes.append(f"{still} of {train.width(name)} dimensions of {name} never vary")
    return tuple(notes)
