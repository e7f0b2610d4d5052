"""Trains a residual adapter on a frozen model: NoDiReFT, LoReFT, DiReFT or a vector, at the last prompt token or elsewhere."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..atomic import check_free
from ..backends import torch_hooks
from ..errors import UserError
from ..hashes import json_hash
from ..interrupts import Asked, Stopped, first_interrupt_noted
from ..memory import out_of_memory
from ..progress import progress
from ..prompts import PromptSet
from ..sites import Site
from ..work import Lengths, ModelShape, training
from .adapter import Adapter
from .demonstrations import Sample, answer_loss, batches, encode_demonstrations, held_out, in_order
from .trainable import KINDS, Scale, TrainablePart
from .training_state import TrainingState

if TYPE_CHECKING:
    from ..backends.torch_hooks import Where
    from ..models import Model
    from ..store import Store

log = logging.getLogger("workbench")
CHECKPOINT_EVERY = 50
"""optimiser steps from one checkpoint to the next"""


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained adapter and how it came to be: the curve holds (step, loss, size of the delta in spreads).

    validation holds (steps done, loss on the demonstrations held out), where there were any; best_step is the one whose
    parameters the adapter has. steps: those that were made.
    """

    adapter: Adapter
    curve: tuple[tuple[int, float, float], ...]
    seconds: float
    flops: float
    steps: int
    validation: tuple[tuple[int, float], ...] = ()
    best_step: int | None = None


@contextmanager
def frozen(model: Model) -> Iterator[None]:
    """No parameter of the model asks for a gradient inside the block."""
    was = [(p, p.requires_grad) for p in model.module.parameters()]
    try:
        for p, _ in was:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in was:
            p.requires_grad_(flag)


def default_layer(model: Model) -> int:
    """Two thirds of the depth: late enough that what decides a behaviour is there, early enough to be acted on."""
    return 2 * model.n_layers // 3


def _scales(model: Model, prompts: PromptSet, sites: Sequence[Site], profile: Store | None) -> dict[Site, Scale]:
    from ..profile import profile_model

    if profile is not None and profile.fingerprint["weights"] != model.fingerprint["weights"]:
        raise UserError(f"the profile is of {profile.fingerprint['name']}, not of {model.name}; profile this model")
    store = profile or profile_model(model, prompts, sites=sites)
    return {s: Scale.of(store.read(s, dtype=torch.float32)) for s in sites}


def _flops(model: Model, sites: Sequence[Site], tokens: int, length: float) -> float:
    """FLOPs of training on so many tokens, in samples of this length on average."""
    return training(ModelShape.of(model), Lengths.even(tokens, length), sites).flops if tokens else 0.0


@dataclass(frozen=True, eq=False)
class _Objective:
    """What is made small: the answers' loss, and the squared excess of deltas over `max_size` spreads."""

    model: Model
    parts: Mapping[Site, TrainablePart]
    positions: str
    max_size: float
    size_weight: float

    def of(self, batch: list[Sample]) -> tuple[Tensor, Tensor, Tensor]:
        """(loss in nats per token, mean size of the delta in spreads, what is made small) of a batch."""
        sizes: list[Tensor] = []

        def edit(site: Site) -> torch_hooks.Edit:
            def run(h: Tensor, at: Where) -> Tensor:
                keep, part = at.mask(self.positions), self.parts[site]
                delta = part.delta(h) * keep[..., None]
                sizes.append((delta.float().square().sum(-1)[keep] + 1e-12).sqrt() / part.scale.spread)
                return h + delta

            return run

        # the lengths are given: a batch of prompts with answers is not a prompt to its end
        with self.model.edit({s: edit(s) for s in self.parts}, prompt_lengths=[len(p) for p, _ in batch]):
            loss = answer_loss(self.model, batch)
        size = torch.cat([s.to(loss.device) for s in sizes])
        excess = (size - self.max_size).clamp(min=0).square().mean()
        return loss, size.mean(), loss + self.size_weight * excess

    def mean(self, parted: Sequence[list[Sample]]) -> float:
        """What is made small, over samples that are not learnt from: the mean over their answers' tokens."""
        with torch.no_grad():
            found = [(float(self.of(batch)[2]), sum(len(a) for _, a in batch)) for batch in parted]
        return sum(loss * n for loss, n in found) / sum(n for _, n in found)


@dataclass(frozen=True)
class _Plan:
    """How many steps, and what is done between them."""

    steps: int
    learning_rate: float
    every: int
    patience: int | None
    checkpoint: Path | None
    checkpoint_every: int
    key: str

    def rate(self, step: int) -> float:
        """The learning rate of a step: a tenth of the steps up, then down in a straight line."""
        warm = max(self.steps // 10, 1)
        return self.learning_rate * min((step + 1) / warm, max(1e-3, 1 - step / self.steps))

    def over(self, state: TrainingState) -> bool:
        return state.step >= self.steps or (self.patience is not None and state.since_best() >= self.patience)


def train_adapter(
    model: Model,
    demonstrations: Any,
    sites: Sequence[Site | int | str] | Site | int | str,
    *,
    kind: str = "nodireft",
    rank: int = 4,
    positions: str = "last",
    steps: int = 100,
    batch_size: int = 32,
    learning_rate: float = 1e-2,
    profile: Store | None = None,
    max_size: float = 0.4,
    size_weight: float = 10.0,
    validation: Any = 0.0,
    validate_every: int = 10,
    patience: int | None = None,
    seed: int = 0,
    name: str = "",
    checkpoint: str | Path | None = None,
    checkpoint_every: int = CHECKPOINT_EVERY,
) -> Trained:
    """Trains an adapter on demonstrations (prompts with a `response`), the model itself frozen.

    kind: `nodireft` (delta = (h V + b) U), `loreft` and `direft` (arXiv:2404.03592; (h W' + b - h R) R' and
        (h W' + b) R', R orthonormal), `vector` (a constant).
    positions: `last`, `prompt`, `all`, `first:n`, `last:n`, `generated` (the answer's tokens), or several joined by +.
    profile: a profile of the model with these sites, the scale of everything; unless given, the demonstrations' own
        prompts are profiled. Deltas longer than `max_size` spreads of it cost `size_weight` times the squared excess: an
        adapter trained without restraint writes far outside of what the profile saw, and its paste does anything but
        what it should.
    validation: the share of the demonstrations that is held out, or a set of others. Every `validate_every` steps they
        are scored by what training makes small, and the adapter is that of the best score; `patience`: so many scores
        without a better one end the training before its `steps`.
    checkpoint: a file from which a training that was stopped goes on; it is written every `checkpoint_every` steps and
        at a Ctrl-C, and left for the caller to remove. The result is, bit for bit, that of a training never stopped.

    The recipe and the learning curve are in the adapter's meta, under `training`. The result does not depend on
    anything but the arguments. Raises UserError for unknown kinds and sites, for a profile of another model, for
    demonstrations without a response or too short for the positions, and for a loss that is not finite; Stopped, a
    KeyboardInterrupt, at a Ctrl-C where there is a checkpoint.
    """
    recipe = {"kind": kind, "rank": rank, "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate,
              "max_size": max_size, "size_weight": size_weight, "validate_every": validate_every, "patience": patience,
              "seed": seed}  # fmt: skip
    _check(model, recipe, validation, checkpoint_every)
    listed = [sites] if isinstance(sites, (Site, int, str)) else list(sites)
    where = [model.site(s) for s in listed]
    whole = PromptSet.load(demonstrations)
    learnt, apart = held_out(whole, validation, seed)
    pairs = encode_demonstrations(model, learnt, positions)
    if not pairs:
        raise UserError("there are no demonstrations to train on; give prompts with a 'response' each")
    judged = in_order(encode_demonstrations(model, apart, positions), batch_size) if apart is not None else []
    scales = _scales(model, learnt, where, profile)
    generator = torch.Generator().manual_seed(seed)
    width = 1 if kind == "vector" else rank
    parts = {s: TrainablePart(kind, scales[s], width, generator).to(model.device) for s in where}
    objective = _Objective(model, parts, positions, max_size, size_weight)
    optimizer = torch.optim.Adam([p for part in parts.values() for p in part.parameters()], lr=learning_rate)
    state = TrainingState({str(s): part for s, part in parts.items()}, optimizer)
    path, key = None if checkpoint is None else Path(checkpoint), ""
    if path is not None:
        sets = [learnt.full_hash, apart.full_hash if apart is not None else None]
        means = [[str(s), scale.mean.tolist(), scale.spread] for s, scale in scales.items()]
        key = json_hash([recipe, positions, sets, means, model.fingerprint_id])
        if path.exists() and state.resume(path, key):
            log.info("%s: going on after %d of %d steps", path, state.step, steps)
    plan = _Plan(steps, learning_rate, validate_every, patience, path, checkpoint_every, key)
    with frozen(model), first_interrupt_noted() if path is not None else nullcontext(Asked()) as stop:
        _train(state, objective, plan, batches(pairs, batch_size, seed), judged, stop, name or kind)
    made, best = state.step, state.best_step
    length = sum(len(p) + len(a) for p, a in pairs) / len(pairs)
    state.restore_best()
    said = {**recipe, "positions": positions, "steps_made": made, "best_step": best, "demonstrations": len(pairs),
            "held_out": sum(map(len, judged)), "curve": state.curve, "validation": state.validation}  # fmt: skip
    meta = {"kind": kind, "seed": seed, "training": {k: v for k, v in said.items() if v is not None}}
    adapter = Adapter({s: part.frozen() for s, part in parts.items()}, positions, name=name, base=model.fingerprint,
                      meta=meta)  # fmt: skip
    return Trained(adapter, tuple(state.curve), state.seconds, _flops(model, where, state.tokens, length), made,
                   tuple(state.validation), best)  # fmt: skip


def _check(model: Model, recipe: Mapping[str, Any], validation: Any, checkpoint_every: int) -> None:
    """UserError for arguments that say nothing."""
    if recipe["kind"] not in KINDS:
        raise UserError(f"unknown adapter kind {recipe['kind']!r}; allowed: {', '.join(KINDS)}")
    if not 0 < recipe["rank"] <= model.width:
        raise UserError(f"rank {recipe['rank']} is not between 1 and the width {model.width}")
    counts = {**recipe, "checkpoint_every": checkpoint_every}
    for key in ("steps", "batch_size", "validate_every", "patience", "checkpoint_every"):
        if counts[key] is not None and counts[key] < 1:
            raise UserError(f"{key} {counts[key]} is out of range; give at least 1")
    if not 0 < recipe["learning_rate"] < math.inf:
        raise UserError(
            f"learning_rate {recipe['learning_rate']} is out of range; give a number above 0, 0.01 is usual"
        )
    if recipe["patience"] is not None and isinstance(validation, (int, float)) and not validation:
        raise UserError("patience needs demonstrations to validate on; give validation, a share of them such as 0.1")


def _train(
    state: TrainingState,
    objective: _Objective,
    plan: _Plan,
    stream: Iterator[list[Sample]],
    judged: Sequence[list[Sample]],
    stop: Asked,
    name: str,
) -> None:
    """Goes on with a training to its end."""
    for _ in range(state.step):
        next(stream)  # the order of the data is drawn again
    bar = progress(total=plan.steps, desc=f"training {name}", unit="step", initial=state.step)
    with bar:
        while not plan.over(state):
            began = time.perf_counter()
            batch = next(stream)
            try:
                _step(state, objective, plan, batch)
            except (MemoryError, RuntimeError) as err:
                if not out_of_memory(err):
                    raise
                raise UserError(f"step {state.step} of the training runs out of memory with {len(batch)} demonstrations at "
                                "once; give a smaller batch_size, shorter demonstrations or another device, and run "
                                "again") from err  # fmt: skip
            if judged and (state.step % plan.every == 0 or state.step == plan.steps):
                state.validated(objective.mean(judged))
            state.seconds += time.perf_counter() - began
            bar.update(1)
            if plan.checkpoint is not None:
                if stop.asked or plan.over(state) or state.step % plan.checkpoint_every == 0:
                    state.save(plan.checkpoint, plan.key)
                if stop.asked:
                    raise Stopped(f"stopped: {state.step} of {plan.steps} steps are kept; run the same again to go on")


def _step(state: TrainingState, objective: _Objective, plan: _Plan, batch: list[Sample]) -> None:
    """One optimiser step."""
    step = state.step
    for group in state.optimizer.param_groups:
        group["lr"] = plan.rate(step)
    loss, size, total = objective.of(batch)
    if not math.isfinite(total.item()):
        raise UserError(
            f"the loss of step {step} is {total.item()}; lower the learning rate, or load the model in float32"
        )
    total.backward()
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.tokens += sum(len(p) + len(a) for p, a in batch)
    if step % 10 == 0 or state.step == plan.steps:
        state.curve.append((step, loss.item(), size.item()))


def train_into(out: str | Path, model: Model, *args: Any, overwrite: bool = False, **options: Any) -> Trained:
    """`train_adapter`, saved in the folder `out`; stopped and called again with the same arguments, it goes on.

    The checkpoint lies beside `out` and goes once the adapter is there. Raises UserError, before anything is trained,
    where `out` exists, unless `overwrite`.
    """
    path = Path(out).expanduser()
    checkpoint = check_target(path, overwrite=overwrite)
    trained = train_adapter(model, *args, checkpoint=checkpoint, **options)
    trained.adapter.save(path, overwrite=overwrite)
    checkpoint.unlink(missing_ok=True)
    return trained


def check_target(path: Path, *, overwrite: bool) -> Path:
    """The checkpoint of a training into `path`; UserError where that exists, unless `overwrite`."""
    checkpoint = path.parent / f".{path.name}.training.safetensors"
    if _written(checkpoint) <= _written(path / "adapter.json"):  # killed once the adapter was there
        checkpoint.unlink(missing_ok=True)
    check_free(path, marker="adapter.json", overwrite=overwrite)
    return checkpoint


def _written(file: Path) -> int:
    return file.stat().st_mtime_ns if file.exists() else 0
