"""The rows of an open store: found in its shards, mapped where they lie in one, read into place where they do not."""

from __future__ import annotations

import mmap
import os
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .folder import Folder
from .shards import DTYPES, Layout, as_bytes

STAGE = 32 << 20  # of bytes on their way to another device or dtype
Piece = tuple[int, int, int]  # a shard, and rows [low, high) of it


class RowFiles:
    """Reads rows of a site, given by name, and nothing else of the shards that hold them."""

    def __init__(self, folder: Folder, layout: Layout, shards: list[dict[str, Any]]) -> None:
        self.folder, self.layout, self.shards = folder, layout, shards
        self.dtype = DTYPES[layout.dtype]
        self.starts = [0, *accumulate(shard["rows"] for shard in shards)]

    @property
    def n_rows(self) -> int:
        return self.starts[-1]

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """Where rows [start, stop) lie."""
        number = bisect_right(self.starts, start) - 1
        while start < stop:
            low, end = self.starts[number], min(stop, self.starts[number + 1])
            yield number, start - low, end - low
            start, number = end, number + 1

    def _open(self, number: int) -> int:
        return self.folder.open(self.shards[number]["file"], self.shards[number]["bytes"])

    def _where(self, site: str, piece: Piece) -> tuple[int, int]:
        """The first byte of a piece in its file, and how many they are."""
        number, low, high = piece
        begin, _ = self.layout.span(site, self.shards[number]["rows"])
        one = self.layout.widths[site] * self.layout.itemsize
        return begin + low * one, (high - low) * one

    def map(self, site: str, piece: Piece) -> Tensor:
        """A piece [n, d] as memory that is the file's until it is written to; no more than its own pages."""
        at, size = self._where(site, piece)
        page = at - at % mmap.ALLOCATIONGRANULARITY
        handle = self._open(piece[0])
        try:
            memory = mmap.mmap(handle, at - page + size, access=mmap.ACCESS_COPY, offset=page)
        finally:
            os.close(handle)
        flat = torch.frombuffer(memory, dtype=self.dtype, count=size // self.dtype.itemsize, offset=at - page)
        return flat.view(piece[2] - piece[1], -1)

    def at_hand(self, site: str, piece: Piece) -> bool:
        """Whether a piece seems to be in the system's memory: its first, middle and last byte are."""
        at, size = self._where(site, piece)
        handle = self._open(piece[0])
        try:
            return all(os.preadv(handle, [bytearray(1)], at + i, os.RWF_NOWAIT) for i in (0, size // 2, size - 1))
        except (OSError, AttributeError):  # it is not, or the system does not say
            return False
        finally:
            os.close(handle)

    def read_into(self, site: str, start: int, stop: int, out: Tensor) -> None:
        """Reads rows [start, stop) into `out` [n, d], contiguous on the CPU and of the store's dtype."""
        done = 0
        for piece in self.pieces(start, stop):
            at, _ = self._where(site, piece)
            rows = piece[2] - piece[1]
            left = as_bytes(out[done : done + rows])
            handle = self._open(piece[0])
            try:
                self._fill(handle, left, at, piece[0])
            finally:
                os.close(handle)
            done += rows

    def _fill(self, handle: int, left: memoryview, at: int, number: int) -> None:
        """Reads bytes of a shard from `at` on until there is no room left for more."""
        while left:
            n = os.preadv(handle, [left], at)
            if n == 0:
                raise UserError(f"store {self.folder.path}: {self.shards[number]['file']} changed since the store was "
                                "opened; run verify")  # fmt: skip
            left, at = left[n:], at + n

    def _scattered(self, site: str, number: int, local: Tensor) -> Tensor:
        """Rows of a shard that lie far apart, read one by one: a map would be met page by page."""
        out = torch.empty((len(local), self.layout.widths[site]), dtype=self.dtype)
        memory, (begin, one) = as_bytes(out), self._where(site, (number, 0, 1))
        starts = [begin + one * row for row in local.tolist()]
        handle = self._open(number)
        try:
            if hasattr(os, "posix_fadvise") and not self.at_hand(
                site, (number, int(local.min()), int(local.max()) + 1)
            ):
                for at in starts:  # the disk is told of all of them before the first is waited for
                    os.posix_fadvise(handle, at, one, os.POSIX_FADV_WILLNEED)
            for i, at in enumerate(starts):
                self._fill(handle, memory[i * one : (i + 1) * one], at, number)
        finally:
            os.close(handle)
        return out

    def slice(self, site: str, start: int, stop: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Rows [start, stop) of a site: a map where they lie in one shard and stay as they are, a copy elsewhere."""
        plain = dtype == self.dtype and device.type == "cpu"
        found = list(self.pieces(start, stop))
        if plain and len(found) == 1:
            return self.map(site, found[0])
        out = torch.empty((max(stop - start, 0), self.layout.widths[site]), dtype=dtype, device=device)
        self.fill(site, start, stop, out)
        return out

    def fill(self, site: str, start: int, stop: int, out: Tensor) -> None:
        """Reads rows [start, stop) into `out` [n, d], contiguous, of any dtype and on any device."""
        if out.dtype == self.dtype and out.device.type == "cpu":
            self.read_into(site, start, stop, out)
        else:
            self._convert_into(site, start, stop, out)

    def _convert_into(self, site: str, start: int, stop: int, out: Tensor) -> None:
        """The same by way of two small buffers, so that the host never holds more than them."""
        width = self.layout.widths[site]
        step = max(1, STAGE // (width * self.layout.itemsize))
        pinned = out.device.type == "cuda"
        shape = (min(step, max(stop - start, 0)), width)
        stages = [torch.empty(shape, dtype=self.dtype, pin_memory=pinned) for _ in range(2 if pinned else 1)]
        copied: list[torch.cuda.Event | None] = [None] * len(stages)
        for turn, at in enumerate(range(start, stop, step)):
            turn %= len(stages)
            if (event := copied[turn]) is not None:
                event.synchronize()  # what this buffer held is on the device
            stage = stages[turn][: min(step, stop - at)]
            self.read_into(site, at, at + len(stage), stage)
            out[at - start : at - start + len(stage)].copy_(stage.to(out.device, non_blocking=pinned))
            if pinned:
                copied[turn] = torch.cuda.Event()
                copied[turn].record(torch.cuda.current_stream(out.device))  # type: ignore[union-attr]
        for event in copied:
            if event is not None:
                event.synchronize()

    def gather(self, site: str, index: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The rows of an index [n] (int64, on the CPU, within the store), shard by shard."""
        width = self.layout.widths[site]
        out = torch.empty((len(index), width), dtype=dtype, device=device)
        owner = torch.searchsorted(torch.tensor(self.starts), index, right=True) - 1
        order = torch.argsort(owner, stable=True)
        numbers, counts = torch.unique_consecutive(owner[order], return_counts=True)
        at = 0
        for number, n in zip(numbers.tolist(), counts.tolist(), strict=True):
            mine = order[at : at + n]
            local = index[mine] - self.starts[number]
            low, high = int(local.min()), int(local.max()) + 1
            sparse = n * width * self.layout.itemsize * 4 < (high - low) * width * self.layout.itemsize
            part = self._scattered(site, number, local) if sparse else self.map(site, (number, low, high))[local - low]
            out[mine.to(device)] = part.to(device).to(dtype)
            at += n
        return out
