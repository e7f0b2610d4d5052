"""Batches of a model's work: run by the model at hand, or by replicas of it where an engine holds some."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from .adapters.adapter import Adapter
    from .adapters.blend import Blend
    from .models import Model

Task = Callable[..., Any]
"""called as task(model, data, adapter, **common): one batch, under an adapter or none"""


@contextmanager
def spread_over(engine: Any, *models: Model) -> Iterator[None]:
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
    adapters: Sequence[Adapter | Blend | None] = (None,),
    **common: Any,
) -> Iterator[tuple[int, Any]]:
    """Runs every piece and yields (its number, its result): in order here, as they come in from replicas.

    Args:
        task: "module:function" of a `Task`.
        pieces: (number of its adapter, data) each; data and common values are plain values, arrays or tensors.

    Raises:
        UserError: where replicas would not do what is asked: the model is edited, in this process alone.
    """
    engine = model.engine
    if engine is None or engine.name == "local":
        run = named(task)
        yield from ((i, run(model, data, adapters[k], **common)) for i, (k, data) in enumerate(pieces))
        return
    if model.edited:
        raise UserError("this model is edited inside a `with` block, which its replicas would not see; give the adapter as an "
                        "argument, or leave the engine out")  # fmt: skip
    from .engines import recipe_of

    packed = [packed_adapter(adapter) for adapter in adapters]
    sent = {"task": task, "adapters": packed, "common": common}
    yield from engine.spread(recipe_of(model), "workbench.replicas:run_piece", list(pieces), sent)


def run_piece(
    model: Model, piece: tuple[int, Any], *, task: str, adapters: Sequence[Any], common: Mapping[str, Any]
) -> Any:
    """One piece of `run_batches` on a replica."""
    number, data = piece
    return named(task)(model, data, unpacked_adapter(adapters[number]), **common)


def named(task: str) -> Task:
    """The function of "module:function"."""
    module, _, function = task.partition(":")
    return getattr(importlib.import_module(module), function)


def batch_seed(seed: int, number: int) -> int:
    """The seed of what is drawn in a batch: of the first `seed` itself, of others one drawn from it and their number.

    It belongs to the batch, so that it does not matter who runs it, or after what.

    >>> batch_seed(7, 0), batch_seed(7, 1) != batch_seed(8, 0)
    (7, True)
    """
    return seed if number == 0 else random.Random(f"{seed}/{number}").getrandbits(62)


Packed = dict[str, Any]


def packed_adapter(adapter: Adapter | Blend | None) -> Packed | None:
    """An adapter as plain data: of each adapter its header and the bytes of its safetensors file."""
    from safetensors.torch import save

    from .adapters.adapter import Adapter
    from .adapters.adapter_files import header_and_tensors
    from .adapters.blend import Blend

    if adapter is None:
        return None
    if not isinstance(adapter, Adapter | Blend):
        raise UserError(f"a {type(adapter).__name__} does not travel to replicas of a model; give an Adapter or a Blend")
    parts = list(adapter.adapters) if isinstance(adapter, Blend) else [adapter]
    made = [header_and_tensors(replace(part, meta={})) for part in parts]
    schedules = list(adapter.schedules) if isinstance(adapter, Blend) else None
    return {"parts": [(header, save(tensors)) for header, tensors in made], "schedules": schedules}


def unpacked_adapter(packed: Packed | None) -> Adapter | Blend | None:
    """What `packed_adapter` packed."""
    from safetensors.torch import load

    from .adapters.adapter_files import adapter_of
    from .adapters.blend import Blend

    if packed is None:
        return None
    made = [adapter_of(header, lambda data=data: load(data), Path("adapter")) for header, data in packed["parts"]]
    return made[0] if packed["schedules"] is None else Blend(made, packed["schedules"])
