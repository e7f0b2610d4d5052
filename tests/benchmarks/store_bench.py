"""What a store costs: opening it, reading it beside `dd` on the same disk, and the memory that both take.

Functions return dicts of numbers (seconds, bytes, bytes per second, rows) and print nothing.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from workbench.prompts import PromptSet
from workbench.sites import Site
from workbench.store import Store
from workbench.store.checks import manifest_text
from workbench.store.shards import Layout
from workbench.store.writer import StoreWriter

from .timing import spread

PROMPTS = PromptSet.load(["one prompt"])
ROOT = Path(__file__).resolve().parents[2]


def manifest_of(n_rows: int, widths: dict[str, int], dtype: str) -> dict[str, Any]:
    """The manifest of a store of one prompt, all but its shards and tables."""
    return {
        "format": "workbench.store", "schema": 2, "basis": "raw", "dtype": dtype, "tokens": "all", "n_rows": n_rows,
        "model": {"name": "m", "n_layers": 64, "width": max(widths.values()), "fingerprint": {"tokenizer": "t"}},
        "prompts": {"name": "p", "count": 1, "hash": PROMPTS.hash, "rendered_hash": "r"},
        "sites": {name: {"width": width} for name, width in widths.items()},
    }  # fmt: skip


def write_tables(folder: Path, n_rows: int) -> None:
    """Tables of one prompt, written a piece at a time."""
    schema = pa.schema([("row", pa.int64()), ("prompt", pa.int64())])
    with pq.ParquetWriter(folder / "rows.parquet", schema) as writer:
        for start in range(0, n_rows, 1 << 14):
            rows = np.arange(start, min(start + (1 << 14), n_rows))
            writer.write_table(pa.table({"row": rows, "prompt": np.zeros_like(rows)}, schema=schema))
    line = {"index": 0, "id": "0", "label": None, "meta": "{}", "content": json.dumps(PROMPTS[0].content)}
    pq.write_table(pa.Table.from_pylist([line]), folder / "prompts.parquet")


def blocks_of(n_rows: int, sites: list[Site], width: int, block: int, dtype: torch.dtype) -> Iterator[Any]:
    """Blocks of rows: the number of the row in the first column, noise that compresses badly in the others."""
    noise = torch.randn((block, width), generator=torch.Generator().manual_seed(0)).to(dtype)
    for start in range(0, n_rows, block):
        rows = noise[: min(block, n_rows - start)].clone()
        rows[:, 0] = torch.arange(start, start + len(rows)).to(dtype)
        yield {site: rows for site in sites}


def make_store(
    path: Path, n_rows: int, *, n_sites: int = 1, width: int = 64, block: int = 4096, dtype: str = "float32"
) -> Store:
    """A store that is really written, block by block."""
    sites = [Site(layer) for layer in range(n_sites)]
    with StoreWriter(path, f"{n_rows} {n_sites} {width} {block} {dtype}") as writer:
        for tensors in blocks_of(n_rows, sites, width, block, getattr(torch, dtype)):
            writer.write(tensors, dict.fromkeys(sites, 0))
        widths = {str(site): width for site in sites}
        writer.finish(manifest_of(n_rows, widths, dtype), lambda folder: write_tables(folder, n_rows))
    return Store.open(path)


def make_hollow_store(path: Path, n_rows: int, *, n_sites: int, width: int = 4096, block: int = 4096) -> Path:
    """A store of holes: every header is there and no row is, so that it takes next to no disk; its sums are wrong."""
    layout = Layout({str(Site(layer)): width for layer in range(n_sites)}, "float16")
    (path / "shards").mkdir(parents=True)
    shards = []
    for number, start in enumerate(range(0, n_rows, block)):
        rows = min(block, n_rows - start)
        name = f"shards/{number:05d}.safetensors"
        with open(path / name, "wb") as stream:
            stream.write(layout.header(rows))
            stream.truncate(layout.size(rows))
        shards.append({"file": name, "rows": rows, "bytes": layout.size(rows), "sha256": "0" * 64,
                       "nonfinite": dict.fromkeys(layout.widths, 0)})  # fmt: skip
    write_tables(path, n_rows)
    tables = {n: {"bytes": (path / n).stat().st_size, "sha256": "0" * 64} for n in ("rows.parquet", "prompts.parquet")}
    manifest = manifest_of(n_rows, dict(layout.widths), "float16")
    (path / "manifest.json").write_text(manifest_text({**manifest, "shards": shards, "tables": tables}))
    return path


def seconds(what: Callable[[], Any]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    what()
    return time.perf_counter() - start


def drop_caches(paths: list[Path]) -> str:
    """Puts files out of the system's memory, all of it where that is allowed; says by which means."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return "posix_fadvise"
    return "drop_caches"


def dd(paths: list[Path]) -> None:
    """Reads files with `dd`, a MiB at a time."""
    for path in paths:
        subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=1M"], check=True, capture_output=True)


def read_throughput(
    folder: Path, *, n_bytes: int = 2 << 30, n_sites: int = 1, width: int = 1024, repeats: int = 5
) -> dict[str, Any]:
    """Bytes per second of reading a store back, beside `dd` of the same files: cold (not in memory) and warm.

    `batches` are those of `iter_batches`, every page in memory when a batch is handed over; `summed` adds up their
    values too; `read` is `Store.read` of a whole site at a time, into fresh memory (`fresh` is what filling as much
    fresh memory takes by itself, which no reader into it can beat). Each is the median of `repeats`, taken in turns;
    `ratio_*` are to `dd` of the same kind. Warm is what a cold `dd` has left in memory, the same for all.
    """
    path = folder / f"store-{n_bytes}-{n_sites}-{width}"
    n_rows = n_bytes // (4 * width * n_sites)
    if not path.exists():
        make_store(path, n_rows, n_sites=n_sites, width=width, block=(64 << 20) // (4 * width * n_sites))
    store = Store.open(path)
    files = [path / shard["file"] for shard in store.shards]

    def batches(use: Callable[[torch.Tensor], Any]) -> None:
        for site in store.sites:
            for batch in store.iter_batches(site, 4096):
                use(batch)

    ways: dict[str, Callable[[], Any]] = {
        "dd": lambda: dd(files),
        "batches": lambda: batches(lambda batch: None),
        "summed": lambda: batches(torch.sum),
        "read": lambda: [store.read(site) for site in store.sites] and None,
        "fresh": lambda: [torch.ones(n_rows, width) for _ in store.sites] and None,
    }
    found: dict[str, Any] = {"bytes": store.n_bytes, "sites": n_sites, "rows": n_rows, "repeats": repeats}
    times: dict[str, list[float]] = {f"{way}_{kind}": [] for way in ways for kind in ("cold", "warm")}
    for turn in range(repeats):
        order = list(ways.items())
        for way, run in order[turn % len(order) :] + order[: turn % len(order)]:
            found["dropped_by"] = drop_caches(files)
            times[f"{way}_cold"].append(seconds(run))
        drop_caches(files)
        dd(files)
        for way, run in order[turn % len(order) :] + order[: turn % len(order)]:
            times[f"{way}_warm"].append(seconds(run))
    for key, taken in times.items():
        found[f"{key}_bytes_per_s"] = store.n_bytes / statistics.median(taken)
        found[f"{key}_spread"] = sorted(store.n_bytes / t for t in spread(taken))
        way, kind = key.rsplit("_", 1)
        if way not in ("dd", "fresh"):
            found[f"ratio_{key}"] = found[f"{key}_bytes_per_s"] / found[f"dd_{kind}_bytes_per_s"]
    return found


def memory(folder: Path, *, n_rows: tuple[int, ...] = (10_000, 100_000, 1_000_000), width: int = 256) -> dict[str, Any]:
    """How far the memory of a process rises over what it had, at most, in bytes: writing, then reading in batches, then
    reading in a shuffled order, for each number of rows. A process each; blocks and batches are of one size."""
    code = (
        "import sys; from pathlib import Path; from tests.benchmarks import store_bench as b;"
        "b._peak(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WORKBENCH_PROGRESS": "0", "PYTHONPATH": str(ROOT)}
    found: dict[str, Any] = {"width": width, "rows": list(n_rows)}
    for what in ("write", "read", "shuffled"):
        found[what] = []
        for n in n_rows:
            command = [sys.executable, "-c", code, what, str(folder / f"memory-{n}"), str(n), str(width)]
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
            found[what].append(json.loads(done.stdout))
    return found


def _peak(what: str, path: Path, n_rows: int, width: int) -> None:
    """Does it once on a small scale, so that what is imported and lent is there, and then for all the rows."""
    start = [0]

    def reset() -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        start[0] = _status("VmRSS")

    if what == "write":
        make_store(path.with_name(f"{path.name}-small"), 2 * 4096, width=width)
        reset()
        make_store(path, n_rows, width=width)
    else:
        store, seed = Store.open(path), 0 if what == "shuffled" else None
        for _ in store.iter_batches(0, 1024, slice(0, 4096), seed=seed):
            pass
        reset()
        for batch in store.iter_batches(0, 1024, seed=seed):
            batch.sum()
    sys.stdout.write(json.dumps(_status("VmHWM") - start[0]))


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def open_time(
    folder: Path, *, n_rows: int = 10_000_000, n_sites: int = 1, block: int = 4096, repeats: int = 5
) -> dict[str, Any]:
    """Seconds to open a store of so many rows: the median of several; the files' entries are in memory."""
    path = make_hollow_store(folder / f"hollow-{n_rows}-{n_sites}-{block}", n_rows, n_sites=n_sites, block=block)
    times = [seconds(lambda: Store.open(path)) for _ in range(repeats)]
    return {"rows": n_rows, "sites": n_sites, "shards": len(Store.open(path).shards), 
            "open_s": statistics.median(times), "open_spread": spread(times),
            "manifest_bytes": (path / "manifest.json").stat().st_size}  # fmt: skip
