"""Where a verb runs its model: the options `--engine`, `--address`, `--workers`, `--gpus-per-worker`, `--cpus-per-worker`.

A verb takes the five as parameters of these types, in this order, and opens what they name:

    def verb(..., engine: EngineName = "local", address: Address = None, workers: Workers = None,
             gpus_per_worker: GpusPerWorker = None, cpus_per_worker: CpusPerWorker = None, ...) -> None:
        with engine_of(engine, address, workers, gpus_per_worker, cpus_per_worker) as opened:
            model = load_for(opened, name, dtype=dtype, device=device, backend=backend)
            ...
            result |= opened.about()      # engine, workers, and pieces done again
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import UserError

if TYPE_CHECKING:
    from .engines import Engine
    from .models import Model

EngineName = Annotated[str, typer.Option("--engine", help="local (this process), or ray (many GPUs, many machines)")]
Address = Annotated[str | None, typer.Option(help="of a Ray cluster: auto or HOST:6379 [one is started here]")]
Workers = Annotated[int | None, typer.Option(help="of --engine ray: replicas of the model [all that fit]")]
GpusPerWorker = Annotated[float | None, typer.Option(help="of --engine ray: 0.5, 1, 2, ... [1 where there are GPUs]")]
CpusPerWorker = Annotated[int | None, typer.Option(help="of --engine ray: cores and threads [threads as here]")]


@contextmanager
def engine_of(
    name: str,
    address: str | None = None,
    workers: int | None = None,
    gpus_per_worker: float | None = None,
    cpus_per_worker: int | None = None,
) -> Iterator[Engine]:
    """The engine that the options name; UserError as `workbench.engines.open_engine`, in the words of the options."""
    given = {"--address": address, "--workers": workers, "--gpus-per-worker": gpus_per_worker,
             "--cpus-per-worker": cpus_per_worker}  # fmt: skip
    if name == "local" and (named := [key for key, value in given.items() if value is not None]):
        raise UserError(f"{', '.join(named)}: of --engine ray alone; give that too, or leave {named[0]} out")
    from .engines import open_engine

    with open_engine(name, address=address, workers=workers, gpus_per_worker=gpus_per_worker,
                     cpus_per_worker=cpus_per_worker) as engine:  # fmt: skip
        yield engine


def load_for(engine: Engine, source: str, *, device: str = "auto", backend: str = "hooks", **options: Any) -> Model:
    """The model for an engine: on this machine, or without its weights where others run it.

    device: where the workers have it is the engine's to say; UserError for another.
    """
    from .models import load

    if engine.name == "local":
        return load(source, device=device, backend=backend, **options)
    if device not in ("auto", engine.device):
        raise UserError(f"--device {device}: the workers of --engine {engine.name} compute on {engine.device} "
                        "(--gpus-per-worker says so); leave --device out")  # fmt: skip
    # other backends wrap the module, and look at its weights while they do
    return load(source, device=engine.device if backend == "hooks" else "cpu", backend=backend,
                weights=backend != "hooks", **options)  # fmt: skip
