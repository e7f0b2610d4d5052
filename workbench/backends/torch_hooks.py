"""The default backend: plain torch hooks on the blocks of any decoder.

`read` and `edit` are context managers; they leave no hook behind, an exception included. An edit sees, beside the
hidden states, where each of them lies in its prompt (`Where`), so that the same adapter means the same on left- and
right-padded batches, with and without a KV cache, and under beam search.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial, reduce
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .. import anatomy
from ..anatomy import ALWAYS
from ..anatomy.hooks import Hooks, hidden_of, state_in, with_hidden, with_state
from ..errors import UserError
from ..sites import Site

if TYPE_CHECKING:
    from ..models import Model

FLOW = ("resid_pre", "attn_out", "resid_mid", "mlp_act", "mlp_out", "resid_post")
"""the points of a block in the order in which they come about"""
POLICIES = ("last", "prompt", "generated", "all")


def check_policy(policy: str) -> str:
    """Returns `policy`, or raises UserError naming those that are allowed."""
    for one in policy.split("+"):
        kind, _, count = one.partition(":")
        if one not in POLICIES and not (kind in ("first", "last") and count.isdigit() and int(count) > 0):
            raise UserError(f"unknown positions {policy!r}; allowed: {', '.join(POLICIES)}, first:n, last:n, and several "
                            "of these joined by +")  # fmt: skip
    return policy


def names_prompts_alone(policy: str) -> bool:
    """Whether no generated token is among the positions of a policy.

    >>> names_prompts_alone("first:2+last"), names_prompts_alone("last+generated")
    (True, False)
    """
    return not {"generated", "all"} & set(check_policy(policy).split("+"))


def of_prompts(fn: Edit) -> Edit:
    """Marks an edit that changes prompts alone: `edit` then spends nothing on it while tokens are generated."""
    fn.of_prompts = True  # type: ignore[attr-defined]
    return fn


def tokens_needed(policy: str) -> int:
    """How many tokens a prompt must have so that every position that a policy names is there.

    >>> tokens_needed("first:3+last"), tokens_needed("all")
    (3, 1)
    """
    counts = [one.partition(":")[2] for one in check_policy(policy).split("+")]
    return max(int(count or 1) for count in counts)


@dataclass(frozen=True)
class Where:
    """Where the rows of a hidden state lie: `position` counts the real tokens of each row from 0, -1 at padding."""

    position: Int[Tensor, "b t"]
    prompt_length: Int[Tensor, " b"]
    _known: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    """what was asked before: every site of a pass asks the same"""

    def mask(self, policy: str) -> Bool[Tensor, "b t"]:
        """Which positions a policy names: `last` (the last prompt token), `prompt`, `generated`, `all`, `first:n`,
        `last:n` (the first or last n prompt tokens), or the union of several, `first:1+last:1`."""
        if policy not in self._known:
            self._known[policy] = reduce(torch.logical_or, (self._one(one) for one in check_policy(policy).split("+")))
        return self._known[policy]

    def names_any(self, policy: str) -> bool:
        """Whether a policy names any position of this pass; a device is waited for once, not at each site."""
        key = ("any", policy)
        if key not in self._known:
            self._known[key] = bool(self.mask(policy).any())
        return self._known[key]

    def too_short(self, policy: str) -> tuple[int, int, int] | None:
        """Of the first prompt of this pass that has fewer tokens than a policy names: its row, its tokens and how many are
        needed; None where all are long enough, and in a pass that only continues prompts."""
        key = ("short", policy)
        if key not in self._known:
            self._known[key] = self._find_short(tokens_needed(policy))
        return self._known[key]

    def _find_short(self, needed: int) -> tuple[int, int, int] | None:
        if needed == 1:  # any prompt has as many, and no device need be waited for
            return None
        short = (self.prompt_length < needed) & (self.position == 0).any(1)
        rows = short.nonzero()[:1, 0].tolist()
        return (rows[0], int(self.prompt_length[rows[0]]), needed) if rows else None

    def _one(self, policy: str) -> Bool[Tensor, "b t"]:
        p, end = self.position, self.prompt_length[:, None]
        kind, _, count = policy.partition(":")
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
        """The same on a device; itself where it is there."""
        if device == self.position.device:
            return self
        if device not in self._known:
            self._known[device] = Where(self.position.to(device), self.prompt_length.to(device))
        return self._known[device]


Edit = Callable[[Float[Tensor, "b t d"], Where], Float[Tensor, "b t d"]]
Take = Callable[[Site, Float[Tensor, "b t d"]], Tensor]
Tapped = Callable[[Tensor], Tensor | None]
Tap = tuple[Site, Tapped]
"""a site, and what is called with the states there; what it returns, if anything, replaces them"""
Attach = Callable[["Model", Sequence[Tap]], AbstractContextManager[None]]
"""how a backend hangs taps into a model for as long as a block lasts"""


class Stop(Exception):
    """Raised by a hook to end a forward pass after the last block that is wanted; the backend catches it."""


def _before(module: nn.Module, fn: Tapped) -> Any:
    """Calls `fn` with the hidden states that `module` is given; what it returns, if anything, replaces them."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = fn(state_in(args, kwargs))
        return None if new is None else with_state(args, kwargs, new)

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _after(module: nn.Module, fn: Tapped) -> Any:
    """Calls `fn` with the hidden states that `module` returns; what it returns, if anything, replaces them."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        new = fn(hidden_of(output))
        return None if new is None else with_hidden(output, new)

    return module.register_forward_hook(hook)


def _hang(model: Model, site: Site, fn: Tapped, hooks: Hooks) -> None:
    """Hangs `fn` at a site. Inside a block it is called with what is added to the residual stream, or with resid_mid.

    For resid_mid, resid_pre is taken from a module inside the block that is given it: so it is what the block works with,
    whoever else has edited it and whichever context was entered first.
    """
    block = model.block(site.layer)
    if site.point in ALWAYS:
        hooks.add((_before if site.point == "resid_pre" else _after)(block, fn))
        return
    parts, is_mid, entered = model.anatomy[site.layer], site.point == "resid_mid", list[Tensor]()
    part = parts.part(site.point)

    def enter(h: Tensor) -> None:
        entered[:] = [h if is_mid else h.new_empty(h.shape[:2])]  # what is flat needs its shape alone

    def run(raw: Tensor) -> Tensor | None:
        h = raw.clone() if part.overwritten else raw
        h = h if part.scale == 1.0 else h * part.scale
        pre = entered.pop() if entered else None  # popped: it need not be held until the pass ends
        if pre is not None:
            h = h.view(*pre.shape[:2], -1)
        if is_mid:
            assert pre is not None, "the attention ran before the block's input was seen"
            h = pre.to(h.device) + h
        new = fn(h)
        if new is None or new is h:
            return None
        if is_mid or part.scale != 1.0:  # as a difference: where nothing is changed, not a bit is
            return raw + ((new - h) / part.scale).reshape(raw.shape).to(raw)
        new = new.reshape(raw.shape)
        return new.clone() if part.overwritten else new

    if is_mid or part.flat:
        hooks.add(_before(block.get_submodule(parts.entry), enter))
    hooks.add((_before if site.point == "mlp_act" else _after)(block.get_submodule(part.path), run))


@contextmanager
def attach(model: Model, taps: Sequence[Tap]) -> Iterator[None]:
    """Calls each `fn` of `taps` with the states at its site, in every forward pass inside the block.

    Several taps in one block are called in the order in which its states come about, whatever their own order: what is
    written to attn_out is in the resid_mid that the next is called with. Raises UserError for a site that is not there.
    """
    anatomy.check(model, [site for site, _ in taps])
    with Hooks(model.module) as hooks:
        for site, fn in sorted(taps, key=lambda tap: FLOW.index(tap[0].point)):
            _hang(model, site, fn, hooks)
        yield


@contextmanager
def read(
    model: Model, sites: Sequence[Site], take: Take | None = None, attach: Attach = attach
) -> Iterator[dict[Site, Tensor]]:
    """Captures the hidden states [b, t, d] at `sites` of each forward pass inside the block (the last pass wins).

    Nested inside `edit`, it reads what was written. The tensors are the model's own: on its device, in its dtype, part
    of the autograd graph where there is one. `take(site, h)` is called while the pass runs, and what it returns is kept
    in place of h: a few rows, say, so that the rest need not be held until the pass ends.
    """
    sites = [Site.parse(site, model.n_layers) for site in sites]
    captured: dict[Site, Tensor] = {}
    with attach(model, [(site, partial(_keep, captured, site, take)) for site in sites]):
        yield captured


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


def _signature(module: nn.Module) -> inspect.Signature:
    """Of `module.forward`; an instrumented one (nnsight's) shows its `self`, which is not passed."""
    signature = inspect.signature(module.forward)
    return signature.replace(parameters=[p for name, p in signature.parameters.items() if name != "self"])


@dataclass
class _Clock:
    """Follows the forward passes of one context and knows the positions of each."""

    given: Tensor | None
    signature: inspect.Signature
    beyond: bool = False  # whether every token of this pass comes after its prompt
    locate: Callable[[], Where] | None = None  # where the tokens of this pass lie: worked out when it is asked for
    prompt_ids: Tensor | None = None
    lengths: Tensor | None = None
    width: int = 0  # tokens of the last pass, its past included
    outer: dict[str, Any] = field(default_factory=dict)  # what the whole model was called with, until its decoder is

    def begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes the ids and the mask of a wrapper, which may hand its decoder embeddings and masks of its own making."""
        given = {"input_ids": args[0]} if args else {}
        self.outer = {k: v for k, v in {**given, **kwargs}.items() if k in ("input_ids", "attention_mask")}

    def tick(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call: Mapping[str, Any] = kwargs
        if args:  # names of what was given by position
            bound = self.signature.bind_partial(*args, **kwargs).arguments
            call = {**bound.get("kwargs", {}), **bound}
        outer, self.outer = self.outer, {}
        ids, cache, mask = call.get("input_ids"), call.get("past_key_values"), call.get("attention_mask")
        states = ids if ids is not None else call.get("inputs_embeds")
        if states is None:
            raise UserError("an edited model needs input_ids or inputs_embeds")
        rows, width = states.shape[:2]
        past = int(cache.get_seq_length()) if cache is not None else 0
        ids = outer.get("input_ids") if ids is None else ids
        mask = mask if getattr(mask, "ndim", None) == 2 else outer.get("attention_mask", mask)
        if mask is not None and getattr(mask, "ndim", None) != 2:
            raise UserError("edits need the plain [batch, token] attention mask; generate without a static cache")
        if self.given is not None:
            self.lengths = self._spread(self.given.to(states.device), rows)
        elif past == 0 and not (cache is None and self._continues(ids)):
            self.lengths, self.prompt_ids = _totals(mask, rows, past + width, states.device), ids
        elif self.lengths is None:
            raise UserError("an edit began in the middle of a generation; pass prompt_lengths, or enter it before")
        self.width, lengths = past + width, self.lengths
        self.beyond = past > 0 and self.given is None
        self.locate = lru_cache(1)(
            lambda: Where(_places(mask, rows, past, width, states.device), self._spread(lengths, rows))
        )
        if not self.beyond:
            self.locate()  # what is wrong with a batch of prompts is told before it runs

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


def _totals(mask: Tensor | None, rows: int, width: int, device: torch.device) -> Int[Tensor, " b"]:
    """The real tokens of each row."""
    return torch.full((rows,), width, device=device) if mask is None else mask.long().sum(1)


def _places(mask: Tensor | None, rows: int, past: int, width: int, device: torch.device) -> Int[Tensor, "b t"]:
    """The place of each token of a pass among the real ones of its row, -1 at padding."""
    if mask is None:
        return (past + torch.arange(width, device=device)).expand(rows, width)
    return (mask.long().cumsum(1) - 1).masked_fill(mask == 0, -1)[:, -width:]


@contextmanager
def edit(
    model: Model,
    edits: Mapping[Site, Edit],
    prompt_lengths: Int[Tensor, " b"] | Sequence[int] | None = None,
    attach: Attach = attach,
) -> Iterator[None]:
    """Replaces the hidden states h at each site by `fn(h, where)` in every forward pass inside the block.

    A forward pass whose cache holds tokens continues; any other is a new batch of prompts, unless it has no cache at all
    and its ids are those of the pass before with one token more, as `generate(use_cache=False)` does. Give
    `prompt_lengths` (real tokens of each prompt) where that is not so: a prompt prefilled in chunks, or a context that
    continues an older cache. `fn` may change h in place, but must return it; one that is marked by `of_prompts` is not
    called for tokens that come after their prompts. Raises UserError for sites that the model does not have, and for what is
    returned in another shape.
    """
    edits = {Site.parse(site, model.n_layers): fn for site, fn in edits.items()}
    given = None if prompt_lengths is None else torch.as_tensor(prompt_lengths)
    decoder = model.decoder
    clock = _Clock(given, _signature(decoder))

    def apply(site: Site, fn: Edit) -> Tapped:
        early = getattr(fn, "of_prompts", False)

        def run(h: Tensor) -> Tensor | None:
            assert clock.locate is not None, "a block ran outside its decoder"
            if early and clock.beyond:
                return None
            # inside a block h may be made for the occasion, or be needed once more: what is done to it in place is then
            # seen only as a difference from h
            new = fn(h if site.point in ALWAYS else h.clone(), clock.locate().to(h.device))
            if not isinstance(new, Tensor) or new.shape != h.shape:
                got = f"shape {list(new.shape)}" if isinstance(new, Tensor) else type(new).__name__
                raise UserError(
                    f"an edit of {site} returned {got}; it must return the states, of shape {list(h.shape)}"
                )
            return new.to(h)

        return run

    with Hooks(model.module) as hooks:
        if decoder is not model.module:
            hooks.add(model.module.register_forward_pre_hook(clock.begin, with_kwargs=True))
        hooks.add(decoder.register_forward_pre_hook(clock.tick, with_kwargs=True))
        with attach(model, [(site, apply(site, fn)) for site, fn in edits.items()]):
            yield
