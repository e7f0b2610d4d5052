"""What a store must survive, in processes of its own: SIGKILL at any moment, and readers beside a writer.

`kills` and `races` start a fresh interpreter that forks the processes that are killed or that race, and return what
it saw.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def kills(folder: Path, n: int, seed: int = 0) -> dict[str, Any]:
    """Profiles a small model n times, kills each at a random moment, goes on, and compares the bytes.

    `kills`, how many were `killed` before they had ended, how many ended `equal` to the store of an undisturbed run
    with nothing left beside it, the `blocks` that the killed runs had left, and the `seconds` of an undisturbed run.
    Every second one overwrites a store, which must open, old or new, after the kill: `torn` counts those that do not.
    """
    return _apart("_kills", folder, n, seed)


def races(folder: Path, seconds: float) -> dict[str, Any]:
    """Two readers beside a writer that replaces their store: how often they read `right` rows, heard that the store was
    `replaced`, and read `wrong` ones; `ended` has the exit codes of the three (negative: a signal)."""
    return _apart("_races", folder, seconds, 0)


def _apart(name: str, folder: Path, amount: float, seed: int) -> dict[str, Any]:
    code = f"import sys; from tests.benchmarks import store_faults as f; f._main({name!r}, *sys.argv[1:])"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WORKBENCH_PROGRESS": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(folder), str(amount), str(seed)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _main(name: str, folder: str, amount: str, seed: str) -> None:
    found = globals()[name](Path(folder), float(amount), int(seed))
    sys.stdout.write(json.dumps(found) + "\n")


def _fork(what: Callable[[], Any]) -> int:
    """A process that does this and ends; what it raises goes to stderr and its code is 1."""
    pid = os.fork()
    if pid:
        return pid
    try:
        what()
        code = 0
    except BaseException as err:
        sys.stderr.write(f"{type(err).__name__}: {err}\n")
        code = 1
    sys.stderr.flush()
    os._exit(code)


def _ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def _kills(folder: Path, n: float, seed: int) -> dict[str, Any]:
    from tests.conftest import make_model
    from workbench.errors import UserError
    from workbench.profile import plan as profile_plan
    from workbench.profile import profile_model
    from workbench.store import Store

    profile_plan.BLOCK_ROWS = 16  # type: ignore[misc]
    model, dice = make_model("llama"), random.Random(seed)
    prompts = [" ".join(f"w{(7 * i + 3 * j) % 150}" for j in range(dice.randrange(1, 30))) for i in range(40)]

    def run(out: Path) -> None:
        profile_model(model, prompts, out, tokens="all", batch_tokens=64, overwrite=True)

    profile_model(model, prompts[:3], folder / "old")
    run(folder / "first")  # what is imported on the way is imported now
    start = time.perf_counter()
    assert _ended(_fork(lambda: run(folder / "whole"))) == 0
    whole_s, whole = time.perf_counter() - start, contents(folder / "whole")
    seen = {"kills": int(n), "killed": 0, "equal": 0, "torn": 0, "blocks": 0, "seconds": whole_s}
    for i in range(int(n)):
        place = folder / f"kill-{i}"
        place.mkdir()
        if i % 2:
            subprocess.run(["cp", "-r", str(folder / "old"), str(place / "s")], check=True)
        pid = _fork(lambda place=place: run(place / "s"))  # type: ignore[misc]
        time.sleep(dice.uniform(0, 1.1 * whole_s))
        os.kill(pid, signal.SIGKILL)
        seen["killed"] += _ended(pid) == -signal.SIGKILL
        journal = place / ".s.partial" / "journal.jsonl"
        seen["blocks"] += max(0, len(journal.read_text().splitlines()) - 1) if journal.exists() else 0
        if i % 2:
            try:
                Store.open(place / "s").verify()
            except UserError:
                seen["torn"] += 1
        assert _ended(_fork(lambda place=place: run(place / "s"))) == 0  # type: ignore[misc]
        seen["equal"] += contents(place / "s") == whole and [p.name for p in place.iterdir()] == ["s"]
    return seen


def _races(folder: Path, seconds: float, _: int) -> dict[str, Any]:
    import torch

    from tests.benchmarks.store_bench import manifest_of, write_tables
    from workbench.errors import UserError
    from workbench.sites import Site
    from workbench.store import Store
    from workbench.store.writer import StoreWriter

    path, n, until = folder / "s", 4096, time.monotonic() + seconds

    def write(version: int) -> None:
        with StoreWriter(path, f"plan {version}", overwrite=True) as writer:
            for _ in range(4):
                writer.write({Site(0): torch.full((n // 4, 64), float(version))}, {Site(0): 0})
            manifest = {**manifest_of(n, {"resid_post.0": 64}, "float32"), "version": version}
            writer.finish(manifest, lambda place: write_tables(place, n))

    def read(out: Path) -> None:
        seen = {"right": 0, "replaced": 0, "wrong": 0}
        while time.monotonic() < until or not seen["right"]:  # which the end of the writer makes sure of
            store = Store.open(path)
            version = float(store.manifest["version"])
            for i in range(20):
                try:
                    rows = [store.read(0), store.read(0, slice(10, 900)), store.read(0, [5, 3000, 77])][i % 3]
                    time.sleep(0.002)  # so that the store is replaced while its rows are mapped
                    seen["right" if bool((rows == version).all()) else "wrong"] += 1
                except UserError as err:
                    if "was replaced" not in str(err):
                        raise
                    seen["replaced"] += 1
                    break
        out.write_text(json.dumps(seen))

    def keep_writing() -> None:
        version = 1
        while time.monotonic() < until:
            version += 1
            write(version)

    write(1)
    outs = [folder / "reader-0.json", folder / "reader-1.json"]
    ended = [_ended(pid) for pid in [_fork(keep_writing), *(_fork(lambda out=out: read(out)) for out in outs)]]  # type: ignore[misc]
    found = [json.loads(out.read_text()) for out in outs if out.exists()]
    return {"ended": ended, **{key: sum(one[key] for one in found) for key in ("right", "replaced", "wrong")}}
