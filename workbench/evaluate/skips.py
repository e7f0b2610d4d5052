"""Passes of a model that skip blocks, a map taking the place of each run of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ..backends.torch_hooks import hidden_of
from ..errors import UserError
from ..maps.linear_map import LinearMap
from ..models import Model
from ..sites import text_config
from .causal import Arm, transport

Jump = tuple[int, int]
"""(l, k): from resid_post.l to resid_post.(l + k), so that blocks l+1 to l+k are skipped"""
HELD = 1 << 31
"""bytes of maps, in the model's dtype, that may lie on its device at once"""


def runs_of(blocks: Collection[int]) -> list[Jump]:
    """The jumps (l, k) that together skip these blocks.

    >>> runs_of({3, 4, 7})
    [(2, 2), (6, 1)]
    """
    found: list[Jump] = []
    for block in sorted(blocks):
        if found and sum(found[-1]) == block - 1:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((block - 1, 1))
    return found


def check_jumps(model: Model, operators: Mapping[Jump, LinearMap]) -> None:
    """Raises UserError for no operators, a jump that leaves the model, or an operator of another width."""
    if not operators:
        raise UserError("no operators given; give maps by (layer, number of blocks)")
    for (l, k), operator in operators.items():
        if l < 0 or k < 1 or l + k >= model.n_layers:
            raise UserError(f"the jump ({l}, {k}) does not lie within layers 0 to {model.n_layers - 1}; (l, k) skips "
                            "blocks l+1 to l+k")  # fmt: skip
        if (operator.d_in, operator.d_out) != (model.width, model.width):
            raise UserError(f"the operator of jump ({l}, {k}) maps width {operator.d_in} to {operator.d_out}; this model "
                            f"has width {model.width}")  # fmt: skip


@contextmanager
def skipped(model: Model, operators: Mapping[Jump, LinearMap]) -> Iterator[None]:
    """Inside the block, forward passes skip the blocks of each jump (l, k) and apply its map instead.

    For passes without a KV cache. The blocks' own forward comes back at the end, an exception included.
    """
    check_jumps(model, operators)
    blocks = _blocks(operators)
    if len(set(blocks)) != len(blocks):
        raise UserError(f"the jumps {sorted(operators)} skip a block twice; give runs that do not overlap")
    arms = {jump: transport(operator, model) for jump, operator in operators.items()}
    with _bypassed(model, arms, _tuple_sizes(model, blocks)):
        yield


class SkipMaps:
    """The maps of many jumps, each read where it is wanted (it may lie on disk) and held while there is room.

    operators: maps by jump, which `check_jumps` has passed.
    """

    def __init__(self, model: Model, operators: Mapping[Jump, LinearMap]) -> None:
        self.model, self.operators = model, operators
        self.most = max(1, HELD // (model.width**2 * model.dtype.itemsize))
        self._arms: dict[Jump, Arm] = {}
        self._sizes = _tuple_sizes(model, sorted(set(_blocks(operators))))

    def groups(self, sets: Sequence[Collection[Jump]]) -> list[list[int]]:
        """The numbers of the sets, in their order, as many together as there is room for their maps."""
        found: list[list[int]] = []
        wanted: set[Jump] = set()
        for i, jumps in enumerate(sets):
            if not found or len(wanted | set(jumps)) > self.most:
                found.append([])
                wanted = set()
            found[-1].append(i)
            wanted |= set(jumps)
        return found

    def hold(self, jumps: Collection[Jump]) -> None:
        """Reads those of these maps that are not there; others go where there is no room for all."""
        if len(self._arms.keys() | set(jumps)) > self.most:
            self._arms = {jump: arm for jump, arm in self._arms.items() if jump in jumps}
        for jump in sorted(set(jumps) - self._arms.keys()):
            self._arms[jump] = transport(self.operators[jump], self.model)

    def skipped(self, jumps: Collection[Jump]) -> AbstractContextManager[None]:
        """`skipped` with maps that are held; the jumps must not overlap."""
        return _bypassed(self.model, {jump: self._arms[jump] for jump in jumps}, self._sizes)


@contextmanager
def _bypassed(model: Model, arms: Mapping[Jump, Arm], sizes: Mapping[int, int | None]) -> Iterator[None]:
    before: dict[int, Any] = {}
    try:
        for (l, k), arm in arms.items():
            for b in range(l + 1, l + k + 1):
                block = model.block(b)
                before[b] = block.__dict__.get("forward")
                # the map takes the place of the first block of a run; the others hand on what they get
                block.__dict__["forward"] = _forward(arm if b == l + 1 else None, sizes[b])
        yield
    finally:
        for b, forward in before.items():
            if forward is None:
                del model.block(b).__dict__["forward"]
            else:
                model.block(b).__dict__["forward"] = forward


def _blocks(jumps: Collection[Jump]) -> list[int]:
    return [b for l, k in jumps for b in range(l + 1, l + k + 1)]


def _forward(arm: Any, size: int | None) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        h: Tensor = args[0] if args else kwargs["hidden_states"]
        out = h if arm is None else arm(h.flatten(0, -2), h.flatten(0, -2)).view_as(h)
        return out if size is None else (out, *[None] * (size - 1))

    return forward


def _tuple_sizes(model: Model, layers: Collection[int]) -> dict[int, int | None]:
    """What each block returns: None for a tensor, else the length of its tuple (one short pass)."""
    sizes: dict[int, int | None] = {}

    def look(layer: int) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            hidden_of(output)
            sizes[layer] = len(output) if isinstance(output, tuple) else None

        return hook

    handles = [model.block(b).register_forward_hook(look(b)) for b in layers]
    ids: Int[Tensor, "1 2"] = torch.arange(3, 5)[None] % int(text_config(model.module).vocab_size)
    try:
        with torch.inference_mode():
            model.run(ids, torch.ones_like(ids), stop_after=max(layers))
            missing = [b for b in layers if b not in sizes]
            assert not missing, f"blocks {missing} did not run"
    finally:
        for handle in handles:
            handle.remove()
    return sizes
