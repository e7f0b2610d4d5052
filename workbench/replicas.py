"""Batches of a model's work: run by the model at hand, or by replicas of it where an engine holds some."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from .adapters.adapter import Adapter
    from .adapters.blend import Blend
    from .engines import Engine
    from .models import Model


@contextmanager
def spread_over(engine: Engine | None, *models: Model) -> Iterator[None]:
    """Inside the block what `models` do in batches (answers, log-odds, text shifts) is spread over replicas by `engine`.

    The batches are those of a run on one machine and a batch's seed is its own, so that answers and figures are equal
    whatever the engine. None, or the local engine, leaves the models as they are.

    >>> with open_engine("ray", workers=4) as engine, spread_over(engine, model):  # doctest: +SKIP
    ...     answers = model.generate("my_prompts.jsonl")
    """
    before = [model.engine for model in models]
    for model in models:
        model.engine = engine
    try:
        yield
    finally:
        for model, held in zip(models, before, strict=True):
            model.engine = held


def run_batches(
    model: Model,
    task: str,
    pieces: Sequence[tuple[int, Any]],
    adapters: Sequence[Any] = (None,),
    **common: Any,
) -> Iterator[tuple[int, Any]]:
    """Runs every piece and yields (its number, its result): in order here, as they come in from replicas.

    Args:
        task: the "module:function" of one batch, called as task(model, data, adapter, **common).
        pieces: (number of its adapter, data) each; data, common values and results are plain values or arrays.
        adapters: an Adapter, a Blend or None each.

    Raises:
        UserError: where replicas would not do what is asked: the model is edited, in this process alone.
    """
    from .engines import LocalEngine

    engine = model.engine or LocalEngine()
    if engine.name != "local":
        check_device(model, engine)
        if model.edited:
            raise UserError("this model is edited inside a `with` block, which its replicas would not see; give the adapter "
                            "as an argument, or leave the engine out")  # fmt: skip
        adapters = [packed_adapter(adapter) for adapter in adapters]
    sent = {"task": task, "adapters": adapters, "common": common}
    yield from engine.spread(model, "workbench.replicas:run_piece", pieces, common=sent)


def check_device(model: Model, engine: Engine) -> None:
    """Raises UserError for replicas on another kind of device than the model: their bits would be others."""
    kind = engine.device.replace("map", "cuda")
    if kind and model.device.type != kind:
        raise UserError(f"the workers compute on {kind} and {model.name} is on {model.device.type}, so that answers and "
                        f"figures would be others; load it on {kind}, or choose the workers' device (--gpus-per-worker 0 is "
                        "the CPU)")  # fmt: skip


def run_piece(
    model: Model, piece: tuple[int, Any], *, task: str, adapters: Sequence[Any], common: Mapping[str, Any]
) -> Any:
    """One piece of `run_batches`, on a replica or on the model at hand."""
    from .engines.engine import task_named

    number, data = piece
    adapter = adapters[number]
    return task_named(task)(model, data, unpacked_adapter(adapter) if isinstance(adapter, dict) else adapter, **common)


def noted(engine: Engine | None) -> dict[str, Any]:
    """What is said of who made a result, beside the result, which is the same for all; nothing of the local engine."""
    return {} if engine is None or engine.name == "local" else engine.about()


def batch_seed(seed: int, number: int) -> int:
    """The seed of what is drawn in a batch: of the first `seed` itself, of others one drawn from it and their number.

    It belongs to the batch, so that it does not matter who runs it, or after what.

    >>> batch_seed(7, 0), batch_seed(7, 1) != batch_seed(8, 0)
    (7, True)
    """
    return seed if number == 0 else random.Random(f"{seed}/{number}").getrandbits(62)


Packed = dict[str, Any]


def packed_adapter(adapter: Any) -> Packed | None:
    """An adapter as plain data: of each adapter its header and the bytes of its safetensors file."""
    from safetensors.torch import save

    from .adapters.adapter import Adapter
    from .adapters.adapter_files import header_and_tensors
    from .adapters.blend import Blend

    if adapter is None:
        return None
    if not isinstance(adapter, Adapter | Blend):
        raise UserError(
            f"a {type(adapter).__name__} does not travel to replicas of a model; give an Adapter or a Blend"
        )
    parts = list(adapter.adapters) if isinstance(adapter, Blend) else [adapter]
    made = [header_and_tensors(replace(part, meta={})) for part in parts]
    schedules = list(adapter.schedules) if isinstance(adapter, Blend) else None
    return {"parts": [(header, save(tensors)) for header, tensors in made], "schedules": schedules}


def unpacked_adapter(packed: Packed) -> Adapter | Blend:
    """What `packed_adapter` packed."""
    from safetensors.torch import load

    from .adapters.adapter_files import adapter_of
    from .adapters.blend import Blend

    made = [adapter_of(header, partial(load, data), Path("adapter")) for header, data in packed["parts"]]
    return made[0] if packed["schedules"] is None else Blend(made, packed["schedules"])
