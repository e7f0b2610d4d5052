"""Work: counted FLOPs and bytes of a step, which add up and, over a machine's rates, become time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PARTS = ("compute", "memory", "disk")


@dataclass(frozen=True)
class Work:
    """FLOPs by the precision that they are done in, and bytes that must be moved at least.

    >>> step = Work({"bfloat16": 2e9}, moved=1e6) * 3 + Work(disk=5.0)
    >>> step.flops, step.moved, step.disk
    (6000000000.0, 3000000.0, 5.0)
    """

    by_dtype: Mapping[str, float] = field(default_factory=dict)
    moved: float = 0.0
    """bytes between a device's memory and its cores: weights once for each batch, states once for each block"""
    disk: float = 0.0
    """bytes written to or read from the disk"""

    @property
    def flops(self) -> float:
        """FLOPs of every precision together."""
        return sum(self.by_dtype.values())

    def __add__(self, other: Work) -> Work:
        dtypes = dict.fromkeys([*self.by_dtype, *other.by_dtype])
        both = {d: self.by_dtype.get(d, 0.0) + other.by_dtype.get(d, 0.0) for d in dtypes}
        return Work(both, self.moved + other.moved, self.disk + other.disk)

    def __mul__(self, times: float) -> Work:
        return Work({d: times * f for d, f in self.by_dtype.items()}, times * self.moved, times * self.disk)

    __rmul__ = __mul__

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"flops": self.flops, "by_dtype": dict(self.by_dtype), "moved": self.moved, "disk": self.disk}


def duration(seconds: float) -> str:
    """
    >>> duration(0.0021), duration(42.4), duration(150), duration(9000), duration(1e6)
    ('2 ms', '42 s', '2.5 min', '2.5 h', '11.6 days')
    """
    for limit, unit, name in ((1, 1e-3, "ms"), (90, 1, "s"), (5400, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.1f} {name}" if unit > 1 else f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86400:,.1f} days"
