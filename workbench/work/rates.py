"""Rates: what a machine does in a second, from its data sheet or measured here; over them, work becomes time."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from .room import disk_free, memory_free
from .work import PARTS, Work

REACHED = 0.4
"""the share of a data sheet's matrix rate that is planned with: what trained large models report is 0.35 to 0.45"""
DISK = 2e9
"""bytes a second written to a disk, where nothing else is said: one NVMe drive"""


@dataclass(frozen=True)
class Rates:
    """FLOP/s by precision, bytes a second of memory and disk, and what memory there is."""

    name: str
    flops: Mapping[str, float]
    """by dtype; float32 without TF32, which no fit uses"""
    memory: float
    """bytes a second of the device's memory"""
    capacity: float
    """bytes of the device's memory"""
    disk: float = DISK
    """bytes a second written"""
    host: float | None = None
    """bytes of the host's memory; None where it is not known"""
    free: float | None = None
    """bytes free on the disk; None where it is not known"""
    device: str = "cuda"
    """the kind: `cuda` or `cpu`, by which products of symmetric matrices are cut"""
    reached: float = REACHED
    """the share of `flops` that is planned with; 1 where they were measured"""
    source: str = ""

    def seconds(self, work: Work, devices: int = 1) -> dict[str, float]:
        """Seconds of each part by itself: compute, memory (both spread over the devices), disk.

        >>> rates = Rates("r", {"float32": 1e12}, memory=1e11, capacity=1e9, disk=1e9, reached=0.5)
        >>> rates.seconds(Work({"float32": 1e12}, moved=1e11, disk=3e9), devices=2)
        {'compute': 1.0, 'memory': 0.5, 'disk': 3.0}
        """
        flops = sum(done / (self.reached * self._rate(dtype)) for dtype, done in work.by_dtype.items())
        return dict(
            zip(PARTS, (flops / devices, work.moved / self.memory / devices, work.disk / self.disk), strict=True)
        )

    def _rate(self, dtype: str) -> float:
        if dtype not in self.flops:
            raise UserError(
                f"{self.name} has no rate for {dtype}; it has {', '.join(self.flops)}: plan in one of these"
            )
        return self.flops[dtype]

    def changed(
        self, tflops: float | None = None, bandwidth: float | None = None, disk: float | None = None,
        capacity: float | None = None, reached: float | None = None,
    ) -> Rates:  # fmt: skip
        """With numbers in place of its own: TFLOP/s of half precision (others in proportion), GB/s, GB/s, GB, a share."""
        given = {"tflops": tflops, "bandwidth": bandwidth, "disk_rate": disk, "memory": capacity, "reached": reached}
        for name, value in given.items():
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"{name} {value:g} is out of range; give a number above 0")
        if reached is not None and reached > 1:
            raise UserError(f"reached {reached:g} is out of range: a share of the rate, at most 1")
        flops = dict(self.flops)
        if tflops is not None:
            flops = {d: f * 1e12 * tflops / self.flops["bfloat16"] for d, f in flops.items()}
        name = self.name if all(v is None for v in (tflops, bandwidth, capacity)) else f"{self.name}, changed"
        return replace(
            self, name=name, flops=flops, memory=self.memory if bandwidth is None else 1e9 * bandwidth,
            disk=self.disk if disk is None else 1e9 * disk, reached=self.reached if reached is None else reached,
            capacity=self.capacity if capacity is None else 1e9 * capacity,
        )  # fmt: skip


def _sheet(name: str, half: float, single: float, double: float, memory: float, capacity: float, source: str) -> Rates:
    flops = {"bfloat16": half, "float16": half, "float32": single, "float64": double}
    return Rates(name, {d: 1e12 * f for d, f in flops.items()}, 1e9 * memory, 1e9 * capacity, source=source)


PRESETS: dict[str, Rates] = {
    "A100": _sheet("A100", 312, 19.5, 9.7, 2039, 80, "NVIDIA A100 Tensor Core GPU data sheet, SXM 80 GB, dense"),
    "H100": _sheet(
        "H100", 989.5, 67, 34, 3350, 80, "NVIDIA H100 Tensor Core GPU data sheet, SXM, half of the sparse rate"
    ),
    "H200": _sheet(
        "H200", 989.5, 67, 34, 4800, 141, "NVIDIA H200 Tensor Core GPU data sheet, SXM, half of the sparse rate"
    ),
}
"""dense matrix rates, without sparsity; float32 and float64 without tensor cores, as fits are done"""


def preset(name: str) -> Rates:
    """A GPU's data sheet by name; UserError for another name.

    >>> preset("h100").memory / 1e12
    3.35
    """
    if name.upper() not in PRESETS:
        raise UserError(f"no data sheet of {name!r} is known; there are {', '.join(PRESETS)}, or give --tflops, "
                        "--bandwidth and --memory")  # fmt: skip
    return PRESETS[name.upper()]


def measured(
    device: str = "auto", folder: str | Path = ".", *, size: int | None = None, seconds: float = 0.15
) -> Rates:
    """What this machine does, in a second or two: matrix products by dtype, a copy in memory, a synced write in `folder`.

    size: of the square matrices; unless given, 1,024 on a CPU and 8,192 on a GPU. seconds: of each look.
    """
    import torch

    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    gpu = where.type == "cuda"
    # float16 has no fast product on most CPUs: one of 1,024 would take seconds
    sizes = dict.fromkeys(("float32", "float64", "bfloat16"), 8192 if gpu else 1024) | {"float16": 8192 if gpu else 256}
    flops = {name: matrix_rate(name, where, size or own, seconds) for name, own in sizes.items()}
    free = float(memory_free(torch.device("cpu")))
    threads = torch.get_num_threads()
    here = f"this machine ({threads} CPU thread{'s' if threads > 1 else ''})"
    name = torch.cuda.get_device_name(where) if gpu else here
    capacity = float(torch.cuda.get_device_properties(where).total_memory) if gpu else free
    return Rates(name, flops, copy_rate(where, 1 << (30 if gpu else 26), seconds), capacity, disk_rate(Path(folder)), free,
                 float(disk_free(folder)), device=where.type, reached=1.0, source="measured here")  # fmt: skip


def matrix_rate(dtype: str, device: Any, size: int, seconds: float = 0.15, *, tf32: bool = False) -> float:
    """FLOP/s of square products of one dtype; TF32 is off unless asked for."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
        out = torch.empty_like(a)
        return 2.0 * size**3 / once(lambda: torch.matmul(a, b, out=out), device, seconds)
    finally:
        torch.set_float32_matmul_precision(before)


def copy_rate(device: Any, size: int, seconds: float = 0.15, *, to: Any = None, pinned: bool = False) -> float:
    """Bytes a second of copying so many: within a device's memory, each byte read and written; or `to` another device."""
    import torch

    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    if to is None:
        target = torch.empty_like(source)
        return 2.0 * size / once(lambda: target.copy_(source), device, seconds)
    target = torch.empty(size, dtype=torch.uint8, device=to, pin_memory=pinned)
    return size / once(lambda: target.copy_(source, non_blocking=True), device, seconds)


def disk_rate(folder: Path, size: int = 1 << 26) -> float:
    """Bytes a second of writing a file under `folder` until it is on the disk; `DISK` where nothing can be written there."""
    place = next((p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir()), Path.cwd())
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".rate-") as file:
            began = time.perf_counter()
            file.write(os.urandom(1 << 20) * (size >> 20))
            file.flush()
            os.fsync(file.fileno())
            return size / (time.perf_counter() - began)
    except OSError:
        return DISK


def once(run: Callable[[], Any], device: Any, seconds: float) -> float:
    """Seconds of one call: the best of turns that fill `seconds`, after one that warms up."""
    import torch

    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else (lambda: None)
    run(), wait()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        began = time.perf_counter()
        run(), wait()
        best = min(best, time.perf_counter() - began)
    return best
