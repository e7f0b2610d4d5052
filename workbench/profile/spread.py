"""A store profiled by an engine: its blocks are computed and written by the workers, and taken over in their order."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import make_parent
from ..engines import LocalEngine
from ..errors import UserError
from ..interrupts import Stopped, first_interrupt_noted
from ..progress import progress
from ..store.locks import claim_shared
from ..store.parts import FolderParts
from ..store.remote import UrlParts, numbers_left
from ..store.writer import StoreWriter, partial_of
from .pieces import borrow_anatomy, piece_of, settings_of
from .plan import Plan, make_plan
from .profile import check_room
from .tables import write_tables
from .told import tell

if TYPE_CHECKING:
    from ..engines import Engine
    from ..models import Model

log = logging.getLogger("workbench")
TASK = "workbench.profile.pieces:write_piece"


def spread_store(
    model: Model, plan: Plan, path: Path, engine: Engine | None, *, overwrite: bool, allow_nonfinite: bool
) -> None:
    """Makes the store at `path`; the bytes are those of one process, whatever the engine (this process unless given)."""
    engine = engine or LocalEngine()
    check_device(model, engine)
    writer = StoreWriter(path.absolute(), plan.hash, overwrite=overwrite)
    try:
        with writer:
            parts = FolderParts(writer.partial, plan.hash)
            mark = parts.make()
            there = parts.entries()
            _take(writer, parts, there, range(len(plan.blocks)))
            left = numbers_left([*range(len(writer.blocks)), *there], len(plan.blocks))
            if len(left) < len(plan.blocks):
                log.info("%s: going on after %d of %d blocks", path, len(plan.blocks) - len(left), len(plan.blocks))
            common = {"settings": settings_of(plan), "place": str(writer.partial), "mark": mark,
                      "allow_nonfinite": allow_nonfinite}  # fmt: skip
            check_room(path.absolute().parent, plan.n_bytes - writer.n_bytes - sum(e["bytes"] for e in there.values()))
            begin = time.monotonic()
            with first_interrupt_noted() as stop, _bar(model, plan, left) as bar:
                made = engine.spread(model, TASK, (piece_of(plan, i) for i in left), common=common, stop=stop)
                for index, entry in made:
                    there[left[index]] = entry
                    bar.update(plan.tokens_of(plan.blocks[left[index]]))
                    _take(writer, parts, there, range(len(writer.blocks), len(plan.blocks)))
            tell(model, plan, [plan.blocks[i] for i in left], time.monotonic() - begin)
            writer.finish(plan.manifest, partial(write_tables, plan, model.tokenizer))
    except Stopped:
        raise Stopped("stopped: what is finished is kept; run the same again to go on") from None


def profile_to_url(
    model: Model, prompts: Any, url: str, *, engine: Engine | None = None, overwrite: bool = False,
    allow_nonfinite: bool = False, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """`profile_model` to a URL that fsspec reaches, such as s3://bucket/profile; the manifest of the store there.

    options: sites, tokens, batch_tokens, dtype, max_length, stride. `workbench stores fetch URL FOLDER` gives the store, with
    the bytes that a profile into a folder has. Two profiles at once to one URL are not kept apart. Raises UserError as
    `profile_model` does, and where the URL cannot be reached.
    """
    if engine is not None and model.is_skeleton:
        borrow_anatomy(model, engine, options.get("sites"))
    plan = make_plan(model, prompts, **options)
    return spread_url(model, plan, url, engine, overwrite=overwrite, allow_nonfinite=allow_nonfinite)


def spread_url(
    model: Model, plan: Plan, url: str, engine: Engine | None, *, overwrite: bool, allow_nonfinite: bool
) -> dict[str, Any]:
    """Makes the store at a URL; its manifest, which is written last. Run again it goes on where it was."""
    engine = engine or LocalEngine()
    check_device(model, engine)
    parts = UrlParts(url, plan.hash)
    parts.begin(overwrite=overwrite)
    there = parts.entries()
    left = numbers_left(there, len(plan.blocks))
    if there:
        log.info("%s: going on after %d of %d blocks", url, len(there), len(plan.blocks))
    common = {"settings": settings_of(plan), "place": url, "mark": None, "allow_nonfinite": allow_nonfinite}
    begin = time.monotonic()
    try:
        with first_interrupt_noted() as stop, _bar(model, plan, left) as bar:
            made = engine.spread(model, TASK, (piece_of(plan, i) for i in left), common=common, stop=stop)
            for index, entry in made:
                there[left[index]] = entry
                bar.update(plan.tokens_of(plan.blocks[left[index]]))
    except Stopped:
        raise Stopped("stopped: what is finished is kept; run the same again to go on") from None
    tell(model, plan, [plan.blocks[i] for i in left], time.monotonic() - begin)
    return parts.commit(plan.manifest, there, partial(write_tables, plan, model.tokenizer))


def spread_part(model: Model, plan: Plan, path: Path, part: tuple[int, int], *, allow_nonfinite: bool) -> int:
    """Computes the blocks i of a plan with i % n == k, for part (k, n), beside the store; how many there are.

    Any scheduler can run the parts, at once or one after another, with no word between them; the same profile without a
    part takes them over and computes what is missing. What is there already is not done again.
    """
    k, n = part
    path = Path(os.path.realpath(path.absolute()))
    make_parent(path)
    mine = [i for i in range(len(plan.blocks)) if i % n == k]
    with claim_shared(partial_of(path), path):
        parts = FolderParts(partial_of(path), plan.hash)
        parts.folder.mkdir(parents=True, exist_ok=True)
        left = [i for i in mine if i not in parts.entries()]
        common = {"settings": settings_of(plan), "place": str(parts.partial), "mark": None,
                  "allow_nonfinite": allow_nonfinite}  # fmt: skip
        with first_interrupt_noted() as stop, _bar(model, plan, left) as bar:
            for index, _ in LocalEngine().spread(
                model, TASK, (piece_of(plan, i) for i in left), common=common, stop=stop
            ):
                bar.update(plan.tokens_of(plan.blocks[left[index]]))
    return len(mine)


def check_device(model: Model, engine: Engine) -> None:
    """Raises UserError for a plan made for other devices than the workers have: its bits would be others."""
    kind = engine.device.replace("map", "cuda")
    if kind and model.device.type != kind:
        raise UserError(f"the workers compute on {kind} and the model was loaded on {model.device.type}; load it with "
                        f"weights=False, device={engine.device!r}, which needs no such device here")  # fmt: skip


def _take(writer: StoreWriter, parts: FolderParts, there: dict[int, dict[str, Any]], numbers: range) -> None:
    """Takes over the blocks that come next, as far as they are there."""
    for number in numbers:
        if number < len(writer.blocks):
            continue
        if number not in there:
            return
        writer.adopt(parts.shard(number), there.pop(number))
        parts.forget(number)


@contextmanager
def _bar(model: Model, plan: Plan, left: list[int]) -> Iterator[Any]:
    before = plan.n_tokens - sum(plan.tokens_of(plan.blocks[i]) for i in left)
    desc = f"profiling {Path(model.name).name}"
    with progress(total=plan.n_tokens, desc=desc, unit="tok", initial=before, scale=True) as bar:
        yield bar
