"""Model x prompts -> Moments, accumulated where the model runs: everything linear, with no activation stored."""

from __future__ import annotations

import logging
import os
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..atomic import staged_folder, taken, write_json
from ..errors import UserError
from ..hashes import file_hash, json_hash
from ..interrupts import Stopped, first_interrupt_noted
from ..maps.moment_files import load_moments as load_file
from ..maps.moments import Moments
from ..progress import progress
from ..sites import Site
from ..small_files import plain_file, read_json
from ..store.checks import MOMENTS, MOMENTS_FORMAT
from ..store.leftovers import clear_after
from ..tokens import Policy
from .pieces import borrow_anatomy
from .plan import Block, Plan, make_plan
from .reduction import add_rows, reduced
from .room import check_sums_room
from .room import moments_bytes as moments_bytes
from .run import BlockRunner
from .saved_sums import SavedSums, write_folds
from .told import sums_flops, tell

if TYPE_CHECKING:
    from ..engines import Engine
    from ..models import Model

log = logging.getLogger("workbench")
Pairs = Sequence[tuple[Site | str | int, Site | str | int]]
SAVE_EVERY = 30.0  # seconds
SAVE_SHARE = 20  # and at least so many times what the last save took


def profile_moments(
    model: Model,
    prompts: Any,
    out: str | Path | None = None,
    *,
    sites: Sequence[Site | str | int] | None = None,
    tokens: Policy = "last",
    folds: int = 1,
    pairs: Pairs | None = None,
    seed: int = 0,
    products: torch.dtype = torch.float32,
    batch_tokens: int = 8192,
    max_length: int | None = None,
    stride: int | None = None,
    overwrite: bool = False,
    engine: Engine | None = None,
) -> list[Moments]:
    """The moments of the rows that `profile_model` would store, one for each fold of the prompts; their sum is of all.

    out: a folder of fold-0.safetensors, ... and moments.json (where they are from); a run that was killed goes on
        where its sums were last saved, and ends with the same bytes. None only returns them.
    folds: prompts are dealt into so many equal parts, drawn with `seed`.
    pairs: the two-site cross products to keep, as pairs of sites; None keeps all: L * (L + 1) / 2 matrices for L sites;
        those of each site with itself are always kept, and an empty list keeps no other.
    engine: of `workbench.engines.open_engine`: its workers sum runs of blocks, which are added in a tree of one shape. The
        sums are the same for any number of workers, and those of one process to 1e-12.
    products: dtype of the matrix products, on the model's device; sums are float64. The rows are in the model's dtype.
    Blocks are named like their sites (`resid_post.3`). The other arguments are those of `profile_model`. Raises what
    that does, and UserError for folds that are fewer than 1 or more than the prompts, for a pair of other sites, and for
    sums that do not fit the memory where they are held (see `moments_bytes`).

    >>> total(profile_moments(model, prompts, folds=5)).cov("resid_post.1", "resid_post.2")    # doctest: +SKIP
    """
    if engine is not None and model.is_skeleton:
        borrow_anatomy(model, engine, sites)
    plan = make_plan(model, prompts, sites=sites, tokens=tokens, batch_tokens=batch_tokens, dtype="auto",
                     max_length=max_length, stride=stride, for_store=False)  # fmt: skip
    named = checked_pairs(model, plan, folds, pairs)
    spread = engine is not None and engine.name != "local"
    check_sums_room(torch.device("cpu") if spread else model.device, plan, named, folds, saved=out is not None)
    about = {"folds": folds, "seed": seed, "pairs": named, "products": str(products).removeprefix("torch.")}
    if spread:
        assert engine is not None
        return _spread(model, plan, out, about, engine, overwrite)
    sums = Sums(model, plan, folds, named, seed, products)
    if out is None:
        with first_interrupt_noted() as stop:
            sums.run(stop, None)
        return sums.folds
    path = _free(Path(out).expanduser(), overwrite)
    with SavedSums.locked(path, _key(plan, about), overwrite=overwrite) as saved:
        saved.restore(sums)
        try:
            with first_interrupt_noted() as stop:
                sums.run(stop, saved)
        except Stopped:
            saved.save(sums)
            raise Stopped(f"stopped: {sums.done} of {len(plan.blocks)} blocks are kept; run the same again to go "
                          "on") from None  # fmt: skip
        _finish(sums.folds, plan, path, about, overwrite)
        saved.remove()
    return sums.folds


def _finish(folds: list[Moments], plan: Plan, path: Path, about: dict[str, Any], overwrite: bool) -> None:
    with staged_folder(path, marker=MOMENTS, overwrite=overwrite) as folder:
        files = write_folds(folds, folder)
        write_json(folder / MOMENTS, {**plan.manifest, "format": MOMENTS_FORMAT, "schema": 1, **about, "files": files,
                                      "key": _key(plan, about)})  # fmt: skip


def _key(plan: Plan, about: dict[str, Any]) -> str:
    """What the sums follow from: two runs of the same key may go on with each other's."""
    return json_hash([plan.hash, about])


def _spread(
    model: Model, plan: Plan, out: str | Path | None, about: dict[str, Any], engine: Engine, overwrite: bool
) -> list[Moments]:
    """The same by the workers of an engine; see `reduction`."""
    from .spread import check_device

    check_device(model, engine)
    key, fold_of = _key(plan, about), _dealt(len(plan.prompts), about["folds"], about["seed"])
    with tempfile.TemporaryDirectory(prefix="workbench-") as temporary:
        path = _free(Path(temporary) / "moments" if out is None else Path(out).expanduser().absolute(), overwrite)
        with SavedSums.locked(path, key, overwrite=overwrite) as saved:
            try:
                with first_interrupt_noted() as stop:
                    folds = reduced(model, plan, fold_of, {**about, "key": key}, saved.folder, engine, stop)
            except Stopped:
                raise Stopped("stopped: the sums so far are kept; run the same again to go on") from None
            if out is not None:
                _finish(folds, plan, path, about, overwrite)
            saved.remove()
    return folds


def _free(path: Path, overwrite: bool) -> Path:
    """Where a link leads; UserError where something is there already."""
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    if path.exists() and not overwrite:
        clear_after(path)
        raise taken(path)
    return path


def load_moments(path: str | Path) -> list[Moments]:
    """Reads the folder that `profile_moments` made; UserError where it is none or a file is damaged."""
    path = Path(path).expanduser()
    try:
        about = read_json(path / MOMENTS)
        if about["format"] != MOMENTS_FORMAT:
            raise UserError(f"{path}: its {MOMENTS} is not that of profiled moments (format {MOMENTS_FORMAT!r})")
        hashes = about["files"]
        if about["folds"] != len(hashes):
            raise UserError(f"{path}: its {MOMENTS} says folds {about['folds']!r:.40} and names {len(hashes)} files; profile "
                            "again")  # fmt: skip
        names = [f"fold-{i}.safetensors" for i in range(len(hashes))]
        damaged = [name for name in names if file_hash(plain_file(path / name)) != hashes[name]]
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise UserError(f"{path}: holds no moments that can be read ({err}); make them with `workbench profile "
                        "--moments`") from err  # fmt: skip
    if damaged:
        raise UserError(f"{path}: {', '.join(damaged)} changed since it was written; profile again")
    return [load_file(path / name, named=False) for name in names]


def checked_pairs(model: Model, plan: Plan, folds: int, pairs: Pairs | None) -> list[tuple[str, str]] | None:
    """The pairs by name; UserError for one of other sites, and for folds that the prompts do not make."""
    if not 1 <= folds <= len(plan.prompts):
        raise UserError(f"folds={folds} is not within 1 to {len(plan.prompts)}, the number of prompts")
    return None if pairs is None else [(_name(model, plan, a), _name(model, plan, b)) for a, b in pairs]


def _name(model: Model, plan: Plan, site: Site | str | int) -> str:
    parsed = model.site(site)
    if parsed not in plan.sites:
        raise UserError(f"the pair names {parsed}, which is not profiled; sites: {', '.join(map(str, plan.sites))}")
    return str(parsed)


def _dealt(count: int, folds: int, seed: int) -> np.ndarray:
    """The fold of each prompt."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    found = np.empty(count, dtype=np.int64)
    found[order] = np.arange(count) % folds
    return found


class Sums:
    """The running sums of each fold, after `done` blocks of the plan."""

    def __init__(self, model: Model, plan: Plan, folds: int, pairs: list[tuple[str, str]] | None, seed: int,
                 products: torch.dtype) -> None:  # fmt: skip
        self.model, self.plan, self.pairs, self.products = model, plan, pairs, products
        self.folds, self.done = [self.empty() for _ in range(folds)], 0
        self.fold_of = _dealt(len(plan.prompts), folds, seed)

    def empty(self) -> Moments:
        return Moments(pairs=self.pairs, products=self.products)

    def run(self, stop: Any, saved: SavedSums | None) -> None:
        plan, begun, wait, left = self.plan, time.monotonic(), SAVE_EVERY, self.plan.blocks[self.done :]
        last = begun
        before = sum(plan.tokens_of(block) for block in plan.blocks[: self.done])
        desc = f"moments of {Path(self.model.name).name}"
        with progress(total=plan.n_tokens, desc=desc, unit="tok", initial=before, scale=True) as bar:
            runner = BlockRunner(self.model, plan, bar, stop)
            for block in left:
                self._add(block, runner.run(block))
                self.done += 1
                if saved is not None and (begin := time.monotonic()) - last > wait:
                    saved.save(self)
                    last = time.monotonic()
                    wait = max(SAVE_EVERY, SAVE_SHARE * (last - begin))
        flops = sums_flops(plan, left, self.pairs, self.model.device.type)
        tell(self.model, plan, left, time.monotonic() - begun, flops)

    def _add(self, block: Block, rows: dict[Site, Tensor]) -> None:
        fold = torch.from_numpy(self.fold_of[self.plan.prompts_of(block)])
        add_rows(self.folds, fold, block, rows, self.plan, self.model.device)
