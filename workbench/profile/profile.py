"""Model x prompts -> Store: the activations at chosen sites and tokens, streamed to disk and resumable."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UserError
from ..interrupts import Stopped, first_interrupt_noted
from ..progress import progress
from ..sites import Site
from ..store import Store
from ..store.checks import DTYPES
from ..store.parts import parts_of
from ..store.writer import StoreWriter
from ..tokens import Policy
from .pieces import borrow_anatomy
from .plan import Plan, make_plan
from .run import BlockRunner, landed, refuse_nonfinite
from .tables import write_tables
from .told import tell

if TYPE_CHECKING:
    from ..engines import Engine
    from ..models import Model

log = logging.getLogger("workbench")


def profile_model(
    model: Model,
    prompts: Any,
    out: str | Path | None = None,
    *,
    sites: Sequence[Site | str | int] | None = None,
    tokens: Policy = "last",
    batch_tokens: int = 8192,
    dtype: str = "float32",
    overwrite: bool = False,
    max_length: int | None = None,
    stride: int | None = None,
    allow_nonfinite: bool = False,
    engine: Engine | None = None,
) -> Store:
    """Runs the prompts through the model up to the last wanted site, and keeps the rows asked for in a store at `out`.

    prompts: a PromptSet, or whatever `PromptSet.load` reads.
    out: the folder of the store; None keeps it in a temporary folder that goes when the store does.
    sites: `Site`s or their names; every `resid_post` unless given.
    tokens: `last` (the last prompt token), `all`, `first:n`, `last:n`, `every:n`, `response`, `assistant`, `user`,
        `spans[:KEY]`, or a function of a `tokens.Token`; see `tokens.choose`. Special tokens are left out of all but
        `last`, unless `+special` is appended.
    batch_tokens: the most tokens, padding included, in one forward pass; the result depends on it by float noise only.
    dtype: of the store: float32, float16, bfloat16, or auto (the model's).
    max_length: longer prompts are cut, the assistant header kept; the model's context unless given.
    stride: longer prompts are not cut but run as windows of max_length tokens, each `stride` tokens after the one
        before and with the prompt's BOS again; every token's row comes from the first window that holds it, so that a
        later token has at least max_length - stride tokens (BOS among them) before it. Positions and spans are the
        prompt's. A chat is cut into windows like any text, after its template.
    allow_nonfinite: NaN and Inf are refused unless True; each shard's manifest entry counts them.
    engine: of `workbench.engines.open_engine`: its workers compute the blocks and write them to the folder, which all of
        them must see. The bytes are those of one process. The model need not hold its weights (`load(weights=False)`).

    A run that was killed and is started again with the same arguments goes on where it was, and ends with the same
    bytes. The first Ctrl-C ends after the batch that runs, with the finished blocks kept. Where the device's memory
    runs out, the batch that failed and all after it run with half as many tokens at a time: the rows then differ by float
    noise from those of the planned batching, and a run that was stopped after that and resumed begins with whole batches
    again, so that its bytes are those of the other only if memory runs out nowhere.
    Raises UserError for bad arguments, for no prompts, for a prompt of no tokens, for values that are not finite, and
    for a folder that exists (unless `overwrite`), cannot be written, or is full; Stopped, a KeyboardInterrupt.
    """
    if engine is not None and model.is_skeleton:
        borrow_anatomy(model, engine, sites)
    plan = make_plan(model, prompts, sites=sites, tokens=tokens, batch_tokens=batch_tokens, dtype=dtype,
                     max_length=max_length, stride=stride)  # fmt: skip
    _warn_of_rounding(model, plan)
    temporary = Path(tempfile.mkdtemp(prefix="workbench-")) if out is None else None
    try:
        path = Path(out).expanduser() if out is not None else Path(temporary or "") / "profile"
        if (engine is None or engine.name == "local") and not parts_of(path, plan.hash):
            _run(model, plan, path, overwrite, allow_nonfinite, keeps=out is not None)
        else:
            from .spread import spread_store

            spread_store(model, plan, path, engine, overwrite=overwrite, allow_nonfinite=allow_nonfinite)
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Store.open(path).keep_until_closed(temporary)


def _run(model: Model, plan: Plan, path: Path, overwrite: bool, allow_nonfinite: bool, keeps: bool) -> None:
    writer = StoreWriter(path, plan.hash, overwrite=overwrite)
    try:
        with writer:
            if writer.blocks:
                log.info("%s: going on after %d of %d blocks", path, len(writer.blocks), len(plan.blocks))
            check_room(path.parent, plan.n_bytes - writer.n_bytes)
            _write_blocks(model, plan, writer, allow_nonfinite)
            writer.finish(plan.manifest, partial(write_tables, plan, model.tokenizer))
    except Stopped:
        kept = f"{len(writer.blocks)} of {len(plan.blocks)} blocks are kept; run the same again to go on"
        raise Stopped(f"stopped: {kept if keeps else 'nothing is kept of a profile without a folder'}") from None


def _write_blocks(model: Model, plan: Plan, writer: StoreWriter, allow_nonfinite: bool) -> None:
    done = len(writer.blocks)
    before = sum(plan.tokens_of(block) for block in plan.blocks[:done])
    bar = progress(
        total=plan.n_tokens, desc=f"profiling {Path(model.name).name}", unit="tok", initial=before, scale=True
    )
    begin = time.monotonic()
    with first_interrupt_noted() as stop, bar:
        runner = BlockRunner(model, plan, bar, stop)
        for number, rows, nonfinite in landed(runner, range(done, len(plan.blocks))):
            if any(nonfinite.values()):
                refuse_nonfinite(plan, number, rows, nonfinite, allow_nonfinite)
            writer.write(rows, nonfinite)
            bar.set_postfix_str(f"{writer.n_bytes / 2**20:.0f} MiB on disk", refresh=False)
    tell(model, plan, plan.blocks[done:], time.monotonic() - begin)


def check_room(folder: Path, needed: int) -> None:
    """Raises UserError where a disk has less room than that."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{folder} has {free / 2**20:.1f} MiB free and the profile needs {needed / 2**20:.1f} MiB more; "
                        "make room, or choose another folder, fewer sites or tokens, or dtype bfloat16")  # fmt: skip


def _warn_of_rounding(model: Model, plan: Plan) -> None:
    dtype = DTYPES[plan.dtype]
    if dtype.itemsize < 4 and dtype != model.dtype:
        digits = "3 digits" if dtype == torch.float16 else "2 to 3 digits"
        log.warning("the store keeps %s, about %s of each value: moments, R2 and all else that is taken from it are of "
                    "rounded rows; float32 keeps them exact", plan.dtype, digits)  # fmt: skip
