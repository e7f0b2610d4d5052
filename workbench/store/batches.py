"""Batches of a store's rows, the next ones read by a thread while the present one is in use."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..sites import Site
from .buffers import Buffers
from .rows import RowFiles

AHEAD = 2  # groups of batches that are read before they are asked for
GROUP = 16 << 20  # of bytes that are read, and copied to a GPU, in one go: many small batches, or one large one

Group = tuple[list[list[Tensor]], "torch.cuda.Event | None"]  # per site its batches; when they are on the device


class Batches:
    """Reads rows `[start, stop)`, or those of an index, `size` at a time: a tensor [size, d], or one for each of a list of
    sites in a dict.

    On the CPU a thread waits for the disk, and none is troubled where the system has the rows in memory already; the
    memory of batches that nobody holds any more is filled again. For a GPU, rows are read into pinned memory and copied
    on a stream of their own; the stream that takes a batch waits for its copy, and no one else does. At most AHEAD + 1
    groups are read and not yet taken.
    """

    def __init__(
        self, files: RowFiles, sites: Site | list[Site], size: int, rows: range | Tensor, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.files, self.sites, self.size, self.rows, self.dtype, self.device = files, sites, size, rows, dtype, device
        self.names = [str(site) for site in ([sites] if isinstance(sites, Site) else sites)]
        one = sum(files.layout.widths[name] for name in self.names) * files.layout.itemsize
        self.step = size * max(1, GROUP // (size * one))
        self.buffers = Buffers()
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.stream is not None:
            self.device = self.stream.device  # `cuda` without a number is another one in another thread

    def __iter__(self) -> Iterator[Any]:
        """The batches, on the device; closing the iterator stops the thread."""
        pool = ThreadPoolExecutor(1, thread_name_prefix="store-batches")
        pending: deque[tuple[int, Future[Group] | None]] = deque()
        try:
            for start in range(0, len(self.rows), self.step):
                pending.append((start, None if self._at_hand(start) else pool.submit(self._group, start)))
                if len(pending) > AHEAD:
                    yield from self._handed_over(*pending.popleft())
            while pending:
                yield from self._handed_over(*pending.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _at_hand(self, start: int) -> bool:
        """Whether a group need only be copied from the system's memory, which a thread would make slower."""
        rows = self.rows[start : start + self.step]
        if isinstance(rows, Tensor) or self.device.type != "cpu" or self.dtype != self.files.dtype:
            return False
        pieces = list(self.files.pieces(rows.start, rows.stop))
        return all(self.files.at_hand(site, piece) for site in self.names for piece in pieces)

    def _handed_over(self, start: int, read: Future[Group] | None) -> Iterator[Any]:
        batches, copied = self._group(start) if read is None else read.result()
        for batch in zip(*batches, strict=True):
            if copied is not None:
                stream = torch.cuda.current_stream(self.device)
                stream.wait_event(copied)
                for tensor in batch:
                    tensor.record_stream(stream)  # its memory belongs to the other stream
            yield batch[0] if isinstance(self.sites, Site) else dict(zip(self.sites, batch, strict=True))

    def _group(self, start: int) -> Group:
        rows = self.rows[start : start + self.step]
        if self.stream is None:
            return [list(self._read(site, rows).split(self.size)) for site in self.names], None
        pinned = [self._pinned(site, rows) for site in self.names]
        with torch.cuda.stream(self.stream):
            moved = [host.to(self.device, non_blocking=True).to(self.dtype) for host in pinned]
            copied = torch.cuda.Event()
            copied.record(self.stream)
        return [list(tensor.split(self.size)) for tensor in moved], copied

    def _read(self, site: str, rows: range | Tensor) -> Tensor:
        """The rows of a group that need no stream."""
        if isinstance(rows, Tensor):
            return self.files.gather(site, rows, self.dtype, self.device)
        shape = len(rows), self.files.layout.widths[site]
        if self.device.type == "cpu":
            out = self.buffers.lend(*shape, self.dtype)
        else:
            out = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.files.fill(site, rows.start, rows.stop, out)
        return out

    def _pinned(self, site: str, rows: range | Tensor) -> Tensor:
        """Rows in pinned memory, which torch lends again once the copies from it are done."""
        if isinstance(rows, Tensor):
            return self.files.gather(site, rows, self.files.dtype, torch.device("cpu")).pin_memory()
        host = torch.empty((len(rows), self.files.layout.widths[site]), dtype=self.files.dtype, pin_memory=True)
        self.files.read_into(site, rows.start, rows.stop, host)
        return host
