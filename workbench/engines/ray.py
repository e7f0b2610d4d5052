"""The engine of many machines: actors of Ray hold one replica of the model each, and take the next piece when they are free."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .cluster import connected
from .engine import Recipe
from .replica import Line, Replica

if TYPE_CHECKING:
    from ..interrupts import Asked
    from ..models import Model

log = logging.getLogger("workbench")
ATTEMPTS = 3
"""of one piece, before its worker's death is taken to be its own fault"""
JOINED = 120.0
"""seconds that a cluster of many machines is given to come together"""
TICK = 0.2
"""seconds between two looks at whether a stop was asked for"""
PATIENCE = 30.0
"""seconds after which a worker that the cluster has not started yet is told of"""


@dataclass
class _Sent:
    index: int
    piece: Any
    worker: Any


class RayEngine:
    """See `engine.Engine`; made by `RayEngine.opened`."""

    name = "ray"

    def __init__(self, ray: Any, workers: int, device: str, gpus: float, cpus: int, threads: int | None) -> None:
        self.workers, self.device, self.redone = workers, device, 0
        self._ray, self._threads, self._busy = ray, threads, False
        # a lost actor is replaced here, so that what it did is known to be lost
        self._actor = ray.remote(Replica).options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD"
        )
        self._free: list[Any] = []
        self._starting: dict[Any, float] = {}
        self._told: set[Line] = set()

    @classmethod
    @contextmanager
    def opened(
        cls, address: str | None = None, workers: int | None = None, gpus_per_worker: float | None = None,
        cpus_per_worker: int | None = None,
    ) -> Iterator[RayEngine]:  # fmt: skip
        """The engine for the time of a block; see `open_engine` for the arguments and errors."""
        for name, value in (("workers", workers), ("cpus_per_worker", cpus_per_worker)):
            if value is not None and value < 1:
                raise UserError(f"{name}={value}: give at least 1")
        if gpus_per_worker is not None and (gpus_per_worker < 0 or (gpus_per_worker > 1 and gpus_per_worker % 1)):
            raise UserError(
                f"gpus_per_worker={gpus_per_worker}: give 0, a share of one GPU such as 0.5, or a whole number"
            )
        with connected(address) as ray:
            nodes = _nodes(ray)
            gpus = float(any(node.get("GPU", 0) for node in nodes)) if gpus_per_worker is None else gpus_per_worker
            cpus = cpus_per_worker or 1
            if address is not None and workers is not None:
                nodes = _joined(ray, workers, gpus, cpus)
            device = "cpu" if not gpus else "cuda" if gpus <= 1 else "map"
            count = workers or _room(nodes, gpus, cpus if gpus or cpus_per_worker else _own_threads()) or 1
            _check_room(count, _room(nodes, gpus, cpus), gpus, cpus)
            engine = cls(ray, count, device, gpus, cpus, cpus_per_worker)
            with _terminated_as_interrupted():
                try:
                    yield engine
                finally:
                    engine.close()

    def spread(
        self, model: Model | Recipe | None, task: str, pieces: Iterable[Any], *, common: Mapping[str, Any] | None = None,
        stop: Asked | None = None,
    ) -> Iterator[tuple[int, Any]]:  # fmt: skip
        """See `engine.Engine.spread`."""
        recipe = model if isinstance(model, Recipe | None) else Recipe.of(model)
        here = recipe and recipe.on(self.device, self._threads)
        fixed = self._ray.put(here), task, self._ray.put(dict(common or {}))
        assert not self._busy, "one spread at a time"
        self._busy, sent, left, again = True, dict[Any, _Sent](), enumerate(pieces), deque[tuple[int, Any]]()
        lost = Counter[int]()

        def send() -> None:
            while len(sent) < self.workers and (due := again.popleft() if again else next(left, None)):
                worker = self._free.pop() if self._free else self._new()
                recipe_ref, name, common_ref = fixed
                sent[worker.run.remote(recipe_ref, name, due[1], common_ref)] = _Sent(*due, worker)

        try:
            send()
            while sent:
                done, _ = self._ray.wait(list(sent), num_returns=1, timeout=TICK)
                if stop is not None:
                    stop.check()
                self._tell_of_waiting()
                for ref in done:
                    one = sent.pop(ref)
                    try:
                        result, lines = self._ray.get(ref)
                    except self._ray.exceptions.RayTaskError as err:
                        self._free.append(one.worker)
                        raise _own(err) from None
                    except self._ray.exceptions.RayError as err:
                        self._drop(one.worker)
                        lost[one.index] += 1
                        _check_lost(task, one.index, lost[one.index], err)
                        self.redone += 1
                        again.append((one.index, one.piece))
                        send()
                        continue
                    self._free.append(one.worker)
                    self._tell(lines)
                    send()  # before the result is worked on, so that no worker waits for that
                    yield one.index, result
        finally:
            for one in sent.values():
                self._drop(one.worker)  # what it does nobody waits for
            self._busy = False

    def about(self) -> dict[str, Any]:
        return {"engine": self.name, "workers": self.workers, "redone": self.redone}

    def close(self) -> None:
        """Ends the workers."""
        for worker in self._free:
            self._drop(worker)
        self._free = []

    def _new(self) -> Any:
        worker = self._actor.remote()
        self._starting[worker.ready.remote()] = time.monotonic()
        return worker

    def _tell_of_waiting(self) -> None:
        """A line for workers that do not start: others may use the cluster, and then they wait."""
        if self._starting:
            started, _ = self._ray.wait(list(self._starting), num_returns=len(self._starting), timeout=0)
            self._starting = {ref: since for ref, since in self._starting.items() if ref not in started}
        late = [ref for ref, since in self._starting.items() if time.monotonic() - since > PATIENCE]
        if late:
            log.warning("%d workers have not started in %d s: the cluster's CPUs or GPUs may be in use; waiting for them",
                        len(late), PATIENCE)  # fmt: skip
            self._starting = {ref: since for ref, since in self._starting.items() if ref not in late}

    def _drop(self, worker: Any) -> None:
        with suppress(Exception):  # it is dead already, or the cluster is
            self._ray.kill(worker)

    def _tell(self, lines: list[Line]) -> None:
        """What the workers logged; a line that several of them say is told once."""
        for level, text in lines:
            if (level, text) not in self._told:
                self._told.add((level, text))
                log.log(level, "%s", text)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """A SIGTERM, which schedulers and containers send, acts as a Ctrl-C: Ray's own handler would abort the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def _nodes(ray: Any) -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _joined(ray: Any, workers: int, gpus: float, cpus: int) -> list[dict[str, float]]:
    """The nodes of a cluster once so many workers fit, or after `JOINED` seconds: machines join one by one."""
    until = time.monotonic() + JOINED
    while _room(nodes := _nodes(ray), gpus, cpus) < workers and time.monotonic() < until:
        time.sleep(1)
    return nodes


def _own_threads() -> int:
    import torch

    return torch.get_num_threads()


def _room(nodes: list[dict[str, float]], gpus: float, cpus: int) -> int:
    """How many workers fit.

    >>> _room([{"CPU": 8.0, "GPU": 3.0}, {"CPU": 2.0}], gpus=2, cpus=1), _room([{"CPU": 8.0}, {"CPU": 3.0}], gpus=0, cpus=2)
    (1, 5)
    """
    fits = [min(node.get("CPU", 0) // cpus, node.get("GPU", 0) // gpus if gpus else 1 << 30) for node in nodes]
    return int(sum(fits))


def _check_room(workers: int, room: int, gpus: float, cpus: int) -> None:
    if workers > room:
        each = f"{cpus} CPU{'s' if cpus > 1 else ''}" + (f" and {gpus:g} GPU{'s' if gpus != 1 else ''}" if gpus else "")
        wanted = f"{workers} {'are' if workers > 1 else 'is'} wanted"
        raise UserError(f"the Ray cluster has room for {room} workers of {each} each, and {wanted}; give fewer (--workers) "
                        "or smaller ones, or add machines")  # fmt: skip


def _own(err: Any) -> BaseException:
    """What a task raised, as it raised it."""
    cause = getattr(err, "cause", None)
    if isinstance(cause, UserError):
        return UserError(*cause.args)
    return cause if isinstance(cause, Exception) else err


def _check_lost(task: str, index: int, times: int, err: Exception) -> None:
    """Tells of a worker that was lost; UserError where its piece was tried often enough."""
    reason = " ".join(str(err).split())[:300] or type(err).__name__
    if times < ATTEMPTS:
        log.warning("a worker was lost with piece %d, which is done again (%s)", index, reason)
        return
    raise UserError(f"piece {index} of {task.rpartition(':')[2]} was lost {times} times with the worker that ran it "
                    f"({reason}); where memory ran out, give fewer or larger workers (--workers, --gpus-per-worker), or "
                    "smaller batches; run it on the local engine to see it fail by itself") from err  # fmt: skip
