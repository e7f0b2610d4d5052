"""Model x prompts -> Store: the activations at chosen sites and tokens, streamed to disk and resumable."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import UserError
from .profile_plan import Block, Plan, make_plan, write_tables
from .progress import progress
from .rendering import pad
from .sites import Site
from .store import Store
from .store_checks import DTYPES
from .store_writer import StoreWriter

if TYPE_CHECKING:
    from .models import Model

log = logging.getLogger("workbench")


def profile_model(
    model: Model,
    prompts: Any,
    out: str | Path | None = None,
    *,
    sites: Sequence[Site | str | int] | None = None,
    tokens: str = "last",
    batch_tokens: int = 8192,
    dtype: str = "float32",
    overwrite: bool = False,
    max_length: int | None = None,
    allow_nonfinite: bool = False,
) -> Store:
    """Runs the prompts through the model up to the last wanted site, and keeps the rows asked for in a store at `out`.

    prompts: a PromptSet, or whatever `PromptSet.load` reads.
    out: the folder of the store; None keeps it in a temporary folder that goes when the store does.
    sites: `Site`s or their names; every `resid_post` unless given.
    tokens: `last` (the last prompt token), `all`, `first:n`, `last:n`, `every:n`; special tokens are left out of all
        but `last`, unless `+special` is appended.
    batch_tokens: the most tokens, padding included, in one forward pass; the result depends on it by float noise only.
    dtype: of the store: float32, float16, bfloat16, or auto (the model's).
    max_length: longer prompts are cut, the assistant header kept; the model's context unless given.
    allow_nonfinite: NaN and Inf are refused unless True; each shard's manifest entry counts them.

    A run that was killed and is started again with the same arguments goes on where it was, and ends with the same
    bytes. Raises UserError for bad arguments, for no prompts, for a prompt of no tokens, for values that are not
    finite, and for a folder that exists (unless `overwrite`), cannot be written, or is full.
    """
    plan = make_plan(
        model, prompts, sites=sites, tokens=tokens, batch_tokens=batch_tokens, dtype=dtype, max_length=max_length
    )
    temporary = Path(tempfile.mkdtemp(prefix="workbench-")) if out is None else None
    try:
        path = Path(out).expanduser() if out is not None else Path(temporary or "") / "profile"
        _run(model, plan, path, overwrite, allow_nonfinite)
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Store.open(path).keep_until_closed(temporary)


def _run(model: Model, plan: Plan, path: Path, overwrite: bool, allow_nonfinite: bool) -> None:
    with StoreWriter(path, plan.hash, overwrite=overwrite) as writer:
        done = plan.blocks[: len(writer.blocks)]
        if done:
            log.info("%s: going on after %d of %d blocks", path, len(done), len(plan.blocks))
        with (
            progress(total=plan.n_tokens, desc=f"profiling {Path(model.name).name}", unit="tok") as bar,
            model.read(plan.sites) as seen,
        ):
            bar.update(sum(len(plan.ids[i]) for block in done for i in range(block.first, block.last)))
            runner = _Runner(model, plan, seen, bar)
            for block in plan.blocks[len(done) :]:
                rows = runner.run(block)
                writer.write(rows, _count_nonfinite(plan, block, rows, allow_nonfinite))
                bar.set_postfix_str(f"{writer.n_bytes / 2**20:.0f} MiB written", refresh=False)
        writer.finish(plan.manifest, partial(write_tables, plan, model.tokenizer))


def _count_nonfinite(plan: Plan, block: Block, rows: dict[Site, Tensor], allowed: bool) -> dict[Site, int]:
    counts = {}
    for site, values in rows.items():
        bad = ~torch.isfinite(values)
        counts[site] = int(bad.sum())
        if counts[site] and not allowed:
            row = int(bad.any(1).nonzero()[0])
            ends = torch.tensor([len(plan.positions[i]) for i in range(block.first, block.last)]).cumsum(0)
            prompt = plan.prompts[block.first + int(torch.searchsorted(ends, row, right=True))]
            raise UserError(
                f"{site}: {counts[site]} values are NaN or infinite in {plan.dtype}, first in prompt {prompt.id!r}; "
                "store bfloat16 or float32, load the model in another dtype, or pass allow_nonfinite=True"
            )
        if counts[site]:
            log.warning("%s: %d values are NaN or infinite", site, counts[site])
    return counts


class _Runner:
    """Runs blocks of prompts; what each forward pass leaves in `seen` is copied to the host while the next one runs."""

    def __init__(self, model: Model, plan: Plan, seen: dict[Site, Tensor], bar: Any) -> None:
        self.model, self.plan, self.seen, self.bar = model, plan, seen, bar
        self.dtype = DTYPES[plan.dtype]
        self.stop_after = max(site.layer for site in plan.sites)

    def run(self, block: Block) -> dict[Site, Tensor]:
        """The rows [n, d] of a block at each site, in the order of the prompts."""
        plan = self.plan
        rows = {site: torch.empty((block.n, plan.width), dtype=self.dtype) for site in plan.sites}
        starts, at = {}, 0
        for i in range(block.first, block.last):
            starts[i] = at
            at += len(plan.positions[i])
        landing = _Landing()
        with torch.inference_mode():
            for batch in plan.batches(block):
                self._forward(batch, starts, rows, landing)
                self.bar.update(sum(len(plan.ids[i]) for i in batch))
            landing.settle()
        return rows

    def _forward(self, batch: list[int], starts: dict[int, int], rows: dict[Site, Tensor], landing: _Landing) -> None:
        plan = self.plan
        kept = [torch.from_numpy(plan.positions[i]).long() for i in batch]
        row = torch.cat([torch.full_like(k, j) for j, k in enumerate(kept)])
        target = torch.cat([torch.arange(len(k)) + starts[i] for i, k in zip(batch, kept, strict=True)])
        ids, mask = pad([plan.ids[i].tolist() for i in batch], self.model.pad_id, "right")
        picked = self._picked(ids, mask, row, torch.cat(kept))
        if picked is None:  # out of memory; the failed pass is let go before the next one
            torch.cuda.empty_cache()
            if len(batch) == 1:
                raise UserError(f"prompt {plan.prompts[batch[0]].id!r} of {ids.shape[1]} tokens does not fit the "
                                "device's memory; give max_length, fewer sites or another device")  # fmt: skip
            log.warning("out of memory with %d prompts of up to %d tokens; trying half", *ids.shape)
            half = len(batch) // 2
            self._forward(batch[:half], starts, rows, landing)
            self._forward(batch[half:], starts, rows, landing)
            return
        landing.take(rows, target, picked)

    def _picked(self, ids: Tensor, mask: Tensor, row: Tensor, column: Tensor) -> dict[Site, Tensor] | None:
        """The wanted rows of a batch at each site, on their devices; None where the device's memory is full."""
        try:
            self.model.run(ids, mask, stop_after=self.stop_after)
            found = {}
            for site in self.plan.sites:
                h = self.seen[site]
                found[site] = h[row.to(h.device), column.to(h.device)].to(self.dtype)
            return found
        except torch.OutOfMemoryError:
            return None
        finally:
            self.seen.clear()


class _Landing:
    """Copies to the host: at once from the CPU; from a GPU through pinned memory, settled one batch later."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Tensor, Tensor, torch.cuda.Event]] = []

    def take(self, rows: dict[Site, Tensor], target: Tensor, picked: dict[Site, Tensor]) -> None:
        before, self._waiting = self._waiting, []
        for site, values in picked.items():
            if values.device.type != "cuda":
                rows[site].index_copy_(0, target, values.cpu())
                continue
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(values.device))
            self._waiting.append((rows[site], target, host, event))
        self._land(before)

    def settle(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._land(waiting)

    @staticmethod
    def _land(waiting: list[tuple[Tensor, Tensor, Tensor, torch.cuda.Event]]) -> None:
        for rows, target, host, event in waiting:
            event.synchronize()
            rows.index_copy_(0, target, host)
