"""The last step of a model, from the residual stream to logits: its final norm and its head, found and proved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.anatomy.anatomy import probe_ids
from workbench.anatomy.hooks import Hooks, hidden_of, state_in
from workbench.errors import UserError
from workbench.evaluate.scoring import LOGIT_BUDGET, Head
from workbench.models import Model

TOLERANCE = 1e-5
"""of the largest logit: what the lens at the last layer may differ by from the model's own logits, in float32"""


@dataclass(frozen=True, eq=False)
class Unembedding:
    """What a model does with the output of its last block: modules (a final norm, mostly) and the head.

    Made by `of`, which finds the modules by what they are given and make, and proves that the whole gives the model's own
    logits. A head that is scaled or soft-capped (Gemma, Cohere, Granite) is so here too. Embeddings that are scaled
    (Gemma) need nothing: states are read behind them, and logits are made of the unscaled matrix, as in the model.
    """

    head: Head
    modules: tuple[nn.Module, ...]
    dtype: torch.dtype
    """of the residual stream"""
    vocabulary: int

    @classmethod
    def of(cls, model: Model) -> Unembedding:
        """Finds and proves it in two passes of 16 tokens.

        Raises:
            UserError: weights that are on another machine; a head, or a way from the last block to it, that cannot be
                told from the rest of the model.
        """
        if all(p.is_meta for p in model.module.parameters()):
            raise UserError(f"the weights of {model.name} are not on this machine, and a lens needs its head here; load it "
                            "without remote")  # fmt: skip
        ids = probe_ids(model.module).to(model.device)
        mask = torch.ones_like(ids)
        with torch.inference_mode():
            head = Head.of(model)
            if not head.alone:
                raise _unknown(model, "its logits are not those of one head on what its decoder returns")
            raw, end, records = _watched(model, head, ids, mask)
            modules = _way(raw, end, records)
            if modules is None:
                raise _unknown(model, "no modules lead from its last block to its head")
            theirs = model.logits(ids, mask)
            found = cls(head, modules, raw.dtype, theirs.shape[-1])
            off = float((found.logits(raw.flatten(0, 1)) - theirs.flatten(0, 1).float()).abs().max())
        # in half precision: some roundings of the states that the head is given
        allowed = max(TOLERANCE, 8 * torch.finfo(theirs.dtype).eps) * max(1.0, float(theirs.abs().max()))
        if not off <= allowed:
            raise _unknown(model, f"what was found differs from its own logits by {off:.2g}")
        return found

    @property
    def rows(self) -> int:
        """How many states are turned into logits at once, so that these stay within a fixed budget."""
        return max(1, LOGIT_BUDGET // self.vocabulary)

    def logits(self, states: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        """The logits of states of the last block's output: in the model's dtype, then float32; on the head's device."""
        states = states.to(self.dtype)
        for module in self.modules:
            place = next(iter(module.parameters()), states).device
            states = hidden_of(module(states if place.type == "meta" else states.to(place)))
        return self.head.logits(states).float()

    def log_probabilities(self, states: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        """Log-probabilities in nats, float32."""
        return self.logits(states).log_softmax(-1)

    def batches(self, states: Float[Tensor, "n d"]) -> Iterator[slice]:
        """Slices of rows that are unembedded at once."""
        return (slice(start, start + self.rows) for start in range(0, len(states), self.rows))


Record = tuple[nn.Module, Tensor, Tensor]
"""a module, what it was given, and what it made of it"""


def _watched(model: Model, head: Head, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, list[Record]]:
    """The last block's output, what the head is given, and what the modules outside of the blocks did."""
    raw: list[Tensor] = []
    records: list[Record] = []

    def last(_: nn.Module, __: Any, output: Any) -> None:
        raw[:] = [hidden_of(output).clone()]

    def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given, made = state_in(args, kwargs), hidden_of(output)
        if raw and isinstance(given, Tensor) and isinstance(made, Tensor):
            records.append((module, given.clone(), made.clone()))

    inside = {m for layer in range(model.n_layers) for m in model.block(layer).modules()}
    with Hooks(model.module) as hooks:
        for module in model.decoder.modules():
            if module not in inside and module is not model.decoder:
                hooks.add(module.register_forward_hook(see, with_kwargs=True))
        hooks.add(model.block(model.n_layers - 1).register_forward_hook(last))
        end = head.states(ids, mask)
    assert raw, "the last block did not run"
    return raw[0], end, records


def _way(raw: Tensor, end: Tensor, records: list[Record]) -> tuple[nn.Module, ...] | None:
    """The fewest modules that, one after the other, make `end` of `raw`; None where there are none."""
    ways: list[tuple[Tensor, tuple[nn.Module, ...]]] = [(raw, ())]
    for _ in range(len(records) + 1):
        for state, way in ways:
            if _same(state, end):
                return way
        ways = [
            (made, (*way, module)) for state, way in ways for module, given, made in records
            if module not in way and _same(given, state)
        ]  # fmt: skip
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b.to(a.device))


def _unknown(model: Model, why: str) -> UserError:
    return UserError(f"{model.name} ({model.family}) has no unembedding that can be told: {why}; a lens needs the final norm "
                     "and the head alone, as plain hooks on a Hugging Face model find them")  # fmt: skip
