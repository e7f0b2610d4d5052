"""Copies of a batch in one pass: the first untouched, each of the others with one layer changed, all compared on the way.

A batch of b sequences is run as [1 + k, b] sequences. What a change does to each later layer is measured where it comes
about, against the first copy of the same pass, so that no activation outlives its block.

    skip   h_{s+1}[t] := h_s[t], and the change goes on through all later layers
    local  h_l[t] := h_l[t] - (h_{s+1}[t] - h_s[t]) at the input of each later layer l alone: what that layer reads of the
           write of s itself, and nothing that the layers between have made of it
    erase  h_{s+1}[t] := the mean state there

Source: arXiv:2505.13898, sections 3 and 4 (interventions with and without propagation, residual erasure).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import UserError
from ..models import Model
from ..sites import Site

KINDS = ("skip", "local", "erase")
STATISTICS = ("max", "mean")
"""over the tokens of a prompt that count; the first is the paper's"""


@dataclass(frozen=True)
class LayerChange:
    """One changed copy: block `layer` skipped, its write taken from each later input, or its output erased."""

    layer: int
    kind: str = "skip"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"unknown change of a layer {self.kind!r}; allowed: {', '.join(KINDS)}")


@contextmanager
def changed_copies(
    model: Model,
    changes: Sequence[LayerChange],
    at: Bool[Tensor, "b t"],
    counted: Bool[Tensor, "b t"],
    means: Mapping[int, Float[Tensor, " d"]] | None = None,
) -> Iterator[Copies]:
    """Inside the block, each forward pass of a [(1 + k) * b, t] batch (see `Copies.repeated`) has copy j + 1 changed by
    `changes[j]` at the tokens `at`, and later writes are compared over the tokens `counted`.

    means: of erased layers, the mean state [d] after each. Raises UserError for layers that are not there, for an
    erased layer without a mean, and where nothing was run.

    >>> with changed_copies(model, [LayerChange(0)], at, counted) as copies:                  # doctest: +SKIP
    ...     model.run(copies.repeated(ids), copies.repeated(mask))
    >>> copies.later[0, 0, 3]  # the largest relative change of what block 3 writes, of each sequence   # doctest: +SKIP
    """
    for change in changes:
        Site.parse(change.layer, model.n_layers)
        if change.kind == "erase" and (means is None or change.layer not in means):
            raise UserError(f"to erase what block {change.layer} leaves, give the mean state after it")
    copies = Copies(model.n_layers, tuple(changes), at, counted, dict(means or {}))
    with model.edit(copies.edits()):
        yield copies
    if not copies.ran:
        raise UserError("no pass went through the changed layers inside of this block; run the model by its own `run` or "
                        "`logits`, as its backend needs it")  # fmt: skip


class Copies:
    """What `changed_copies` found: `later`, [2, k, layers, b], the max and the mean over the counted tokens of

        ||(h_{l+1} - h_l) - (hbar_{l+1} - hbar_l)|| / ||h_{l+1} - h_l||

    for every layer l after the changed one, NaN for the others.
    """

    def __init__(self, n_layers: int, changes: tuple[LayerChange, ...], at: Tensor, counted: Tensor,
                 means: dict[int, Tensor]) -> None:  # fmt: skip
        self.changes, self.n_layers, self.means = changes, n_layers, means
        self.later = torch.full((2, len(changes), n_layers, len(at)), torch.nan, dtype=torch.float64)
        self.ran = False
        self._at, self._counted = at, counted
        self._pre: Tensor | None = None
        self._writes: dict[int, Tensor] = {}  # of local changes, by copy

    def repeated(self, rows: Int[Tensor, "b t"]) -> Int[Tensor, "copies_b t"]:
        """The batch as it is run: 1 + k times, copy after copy."""
        return rows.repeat(1 + len(self.changes), 1)

    def edits(self) -> dict[Site, Any]:
        """From the first changed layer on: what goes into each block, and what comes out."""
        found: dict[Site, Any] = {}
        for layer in range(min(c.layer for c in self.changes), self.n_layers):
            found[Site(layer, "resid_pre")] = partial(self._enter, layer)
            found[Site(layer)] = partial(self._leave, layer)
        return found

    def _enter(self, layer: int, h: Tensor, _: Any) -> Tensor:
        h = self._without_writes(layer, h)
        self._pre = h.clone()  # a block may add to its input in place
        return h

    def _leave(self, layer: int, h: Tensor, _: Any) -> Tensor:
        assert self._pre is not None, "a block ended that had not begun"
        pre, self._pre, self.ran = self._pre.to(h.device), None, True
        before, after, at = self._split(pre), self._split(h), self._at.to(h.device)[..., None]
        write = after[0].float() - before[0].float()
        size = write.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        new = after
        for j, change in enumerate(self.changes):
            if change.layer < layer:
                other = after[j + 1].float() - before[j + 1].float()
                self.later[:, j, layer] = over_tokens((write - other).norm(dim=-1) / size, self._counted)
            elif change.layer == layer and change.kind == "local":
                self._writes[j] = write.to(h.dtype)
            elif change.layer == layer:
                new = after.clone() if new is after else new
                other = before[j + 1] if change.kind == "skip" else self.means[layer].to(h).expand_as(before[j + 1])
                new[j + 1] = torch.where(at, other, after[j + 1])
        left = h if new is after else new.flatten(0, 1)
        # a local change reaches the predictions by what the write of its layer adds to the last state itself
        return self._without_writes(self.n_layers, left) if layer == self.n_layers - 1 else left

    def _without_writes(self, layer: int, h: Tensor) -> Tensor:
        """What goes into a layer, the copies of local changes being the first copy less the write of their layer."""
        local = [j for j, c in enumerate(self.changes) if c.kind == "local" and c.layer < layer]
        if not local:
            return h
        parts, at = self._split(h).clone(), self._at.to(h.device)[..., None]
        for j in local:
            parts[j + 1] = torch.where(at, parts[0] - self._writes[j].to(h.device), parts[0])
        return parts.flatten(0, 1)

    def _split(self, h: Tensor) -> Float[Tensor, "copies b t d"]:
        return h.unflatten(0, (1 + len(self.changes), -1))


def over_tokens(values: Float[Tensor, "b t"], counted: Bool[Tensor, "b t"]) -> Float[Tensor, "2 b"]:
    """The largest and the mean value over the tokens that count, of each sequence; float64 on the CPU.

    >>> over_tokens(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]])).tolist()
    [[3.0], [2.0]]
    """
    mask = counted.to(values.device)
    kept = values.double().masked_fill(~mask, 0.0)  # what is measured is never negative
    return torch.stack([kept.amax(1), kept.sum(1) / mask.sum(1)]).cpu()
