"""Runs the blocks of a plan: each batch leaves only the wanted rows, which gather on the device until the block is done."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..backends.torch_hooks import Stop
from ..errors import UserError
from ..interrupts import Asked, Stopped
from ..sites import Site, text_config
from . import plan as plans
from .plan import Block, Plan

if TYPE_CHECKING:
    from ..models import Model

log = logging.getLogger("workbench")
Rows = dict[Site, Tensor]


class _Batch:
    """Padded ids [b, t], where the kept tokens lie in them (b * t + column), and their rows in the block."""

    def __init__(self, plan: Plan, block: Block, sequences: list[int], pad_id: int, device: torch.device) -> None:
        spool = plan.spool
        self.n_tokens, width = int(spool.lengths[sequences].sum()), int(spool.lengths[sequences].max())
        ids = np.full((len(sequences), width), pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        kept, target = [], []
        for j, sequence in enumerate(sequences):
            row = spool.ids(sequence)
            ids[j, : len(row)], mask[j, : len(row)] = row, 1
            kept.append(spool.columns(sequence).astype(np.int64) + j * width)
            first = int(spool.sequences["first_row"][sequence]) - block.start
            target.append(np.arange(first, first + len(kept[-1])))
        # pinned, so that no copy to the device waits for what runs there
        made = (torch.from_numpy(x) for x in (ids, mask, np.concatenate(kept), np.concatenate(target)))
        self.ids, self.mask, *index = (x.pin_memory() if device.type == "cuda" else x for x in made)
        self.where, self.target = index
        self.bad: dict[Site, Tensor] = {}
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.index(device)  # before the pass, not within it

    def index(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(where the kept tokens lie in [b * t], their rows in the block), on a device."""
        if device not in self._on:
            fast = self.where.is_pinned()
            self._on[device] = tuple(x.to(device, non_blocking=fast) for x in (self.where, self.target))  # type: ignore[assignment]
        return self._on[device]


class BlockRunner:
    """Runs blocks of a plan on its model.

    The rows of a block gather on the device where each site lies, in the store's dtype; a batch never holds more than
    that of what passes the sites. Those of a single prompt that is too large for a block gather on the host. Where
    memory runs out, the batch that failed and all after it are cut to half as many tokens; what was taken before stays.

    nonfinite: how many values of each site were not finite in the last block, counted where they are.
    """

    def __init__(self, model: Model, plan: Plan, bar: Any = None, stop: Asked | None = None) -> None:
        self.model, self.plan, self.bar, self.stop = model, plan, bar, stop or Asked()
        self.dtype = plans.ROW_DTYPES[plan.dtype]
        self.stop_after = max(site.layer for site in plan.sites)
        self.tokens = plan.batch_tokens  # of a batch at most; less once memory ran out
        self.nonfinite: Rows = {}
        self._batch: _Batch | None = None
        self._rows: Rows = {}
        self._n, self._on_host = 0, False
        # padding stands on the right, where no real token sees it: without its mask attention takes the fast path
        config = text_config(model.module)
        self._causal = getattr(config, "is_causal", True) and not getattr(config, "use_bidirectional_attention", None)
        # once the last site was taken the rest of its block is not run; other backends end after the block
        self._stops_in_hook = model.backend.name == "hooks"

    def run(self, block: Block) -> Rows:
        """The rows [n, d] of a block at each site, in the order of the prompts, on the site's device or the host."""
        return self._run(block, [i for batch in self.plan.batches(block) for i in batch])

    def run_batch(self, block: Block, sequences: list[int]) -> None:
        """Runs some sequences of a block and lets their rows go: to time them."""
        self._run(block, sequences)

    def _run(self, block: Block, left: list[int]) -> Rows:
        self._n, self._on_host = block.n, block.n * self.plan.row_bytes > plans.BLOCK_BYTES
        self._rows, self.nonfinite = {}, {}
        try:
            while left:
                left = self._until_full(block, left)
                if left:
                    self._halve(left)  # here, where no exception holds what the failed pass had made
            return {site: self._rows[site] for site in self.plan.sites} if block.n else self._empty()
        finally:
            self._rows, self._batch = {}, None

    def _until_full(self, block: Block, left: list[int]) -> list[int]:
        """Runs sequences, longest first, until memory runs out; those that are still to do."""
        done = 0
        try:
            with self.model.read(self.plan.sites, take=self._take), torch.inference_mode():
                for sequences in self.plan.cut(left, self.tokens):
                    self._forward(block, sequences)
                    done += len(sequences)
                    self.stop.check()
        except torch.OutOfMemoryError:
            return left[done:]
        return []

    def _forward(self, block: Block, sequences: list[int]) -> None:
        batch = self._batch = _Batch(self.plan, block, sequences, self.model.pad_id, self.model.device)
        # an edit, which a hook before the decoder tells of its batch, finds the ends of prompts by the mask
        whole = self._causal and not self.model.decoder._forward_pre_hooks
        self.model.run(batch.ids, batch.mask.fill_(1) if whole else batch.mask, stop_after=self.stop_after)
        for site, bad in batch.bad.items():  # not before all of it ran: a batch that fails is run again
            self.nonfinite[site] = self.nonfinite[site] + bad if site in self.nonfinite else bad
        if self.bar is not None:
            self.bar.update(batch.n_tokens)

    def _take(self, site: Site, h: Tensor) -> Tensor:
        """Keeps the wanted rows of what passes a site; inside the hook, so that nothing else is held."""
        batch = self._batch
        assert batch is not None, "a site was read outside a batch"
        if site not in self._rows:
            with torch.inference_mode(False):
                device = torch.device("cpu") if self._on_host else h.device
                self._rows[site] = torch.empty((self._n, h.shape[-1]), dtype=self.dtype, device=device)
        where, target = batch.index(h.device)
        picked = h.reshape(-1, h.shape[-1]).index_select(0, where).to(self.dtype)
        batch.bad[site] = (~torch.isfinite(picked)).sum()
        if self._on_host:  # one sequence is all of such a block: its rows stand one after another
            self._rows[site][: len(picked)].copy_(picked)
        else:
            self._rows[site].index_copy_(0, target, picked)
        if self._stops_in_hook and len(batch.bad) == len(self.plan.sites):
            raise Stop
        return self._rows[site]

    def _empty(self) -> Rows:
        return {site: torch.empty((0, width), dtype=self.dtype) for site, width in self.plan.widths.items()}

    def _halve(self, left: list[int]) -> None:
        self._batch = None
        torch.cuda.empty_cache()
        failed, spool = next(self.plan.cut(left, self.tokens)), self.plan.spool
        b, t = len(failed), int(spool.lengths[failed[0]])
        if b == 1:
            prompt = self.plan.prompts[int(spool.sequences["prompt"][failed[0]])]
            raise UserError(f"prompt {prompt.id!r} of {t} tokens does not fit the device's memory; give max_length, "
                            "fewer sites or another device") from None  # fmt: skip
        self.tokens = min(self.tokens, b * t) // 2
        log.warning("out of memory with %d prompts of up to %d tokens; going on with %d tokens at a time", b, t,
                    self.tokens)  # fmt: skip


class _Landing:
    """The rows of a block on their way to the host; from a GPU they are copied while the next block runs."""

    def __init__(self, number: int, rows: Rows, nonfinite: Rows) -> None:
        self.number, self._events = number, list[torch.cuda.Event]()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        # begun with the rows: asking for the number later would wait for all that was sent to the device since
        self._bad = {site: self._start(nonfinite[site]) if site in nonfinite else torch.tensor(0) for site in rows}
        self._rows = {site: self._start(values) for site, values in rows.items()}

    @property
    def on_its_way(self) -> bool:
        return bool(self._events)

    def _start(self, values: Tensor) -> Tensor:
        if values.device.type != "cuda":
            return values.cpu()
        # torch keeps pinned memory for the next block of this size once the tensor is gone
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        if values.device not in self._streams:
            self._streams[values.device] = torch.cuda.Stream(values.device)
        side = self._streams[values.device]
        side.wait_stream(torch.cuda.current_stream(values.device))
        with torch.cuda.stream(side):
            host.copy_(values, non_blocking=True)
            values.record_stream(side)
            self._events.append(side.record_event())
        return host

    def settle(self) -> tuple[int, Rows, dict[Site, int]]:
        """The block's number, its rows on the host, and how many values of each site are not finite."""
        for event in self._events:
            event.synchronize()
        return self.number, self._rows, {site: int(bad) for site, bad in self._bad.items()}


def landed(runner: BlockRunner, numbers: Iterable[int]) -> Iterator[tuple[int, Rows, dict[Site, int]]]:
    """Runs blocks and yields (number, rows on the host, values that are not finite) of each, in order.

    From a GPU a block is yielded once the next one has run; before a stop or an error, what has run is yielded first.
    """
    waiting: _Landing | None = None
    for number in numbers:
        try:
            rows = runner.run(runner.plan.blocks[number])
            new = _Landing(number, rows, runner.nonfinite)
            del rows  # the landing alone says how long they are held
        except (Exception, Stopped):
            if waiting is not None:
                yield waiting.settle()
            raise
        if waiting is not None:
            yield waiting.settle()
        waiting = new
        if not new.on_its_way:
            yield new.settle()
            waiting = None
    if waiting is not None:
        yield waiting.settle()


def run_blocks(
    model: Model, plan: Plan, numbers: Iterable[int]
) -> Iterator[tuple[int, dict[Site, Tensor], dict[Site, int]]]:
    """Computes blocks of a plan (again): (number, rows [n, d] of each site, its values that are not finite).

    >>> plan = make_plan(model, prompts)                                                  # doctest: +SKIP
    >>> number, rows, nonfinite = next(run_blocks(model, plan, [3]))                       # doctest: +SKIP
    """
    return landed(BlockRunner(model, plan), numbers)


def refuse_nonfinite(plan: Plan, number: int, rows: dict[Site, Tensor], counts: dict[Site, int], allowed: bool) -> None:
    """Raises UserError for values of a block that are not finite, with the first prompt of theirs; warns where allowed."""
    for site, count in counts.items():
        if not count:
            continue
        if allowed:
            log.warning("%s: %d values are NaN or infinite", site, count)
            continue
        row = int((~torch.isfinite(rows[site])).any(1).nonzero()[0])
        prompt = plan.prompts[plan.prompt_of(plan.blocks[number].start + row)]
        advice = "load the model in another dtype"
        if plan.dtype == "float16":
            advice = "float16 ends at 65504: store bfloat16 or float32"
        raise UserError(f"{site}: {count} values are NaN or infinite in {plan.dtype}, first in prompt {prompt.id!r}; "
                        f"{advice}, or pass allow_nonfinite=True (--allow-nonfinite)")  # fmt: skip
