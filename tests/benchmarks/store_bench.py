"""What a store costs: opening it, reading it beside `dd` on the same disk, and the memory that both take.

Functions return dicts of numbers (seconds, bytes, bytes per second, rows) and print nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from workbench.prompts import PromptSet
from workbench.sites import Site
from workbench.store import Store
from workbench.store_checks import manifest_text
from workbench.store_shards import Layout
from workbench.store_writer import StoreWriter

PROMPTS = PromptSet.load(["one prompt"])
GB = 1e9


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
        for start in range(0, n_rows, 1 << 18):
            rows = list(range(start, min(start + (1 << 18), n_rows)))
            writer.write_table(pa.table({"row": rows, "prompt": [0] * len(rows)}, schema=schema))
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


def open_time(
    folder: Path, *, n_rows: int = 10_000_000, n_sites: int = 1, block: int = 4096, repeats: int = 5
) -> dict[str, Any]:
    """Seconds to open a store of so many rows: the best of several; the files' entries are in memory."""
    path = make_hollow_store(folder / f"hollow-{n_rows}-{n_sites}-{block}", n_rows, n_sites=n_sites, block=block)
    times = [seconds(lambda: Store.open(path)) for _ in range(repeats)]
    return {"rows": n_rows, "sites": n_sites, "shards": len(Store.open(path).shards), "open_s": min(times),
            "manifest_bytes": (path / "manifest.json").stat().st_size}  # fmt: skip
