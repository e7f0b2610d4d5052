"""The default backend: plain torch hooks on the blocks of any decoder.

`read` and `edit` are context managers; they leave no hook behind, an exception included. An edit sees, beside the
hidden states, where each of them lies in its prompt (`Where`), so that the same adapter means the same on left- and
right-padded batches, with and without a KV cache, and under beam search.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..errors import UserError
from ..sites import Site

if TYPE_CHECKING:
    from ..models import Model

READABLE = ("resid_pre", "resid_post")
POLICIES = ("last", "prompt", "generated", "all", "prompt+generated")


def check_policy(policy: str) -> str:
    """Returns `policy`, or raises UserError naming those that are allowed."""
    kind, _, count = policy.partition(":")
    if policy in POLICIES or (kind in ("first", "last") and count.isdigit() and int(count) > 0):
        return policy
    raise UserError(f"unknown positions {policy!r}; allowed: {', '.join(POLICIES)}, first:n, last:n")


@dataclass(frozen=True)
class Where:
    """Where the rows of a hidden state lie: `position` counts the real tokens of each row from 0, -1 at padding."""

    position: Int[Tensor, "b t"]
    prompt_length: Int[Tensor, " b"]

    def mask(self, policy: str) -> Bool[Tensor, "b t"]:
        """Which positions a policy names: `last` (the last prompt token), `prompt`, `generated`, `all`, `first:n`,
        `last:n` (the first or last n prompt tokens)."""
        p, end = self.position, self.prompt_length[:, None]
        kind, _, count = check_policy(policy).partition(":")
        if policy == "last":
            return p == end - 1
        if policy == "prompt":
            return (p >= 0) & (p < end)
        if policy == "generated":
            return p >= end
        if kind == "first":
            return (p >= 0) & (p < int(count)) & (p < end)
        if kind == "last":
            return (p >= 0) & (p >= end - int(count)) & (p < end)
        return p >= 0

    def to(self, device: torch.device) -> Where:
        return Where(self.position.to(device), self.prompt_length.to(device))


Edit = Callable[[Float[Tensor, "b t d"], Where], Float[Tensor, "b t d"]]
Take = Callable[[Site, Float[Tensor, "b t d"]], Tensor]


class Stop(Exception):
    """Raised by a hook to end a forward pass after the last block that is wanted; `Model.run` catches it."""


def hidden_of(output: Any) -> Tensor:
    """The hidden states in a block's output: transformers 5 returns a tensor, older families a tuple."""
    return output[0] if isinstance(output, tuple) else output


def with_hidden(output: Any, hidden: Tensor) -> Any:
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _check(model: Model, sites: Sequence[Site]) -> None:
    for site in sites:
        Site.parse(site, model.n_layers)
        if site.point not in READABLE:
            raise UserError(f"{site} cannot be hooked by this backend yet; allowed points: {', '.join(READABLE)}")


def _hook(model: Model, site: Site, fn: Callable[[Tensor], Tensor | None]) -> Any:
    """Registers `fn` on the hidden states at `site`; what it returns, if anything, replaces them."""
    block = model.block(site.layer)
    if site.point == "resid_post":

        def after(_: nn.Module, __: Any, output: Any) -> Any:
            new = fn(hidden_of(output))
            return None if new is None else with_hidden(output, new)

        return block.register_forward_hook(after)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = fn(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    return block.register_forward_pre_hook(before, with_kwargs=True)


@contextmanager
def read(model: Model, sites: Sequence[Site], take: Take | None = None) -> Iterator[dict[Site, Tensor]]:
    """Captures the hidden states [b, t, d] at `sites` of each forward pass inside the block (the last pass wins).

    Nested inside `edit`, it reads what was written. The tensors are the model's own: on its device, in its dtype, part
    of the autograd graph where there is one. `take(site, h)` is called while the pass runs, and what it returns is kept
    in place of h: a few rows, say, so that the rest need not be held until the pass ends.
    """
    sites = [Site.parse(site, model.n_layers) for site in sites]
    _check(model, sites)
    captured: dict[Site, Tensor] = {}
    handles = []
    try:
        for site in sites:
            handles.append(_hook(model, site, partial(_keep, captured, site, take)))
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def _keep(captured: dict[Site, Tensor], site: Site, take: Take | None, h: Tensor) -> None:
    captured[site] = h if take is None else take(site, h)


@contextmanager
def stop_after(model: Model, layer: int) -> Iterator[None]:
    """Ends each forward pass inside the block once block `layer` has run (register it last)."""

    def stop(*_: Any) -> None:
        raise Stop

    handle = model.block(layer).register_forward_hook(stop)
    try:
        yield
    finally:
        handle.remove()


@dataclass
class _Clock:
    """Follows the forward passes of one context and knows the positions of each."""

    given: Tensor | None
    signature: inspect.Signature
    where: Where | None = None
    prompt_ids: Tensor | None = None
    lengths: Tensor | None = None
    width: int = 0  # tokens of the last pass, its past included

    def tick(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self.signature.bind_partial(*args, **kwargs).arguments
        call = {**call.get("kwargs", {}), **call}
        ids, cache = call.get("input_ids"), call.get("past_key_values")
        states = ids if ids is not None else call.get("inputs_embeds")
        if states is None:
            raise UserError("an edited model needs input_ids or inputs_embeds")
        rows, width = states.shape[:2]
        past = int(cache.get_seq_length()) if cache is not None else 0
        mask = call.get("attention_mask")
        if mask is not None and getattr(mask, "ndim", None) != 2:
            raise UserError("edits need the plain [batch, token] attention mask; generate without a static cache")
        if mask is None:
            position = (past + torch.arange(width, device=states.device)).expand(rows, width)
            total = torch.full((rows,), past + width, device=states.device)
        else:
            position = (mask.long().cumsum(1) - 1).masked_fill(mask == 0, -1)[:, -width:]
            total = mask.long().sum(1)
        if self.given is not None:
            self.lengths = self._spread(self.given.to(states.device), rows)
        elif past == 0 and not (cache is None and self._continues(ids)):
            self.lengths, self.prompt_ids = total, ids
        elif self.lengths is None:
            raise UserError("an edit began in the middle of a generation; pass prompt_lengths, or enter it before")
        self.width = past + width
        self.where = Where(position, self._spread(self.lengths, rows))

    def _continues(self, ids: Tensor | None) -> bool:
        """Whether these ids are the known prompts, one token longer than at the last pass: generate(use_cache=False)."""
        known = self.prompt_ids
        if known is None or ids is None or len(ids) % len(known) or ids.shape[1] != self.width + 1:
            return False
        return bool(torch.equal(ids[:: len(ids) // len(known), : known.shape[1]], known))

    @staticmethod
    def _spread(lengths: Tensor, rows: int) -> Tensor:
        """One length per row, where beams or several samples share a prompt."""
        if rows % len(lengths):
            raise UserError(f"{len(lengths)} prompt lengths do not fit a batch of {rows} rows")
        return lengths.repeat_interleave(rows // len(lengths))


@contextmanager
def edit(
    model: Model, edits: Mapping[Site, Edit], prompt_lengths: Int[Tensor, " b"] | Sequence[int] | None = None
) -> Iterator[None]:
    """Replaces the hidden states h at each site by `fn(h, where)` in every forward pass inside the block.

    A forward pass whose cache holds tokens continues; any other is a new batch of prompts, unless it has no cache at all
    and its ids are those of the pass before with one token more, as `generate(use_cache=False)` does. Give
    `prompt_lengths` (real tokens of each prompt) where that is not so: a prompt prefilled in chunks, or a context that
    continues an older cache. Raises UserError for sites that the model does not have.
    """
    edits = {Site.parse(site, model.n_layers): fn for site, fn in edits.items()}
    _check(model, list(edits))
    given = None if prompt_lengths is None else torch.as_tensor(prompt_lengths)
    decoder = model.decoder
    clock = _Clock(given, inspect.signature(decoder.forward))

    def apply(fn: Edit) -> Callable[[Tensor], Tensor]:
        def run(h: Tensor) -> Tensor:
            assert clock.where is not None, "a block ran outside its decoder"
            return fn(h, clock.where.to(h.device))

        return run

    handles = []
    try:
        handles.append(decoder.register_forward_pre_hook(clock.tick, with_kwargs=True))
        for site, fn in edits.items():
            handles.append(_hook(model, site, apply(fn)))
        yield
    finally:
        for handle in handles:
            handle.remove()
