"""Wrappers round what a process does to the file system, and round forward passes: each is an event of a step, and a fault
can be put at any of them. Installed in a forked child alone, and never taken off again."""

from __future__ import annotations

import builtins
import errno
import io
import os
import resource
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CREATING = ("open", "mkdir", "write", "sync", "rename")


class Event(NamedTuple):
    """The n-th of its kind in a step: `start` is before the first step, and `after NAME` what follows one."""

    step: str
    kind: str
    n: int

    def __str__(self) -> str:
        return f"{self.step}/{self.kind}-{self.n}"

    @property
    def place(self) -> str:
        """The step, or the one that it follows."""
        return self.step.removeprefix("after ")


@dataclass
class Watch:
    """Sees the events of a process below one folder; `act` is called before each."""

    place: Path
    act: Callable[[Event], None]

    def __post_init__(self) -> None:
        self.step, self.seen, self.inside = "start", Counter[tuple[str, str]](), threading.local()

    def event(self, kind: str, path: Any = None) -> None:
        if getattr(self.inside, "busy", False) or (path is not None and not self._below(path)):
            return
        self.inside.busy = True
        try:
            n = self.seen[self.step, kind]
            self.seen[self.step, kind] += 1
            self.act(Event(self.step, kind, n))
        finally:
            self.inside.busy = False

    def _below(self, path: Any) -> bool:
        try:
            found = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fspath(path)
        except (OSError, TypeError):
            return False
        return os.path.abspath(os.fsdecode(found)).startswith(str(self.place))

    def install(self) -> None:
        """Wraps the calls of this process."""
        from workbench import atomic, runs
        from workbench.engines.ray import RayEngine

        def wrap(
            owner: Any, name: str, kind: str, at: int = 0, when: Callable[..., bool] = lambda *_, **__: True
        ) -> None:
            before = getattr(owner, name)

            def watched(*args: Any, **options: Any) -> Any:
                if when(*args, **options):
                    self.event(kind, args[at] if len(args) > at else None)
                return before(*args, **options)

            setattr(owner, name, watched)
            for module in list(sys.modules.values()):  # where it was imported by name
                if owner is not os and getattr(module, name, None) is before and module is not owner:
                    setattr(module, name, watched)

        def to_write(file: Any, mode: str = "r", *_: Any, **__: Any) -> bool:
            return not isinstance(file, int) and any(sign in mode for sign in "wax+")

        wrap(
            os,
            "open",
            "open",
            when=lambda path, flags, *_, **options: bool(flags & WRITING) and not options.get("dir_fd"),
        )
        for name, kind in (("mkdir", "mkdir"), ("write", "write"), ("fsync", "sync"), ("unlink", "remove"),
                           ("rmdir", "remove")):  # fmt: skip
            wrap(os, name, kind)
        for name in ("replace", "rename"):
            wrap(os, name, "rename", at=1)
        wrap(atomic, "exchange", "rename", at=1)
        before = io.open

        def watched_open(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            if to_write(file, mode):
                self.event("open", file)
            return before(file, mode, *args, **options)

        io.open = builtins.open = watched_open  # type: ignore[assignment]
        step = runs.Run.step

        def watched_step(run: Any, name: str, *args: Any, **options: Any) -> Any:
            self.step = name
            try:
                return step(run, name, *args, **options)
            finally:
                self.step = f"after {name}"

        runs.Run.step = watched_step  # type: ignore[method-assign]
        self._watch_models()
        spread = RayEngine.spread

        def watched_spread(*args: Any, **options: Any) -> Any:
            self.event("spread")
            return spread(*args, **options)

        RayEngine.spread = watched_spread  # type: ignore[method-assign]

    def _watch_models(self) -> None:
        from torch.nn.modules.module import register_module_forward_pre_hook
        from transformers import PreTrainedModel

        def before(module: Any, _: Any) -> None:
            if isinstance(module, PreTrainedModel) and not hasattr(module, "lm_head"):
                self.event("forward")

        register_module_forward_pre_hook(before)


def at(event: Event, what: Callable[[], None]) -> Callable[[Event], None]:
    """Does this at one event."""
    return lambda now: what() if now == event else None


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0)  # for the handler, where this is the main thread


def lose_a_worker() -> None:
    """Kills the next worker of this process that is found at a piece."""
    threading.Thread(target=_kill_a_worker, args=(os.getpid(),), daemon=True).start()


def _kill_a_worker(driver: int) -> None:
    while True:
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it ended meanwhile
                if (folder / "cmdline").read_bytes().startswith(b"ray::Replica.run") and _descends(folder.name, driver):
                    return os.kill(int(folder.name), signal.SIGKILL)
        time.sleep(0.002)


def _descends(process: str, ancestor: int) -> bool:
    while int(process) > 1:
        if int(process) == ancestor:
            return True
        process = Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[1]
    return False


class Failing:
    """From one event on, some kinds of events fail."""

    def __init__(self, event: Event, number: int, kinds: tuple[str, ...]) -> None:
        self.event, self.number, self.kinds, self.on = event, number, kinds, False

    def __call__(self, now: Event) -> None:
        if now == self.event and not self.on:
            self.on = True
            if self.number == errno.ENOSPC:  # for what is written by other means too: arrow's files, say
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        if self.on and now.kind in self.kinds:
            raise OSError(self.number, os.strerror(self.number))


def full(event: Event) -> Callable[[Event], None]:
    return Failing(event, errno.ENOSPC, ("open", "mkdir", "write", "sync"))


def read_only(event: Event) -> Callable[[Event], None]:
    return Failing(event, errno.EROFS, (*CREATING, "remove"))


def out_of_memory(event: Event, always: bool) -> Callable[[Event], None]:
    """At a forward pass, and if `always` at all that come after it."""
    import torch

    state = {"on": False}

    def act(now: Event) -> None:
        state["on"] = (state["on"] and always) or now == event
        if state["on"] and now.kind == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (simulated)")

    return act


def clock_backwards() -> None:
    """Every look at the clock is an hour before the one before it, and what measures time stands still."""
    passed = count()
    start = time.time()
    time.time = lambda: start - 3600.0 * next(passed)
    time.time_ns = lambda: int((start - 3600.0 * next(passed)) * 1e9)
    time.perf_counter = lambda: 1.0


@contextmanager
def future(folder: Path) -> Iterator[None]:
    """All that lies in a folder is of ten years from now."""
    then = time.time() + 10 * 365 * 86400
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink():
            os.utime(path, (then, then))
    yield
