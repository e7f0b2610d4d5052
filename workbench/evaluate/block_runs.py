"""Runs of blocks that do not wait for one another: all given the same state, or each the state before the last.

With F_i what block i adds to the state that it is given, and x_i the stream before it:

    sequential: x_(i+1) = x_i + F_i(x_i)
    parallel:   x_(i+1) = x_i + F_i(x_a), so that x_b = x_a + sum of F_i(x_a) over [a, b)
    stale:      x_(i+1) = x_i + F_i(x_(i-1)); the first block of a run is given x_a
    skipped:    x_(i+1) = x_i

A run of one block is exact, parallel and stale; of two, both are the same.

Source: "Make Deep Networks Shallow Again" (parallel), "Ladder Residual" (stale).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..models import Model
from ..sites import Site
from .write_parts import check_writes

KINDS = ("parallel", "stale", "skipped")


@contextmanager
def blocks_run(model: Model, start: int, length: int, kind: str) -> Iterator[None]:
    """Inside the block, blocks start to start + length - 1 run as `kind` says, in every forward pass without a KV cache.

    Blocks that are skipped are computed, and what they add is left out. Raises UserError for a run that leaves the model,
    another kind, and blocks that add to no residual stream.
    """
    if kind not in KINDS:
        raise UserError(f"unknown kind of run {kind!r}; allowed: {', '.join(KINDS)}")
    if start < 0 or length < 1 or start + length > model.n_layers:
        raise UserError(
            f"a run of {length} blocks from block {start} does not lie within blocks 0 to {model.n_layers - 1}"
        )
    check_writes(model)
    stream = _Stream(start, kind)
    edits = {}
    for layer in range(start, start + length):
        edits[Site(layer, "resid_pre")] = stream.enter(layer)
        edits[Site(layer)] = stream.leave(layer)
    with model.edit(edits):
        yield


class _Stream:
    """The stream along a run: x, what it is; given, what the block that runs was given."""

    def __init__(self, start: int, kind: str) -> None:
        self.start, self.kind = start, kind
        self.x: Tensor | None = None
        self.given: Tensor | None = None
        self.before: Tensor | None = None

    def enter(self, layer: int) -> Any:
        def edit(h: Tensor, _: Any) -> Tensor:
            if layer == self.start:
                self.given = self.before = h
            elif self.kind == "skipped":
                self.given = h
            elif self.kind == "stale":
                self.given, self.before = self.before, h
            self.x = h
            assert self.given is not None
            return self.given.to(h.device)

        return edit

    def leave(self, layer: int) -> Any:
        def edit(h: Tensor, _: Any) -> Tensor:
            assert self.x is not None
            assert self.given is not None
            x, given = self.x.to(h.device), self.given.to(h.device)
            if self.kind == "skipped":
                return x
            if layer == self.start:
                return h  # not a bit is changed
            work = torch.promote_types(h.dtype, torch.float32)
            return (x.to(work) + (h.to(work) - given.to(work))).to(h)

        return edit
