"""What an engine does: it runs a task for every piece of some work on a replica of a model, wherever that may be."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ..bundled import PREFIX
from ..errors import UserError

if TYPE_CHECKING:
    from ..interrupts import Asked
    from ..models import Model

NAMES = ("local", "ray")
VERSIONS = ("workbench", "torch", "transformers", "tokenizers", "safetensors", "numpy")
"""packages that the bits of a result hang on, so that the workers must have the driver's"""


@dataclass(frozen=True)
class Recipe:
    """What a worker needs to load the same model as the driver; plain data.

    Fields:
        source: a hub id, `bundled:NAME`, or the absolute path of a folder that the workers see too.
        device: `auto`, `cpu`, `cuda`, or `map` for one replica over several GPUs.
        fingerprint: the `fingerprint_id` that it must have; a worker refuses another model.
        threads: of torch on a CPU. They are part of what is fixed: how a sum is cut among threads can change its bits.
        versions: of `VERSIONS`, on the driver; a worker refuses to run with others.
    """

    source: str
    revision: str = ""
    dtype: str = "auto"
    device: str = "auto"
    blocks: str | None = None
    backend: str = "hooks"
    fingerprint: str = ""
    threads: int = 0
    versions: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, model: Model, device: str | None = None) -> Recipe:
        """The recipe of a loaded model; UserError for one that was made in memory, which no other process can load."""
        import torch

        from ..models import DTYPES

        if model.folder is None:
            raise UserError(f"{model.name} was made in memory, and a worker loads its model from a folder or the hub: save "
                            "it (model.module.save_pretrained(folder), and its tokenizer), load that, or use the local "
                            "engine")  # fmt: skip
        plain = model.name.startswith(PREFIX) or not Path(model.name).expanduser().is_dir()
        dtype = str(model.dtype).removeprefix("torch.")
        return cls(
            source=model.name if plain else str(model.folder.absolute()), revision=model.revision,
            dtype=dtype if dtype in DTYPES else "auto", device=device or model.device.type, blocks=model.blocks_path,
            backend=model.backend.name, fingerprint=model.fingerprint_id, threads=torch.get_num_threads(),
            versions=tuple((name, version(name)) for name in VERSIONS),
        )  # fmt: skip

    def on(self, device: str, threads: int | None = None) -> Recipe:
        """The same for workers of another kind."""
        return replace(self, device=device, threads=threads or self.threads)

    def load(self) -> Model:
        """Loads the model; UserError where it cannot be, or is another than the one that was meant."""
        from ..models import load

        model = load(self.source, dtype=self.dtype, device=self.device, revision=self.revision or None,
                     blocks=self.blocks, backend=self.backend)  # fmt: skip
        if self.fingerprint and model.fingerprint_id != self.fingerprint:
            raise UserError(f"{self.source} is another model here (fingerprint {model.fingerprint_id}) than on the driver "
                            f"({self.fingerprint}); give every machine the same files, or a hub id and its "
                            "revision")  # fmt: skip
        return model


@runtime_checkable
class Engine(Protocol):
    """Runs tasks on replicas of a model.

    Attributes:
        name: of `NAMES`.
        workers: how many pieces are done at a time.
        redone: pieces that had to be done again because their worker was lost.
        device: where the replicas are: `cpu`, `cuda` or `map`; empty where they are wherever the given model is.
    """

    name: str
    workers: int
    redone: int
    device: str

    def spread(
        self, model: Model | Recipe | None, task: str, pieces: Iterable[Any], *, common: Mapping[str, Any] | None = None,
        stop: Asked | None = None,
    ) -> Iterator[tuple[int, Any]]:  # fmt: skip
        """Runs `task(model, piece, **common)` for every piece and yields (index of the piece, result) as they come in.

        model: a `Model`, the recipe of one, or None for tasks that need none (they are given None).
        task: a function by its dotted path, `module:function`, so that nothing but data is sent.
        pieces: taken one by one, as workers get free; they, `common` and the results are plain
            data, numpy arrays (a worker may not write to those that it is given) or tensors on the CPU.
        stop: asked between pieces; raises its `Stopped`. Work that was begun is then dropped.
        A piece whose worker dies is done again on another one, `ATTEMPTS` times at most. What a task raises is raised
        here, as on one machine. One spread at a time. Raises UserError for a model that the workers cannot load.
        """
        ...

    def about(self) -> dict[str, Any]:
        """What a result says of how it was made: engine, workers, and pieces done again."""
        ...


def task_named(path: str) -> Callable[..., Any]:
    """The function at `module:function`.

    >>> task_named("workbench.hashes:short_hash")([1])
    '080a9ed42855'
    """
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def in_order(results: Iterable[tuple[int, Any]]) -> Iterator[Any]:
    """The results of a spread in the order of their pieces, each as soon as those before it are there.

    >>> list(in_order([(1, "b"), (0, "a"), (2, "c")]))
    ['a', 'b', 'c']
    """
    waiting: dict[int, Any] = {}
    due = 0
    for index, result in results:
        waiting[index] = result
        while due in waiting:
            yield waiting.pop(due)
            due += 1


@contextmanager
def open_engine(
    name: str = "local",
    *,
    address: str | None = None,
    workers: int | None = None,
    gpus_per_worker: float | None = None,
    cpus_per_worker: int | None = None,
) -> Iterator[Engine]:
    """An engine for the time of a block: `local` (this process, the model at hand), or `ray`.

    address: of a Ray cluster (`auto`, `HOST:6379`); one of this machine alone is started unless given.
    workers: replicas of the model at most; as many as the cluster has room for unless given.
    gpus_per_worker: 1 where the cluster has GPUs unless given; a replica is spread over more than one (`device="map"`).
    cpus_per_worker: kept free for each, and the threads that it computes with; unless given it computes with as many as
        this process would (`OMP_NUM_THREADS`), so that it gives the same bits.
    Raises UserError for an unknown name, for options that the local engine does not have, where Ray is not installed, and
    for a cluster that cannot be reached or has no room.

    >>> with open_engine() as engine:
    ...     engine.about()
    {'engine': 'local', 'workers': 1, 'redone': 0}
    """
    if name not in NAMES:
        raise UserError(f"unknown engine {name!r}; allowed: {', '.join(NAMES)}")
    given = {"address": address, "workers": workers, "gpus_per_worker": gpus_per_worker,
             "cpus_per_worker": cpus_per_worker}  # fmt: skip
    if name == "local":
        if named := [key for key, value in given.items() if value is not None]:
            raise UserError(f"{', '.join(named)}: of the engine ray alone, and this is the local one; give engine='ray' "
                            "(--engine ray)")  # fmt: skip
        from .local import LocalEngine

        yield LocalEngine()
        return
    from .ray import RayEngine

    with RayEngine.opened(**given) as engine:  # type: ignore[arg-type]
        yield engine
