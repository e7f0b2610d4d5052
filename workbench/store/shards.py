"""A shard: the rows of one block at every site, one safetensors file whose bytes follow from what it holds."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
HEADER_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
CHUNK = 8 << 20  # of bytes hashed or written at a time


@dataclass(frozen=True)
class Layout:
    """Where the rows of each site lie in a shard: a function of the widths, the dtype and the number of rows alone.

    A shard is what `safetensors.torch.save` makes of `{str(site): rows}`: eight bytes with the length of the header,
    the header (JSON, padded with spaces to a multiple of eight bytes), then each site's rows in the order of the names.

    >>> layout = Layout({"resid_post.0": 4, "resid_post.1": 2}, "float32")
    >>> layout.span("resid_post.1", rows=3)  # after a header of 144 bytes and 3 x 4 values
    (192, 24)
    """

    widths: Mapping[str, int]  # of each site, by its name
    dtype: str
    _headers: dict[int, bytes] = field(default_factory=dict, repr=False, compare=False)

    @property
    def itemsize(self) -> int:
        """The bytes of one value."""
        return DTYPES[self.dtype].itemsize

    def header(self, rows: int) -> bytes:
        """What a shard of so many rows begins with."""
        if rows not in self._headers:
            found, at = {}, 0
            for name in sorted(self.widths):
                end = at + rows * self.widths[name] * self.itemsize
                found[name] = {"dtype": HEADER_DTYPES[self.dtype], "shape": [rows, self.widths[name]],
                               "data_offsets": [at, end]}  # fmt: skip
                at = end
            text = json.dumps(found, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            self._headers[rows] = struct.pack("<Q", len(text)) + text
        return self._headers[rows]

    def size(self, rows: int) -> int:
        """The bytes of a shard of so many rows."""
        return len(self.header(rows)) + rows * sum(self.widths.values()) * self.itemsize

    def span(self, site: str, rows: int) -> tuple[int, int]:
        """Where a site's rows begin in a shard of so many rows, and how many bytes they take."""
        before = sum(width for name, width in self.widths.items() if name < site)
        one = rows * self.itemsize
        return len(self.header(rows)) + before * one, self.widths[site] * one


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, as bytes that can be written to."""
    array: Any = tensor.view(torch.uint8).numpy()
    return memoryview(array).cast("B")


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Writes the rows [n, d] of each site, given by name, to a new file and syncs it: its rows, bytes and sha256.

    The file is hashed in a second thread while it is written, and nothing of the rows is copied. Raises OSError.
    """
    rows, dtype = {len(t) for t in tensors.values()}, {str(t.dtype).removeprefix("torch.") for t in tensors.values()}
    assert len(rows) == len(dtype) == 1, "the sites of a block have as many rows and one dtype"
    (n,) = rows
    layout = Layout({name: t.shape[1] for name, t in tensors.items()}, dtype.pop())
    kept = [tensors[name].detach().cpu().contiguous() for name in sorted(tensors)]
    parts = [memoryview(layout.header(n)), *(as_bytes(t) for t in kept)]
    with ThreadPoolExecutor(1, thread_name_prefix="store-hash") as pool:
        digest = pool.submit(_hash, parts)
        write_synced(path, *parts)
        return {"rows": n, "bytes": layout.size(n), "sha256": digest.result()}


def _hash(parts: list[memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def write_synced(path: Path, *parts: bytes | memoryview) -> None:
    """Writes a file of these parts, one after the other, and waits until it is on the disk; raises OSError."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        for part in parts:
            left = memoryview(part)
            while left:
                left = left[os.write(handle, left[:CHUNK]) :]
        os.fsync(handle)
    finally:
        os.close(handle)
