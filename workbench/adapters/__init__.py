"""Adapters: delta(h) = act(h @ V + b) @ U as a value, how one is trained, and the published formats."""

from __future__ import annotations

from .adapter import Adapter, vector
from .blend import Blend, Schedule
from .low_rank import ACTS, LowRank

__all__ = ["ACTS", "Adapter", "Blend", "LowRank", "Schedule", "vector"]
