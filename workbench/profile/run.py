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
from ..store.checks import DTYPES
from .plan import Block, Plan

if TYPE_CHECKING:
    from ..models import Model

log = logging.getLogger("workbench")
Rows = dict[Site, Tensor]


class _Batch:
    """Padded ids [b, t], where the kept tokens lie in them (b * t + column), and their rows in the block."""

    def __init__(self, plan: Plan, block: Block, sequences: list[int], pad_id: int) -> None:
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
        self.ids, self.mask = torch.from_numpy(ids), torch.from_numpy(mask)
        self._index = torch.from_numpy(np.concatenate(kept)), torch.from_numpy(np.concatenate(target))
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def index(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(where the kept tokens lie in [b * t], their rows in the block), on a device."""
        if device not in self._on:
            where, target = self._index
            self._on[device] = where.to(device), target.to(device)
        return self._on[device]


class BlockRunner:
    """Runs blocks of a plan on its model.

    The rows of a block gather on the device where each site lies, in the store's dtype; a batch never holds more than
    that of what passes the sites. Where memory runs out, the block begins again with batches of half as many tokens
    for sequences of that length, and so do all blocks after it.
    """

    def __init__(self, model: Model, plan: Plan, bar: Any = None, stop: Asked | None = None) -> None:
        self.model, self.plan, self.bar, self.stop = model, plan, bar, stop or Asked()
        self.dtype = DTYPES[plan.dtype]
        self.stop_after = max(site.layer for site in plan.sites)
        self._limits: list[tuple[int, int]] = []  # (width, tokens): batches at least so wide have at most so many
        self._batch: _Batch | None = None
        self._rows: Rows = {}
        self._taken: set[Site] = set()
        self._n = 0
        # padding stands on the right, where no real token sees it: without its mask attention takes the fast path
        config = text_config(model.module)
        self._causal = getattr(config, "is_causal", True) and not getattr(config, "use_bidirectional_attention", None)
        # once the last site was taken the rest of its block is not run; other backends end after the block
        self._stops_in_hook = model.backend.name == "hooks"

    def run(self, block: Block) -> Rows:
        """The rows [n, d] of a block at each site, in the order of the prompts, on the site's device."""
        while True:
            try:
                with self.model.read(self.plan.sites, take=self._take), torch.inference_mode():
                    return self._attempt(block)
            except torch.OutOfMemoryError:
                failed = self._batch
            finally:
                self._rows, self._batch = {}, None
            assert failed is not None
            self._halve(block, failed)  # here, where the exception no longer holds what the failed pass had made

    def run_batch(self, block: Block, sequences: list[int]) -> None:
        """Runs one batch of a block and lets its rows go: to time it."""
        with self.model.read(self.plan.sites, take=self._take), torch.inference_mode():
            self._rows, self._n = {}, block.n
            self._forward(block, sequences)
        self._rows, self._batch = {}, None

    def _forward(self, block: Block, sequences: list[int]) -> int:
        self._batch, self._taken = _Batch(self.plan, block, sequences, self.model.pad_id), set()
        mask = torch.ones_like(self._batch.mask) if self._causal else self._batch.mask
        self.model.run(self._batch.ids, mask, stop_after=self.stop_after)
        return self._batch.n_tokens

    def _attempt(self, block: Block) -> Rows:
        self._rows, self._n, done = {}, block.n, 0
        try:
            for sequences in self.plan.batches(block, self._budget):
                n_tokens = self._forward(block, sequences)
                done += n_tokens
                if self.bar is not None:
                    self.bar.update(n_tokens)
                self.stop.check()
        except torch.OutOfMemoryError:
            if self.bar is not None:
                self.bar.update(-done)
            raise
        return {site: self._rows[site] for site in self.plan.sites} if block.n else self._empty()

    def _take(self, site: Site, h: Tensor) -> Tensor:
        """Keeps the wanted rows of what passes a site; inside the hook, so that nothing else is held."""
        batch = self._batch
        assert batch is not None, "a site was read outside a batch"
        if site not in self._rows:
            with torch.inference_mode(False):
                self._rows[site] = torch.empty((self._n, h.shape[-1]), dtype=self.dtype, device=h.device)
        where, target = batch.index(h.device)
        picked = h.reshape(-1, h.shape[-1]).index_select(0, where)
        self._rows[site].index_copy_(0, target, picked.to(self.dtype))
        self._taken.add(site)
        if self._stops_in_hook and len(self._taken) == len(self.plan.sites):
            raise Stop
        return self._rows[site]

    def _empty(self) -> Rows:
        return {site: torch.empty((0, width), dtype=self.dtype) for site, width in self.plan.widths.items()}

    def _budget(self, width: int) -> int:
        return min([tokens for at_least, tokens in self._limits if width >= at_least], default=self.plan.batch_tokens)

    def _halve(self, block: Block, failed: _Batch) -> None:
        torch.cuda.empty_cache()
        b, t = failed.ids.shape
        if b == 1:
            prompt = self.plan.prompts[self.plan.prompt_of(block.start + int(failed.index(torch.device("cpu"))[1][0]))]
            raise UserError(f"prompt {prompt.id!r} of {t} tokens does not fit the device's memory; give max_length, "
                            "fewer sites or another device") from None  # fmt: skip
        log.warning("out of memory with %d prompts of up to %d tokens; going on with half", b, t)
        self._limits.append((t, b // 2 * t))


class _Landing:
    """The rows of a block on their way to the host; from a GPU they are copied while the next block runs."""

    def __init__(self, number: int, rows: Rows) -> None:
        self.number, self._events = number, list[torch.cuda.Event]()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        # counted where the rows are, and before they are copied: asking for the number later would wait for all that
        # was sent to the device since
        bad = {site: (~torch.isfinite(values)).sum() for site, values in rows.items()}
        self._bad = {site: self._start(count) for site, count in bad.items()}
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
            new = _Landing(number, runner.run(runner.plan.blocks[number]))
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
