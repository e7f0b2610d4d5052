"""Plan: the steps of what was asked for with their rows, FLOPs, bytes, memory and time on a machine, before any is done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from ..work.rates import Rates
from ..work.work import Work, duration

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Step:
    """One step: what it reads, does, holds and leaves."""

    name: str
    what: str
    """in a few words"""
    work: Work
    tokens: float = 0.0
    """tokens that pass through the model"""
    rows: float = 0.0
    """rows of activations that are kept or summed up"""
    device: float = 0.0
    """bytes on the device at the peak, about"""
    host: float = 0.0
    """bytes in the host's memory at the peak, about"""
    spread: bool = True
    """whether replicas of the model share it; a fit is done on one device"""


@dataclass(frozen=True)
class Plan:
    """What a job, a profile or a transport costs on a machine. Made by `plan_job`, `plan_profile`, `plan_transport`.

    Time is the longest of computing, moving memory and writing to the disk, which overlap; it says what is to be expected of
    code that is bound by them, and leaves out what starting up takes.
    """

    title: str
    steps: tuple[Step, ...]
    rates: Rates
    gpus: int = 1
    advice: tuple[str, ...] = ()
    """what was found on the way: steps that cannot be done at all"""
    fixes: tuple[str, str] = ("fewer or shorter prompts a batch (batch_tokens)", "fewer sites")
    """(what takes less memory, what takes less disk) in the words of what is planned"""

    def needed(self, step: Step) -> int:
        """Devices that hold one replica of a step."""
        return max(1, math.ceil(step.device / self.rates.capacity))

    def parts(self, step: Step) -> dict[str, float]:
        """Seconds by what takes them: compute, memory, disk."""
        replicas = max(1, self.gpus // self.needed(step)) if step.spread else 1
        return self.rates.seconds(step.work, replicas)

    def seconds(self, step: Step) -> float:
        return max(self.parts(step).values())

    def binds(self, step: Step) -> str:
        """What takes longest: compute, memory or disk."""
        parts = self.parts(step)
        return max(parts, key=parts.__getitem__)

    @property
    def hours(self) -> float:
        """Of all steps, one after the other."""
        return sum(map(self.seconds, self.steps)) / 3600

    @property
    def work(self) -> Work:
        """Of all steps together."""
        return sum((step.work for step in self.steps), Work())

    @property
    def warnings(self) -> tuple[str, ...]:
        """Where memory or disk will not do, and what to change."""
        said, rates = list(self.advice), self.rates
        memory, disk = self.fixes
        short = [s for s in self.steps if self.needed(s) > self.gpus]
        if short:
            worst = max(short, key=lambda s: s.device)
            said.append(f"{', '.join(s.name for s in short)}: {size(worst.device)} of device memory are needed, and "
                        f"{self.gpus} x {size(rates.capacity)} are there; take {self.needed(worst)} devices or more with "
                        f"device=\"map\", or {memory}")  # fmt: skip
        host = max(self.steps, key=lambda s: s.host, default=None)
        if host is not None and rates.host is not None and host.host > rates.host:
            said.append(f"{host.name}: {size(host.host)} of the host's memory are needed and {size(rates.host)} are free; "
                        f"take {memory}")  # fmt: skip
        if rates.free is not None and self.work.disk > rates.free:
            said.append(f"{size(self.work.disk)} are written and {size(rates.free)} are free on the disk; take {disk}")
        return tuple(said)

    def frame(self) -> pd.DataFrame:
        """One line a step, in plain units: rows, tokens, FLOPs, bytes, seconds."""
        import pandas as pd

        return pd.DataFrame([self._line(step) for step in self.steps])

    def _line(self, step: Step) -> dict[str, Any]:
        return {"step": step.name, "what": step.what, "rows": step.rows, "tokens": step.tokens, "flops": step.work.flops,
                "disk": step.work.disk, "device": step.device, "host": step.host, "devices": self.needed(step),
                "seconds": self.seconds(step), "binds": self.binds(step)}  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        rates = {"name": self.rates.name, "source": self.rates.source, "flops": dict(self.rates.flops),
                 "reached": self.rates.reached, "memory": self.rates.memory, "capacity": self.rates.capacity,
                 "disk": self.rates.disk}  # fmt: skip
        return {"title": self.title, "gpus": self.gpus, "rates": rates, "hours": self.hours, "flops": self.work.flops,
                "disk": self.work.disk, "warnings": list(self.warnings),
                "steps": [self._line(s) for s in self.steps]}  # fmt: skip

    HEAD = ("step", "what", "rows", "tokens", "FLOPs", "to disk", "device", "host", "time", "bound by")

    def cells(self) -> list[tuple[str, ...]]:
        """The table as it is shown, the sum last."""
        rows = [
            (s.name, s.what, _count(s.rows), _count(s.tokens), f"{s.work.flops:.2g}", size(s.work.disk), size(s.device),
             size(s.host), duration(self.seconds(s)), self.binds(s)) for s in self.steps
        ]  # fmt: skip
        total = self.work
        most = [size(max((getattr(s, k) for s in self.steps), default=0.0)) for k in ("device", "host")]
        tokens = _count(sum(s.tokens for s in self.steps))
        return [*rows, ("all", "", "", tokens, f"{total.flops:.2g}", size(total.disk), *most,
                        duration(3600 * self.hours), "")]  # fmt: skip

    @property
    def rated(self) -> str:
        """The machine that it is planned for, in a line."""
        r = self.rates
        share = "" if r.reached == 1 else f", of which {r.reached:.0%} are planned with"
        half = r.flops.get("bfloat16", 0.0)
        return (f"{self.gpus} x {r.name} ({r.source}): {half / 1e12:.3g} TFLOP/s in bfloat16, "
                f"{r.flops['float32'] / 1e12:.3g} in float32{share}; {r.memory / 1e9:,.4g} GB/s and {size(r.capacity)} of "
                f"memory; {r.disk / 1e9:.2g} GB/s to disk")  # fmt: skip

    def __str__(self) -> str:
        table: Sequence[Sequence[str]] = [self.HEAD, *self.cells()]
        widths = [max(len(line[i]) for line in table) for i in range(len(self.HEAD))]
        lines = ["  ".join(cell.ljust(w) if i < 2 else cell.rjust(w)
                           for i, (cell, w) in enumerate(zip(line, widths, strict=True))).rstrip()
                 for line in table]  # fmt: skip
        return "\n".join([self.title, *lines, f"for {self.rated}"])

    def _repr_html_(self) -> str:
        def row(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = "".join(row(cells, "td") for cells in self.cells())
        notes = "".join(f"<li>{escape(line)}</li>" for line in self.warnings)
        return (f"<h4>{escape(self.title)}</h4><table>{row(self.HEAD, 'th')}{body}</table><p>for {escape(self.rated)}</p>"
                + (f"<ul>{notes}</ul>" if notes else ""))  # fmt: skip


def size(n: float) -> str:
    """
    >>> size(0), size(1536), size(8.03e9 * 2), size(2.1e15)
    ('-', '1.54 kB', '16.1 GB', '2.1 PB')
    """
    if n <= 0:
        return "-"
    step = min(max(int(math.log10(n) // 3), 0), 6)
    return f"{n / 1000**step:.3g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB', 'EB')[step]}"


def _count(n: float) -> str:
    return "-" if not n else f"{n:,.0f}" if n < 1e7 else f"{n:.3g}"
