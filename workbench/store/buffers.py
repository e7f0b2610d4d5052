"""Memory that is lent for a tensor and lent again once no tensor uses it: filling fresh memory costs more than reading."""

from __future__ import annotations

import weakref
from collections import deque

import numpy as np
import torch
from jaxtyping import Shaped
from numpy.typing import NDArray
from torch import Tensor

KEPT = 4  # pieces of memory that wait to be lent again


class Buffers:
    """Lends CPU memory as tensors; what nobody holds any more, whole or in part, is lent again.

    A tensor that is kept keeps its memory, as any other does: the next one gets another piece.
    """

    def __init__(self) -> None:
        self._free: deque[NDArray[np.uint8]] = deque(maxlen=KEPT)

    def lend(self, rows: int, width: int, dtype: torch.dtype) -> Shaped[Tensor, "rows width"]:
        """A tensor of what values the memory happens to hold."""
        size = rows * width * dtype.itemsize
        memory = self._take(size)
        lent = memory[:size]  # an array of its own, alive for as long as any tensor of its memory is
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return torch.from_numpy(lent).view(dtype).view(rows, width)

    def _take(self, size: int) -> NDArray[np.uint8]:
        """A free piece that is large enough, or a new one."""
        while True:
            try:
                memory = self._free.popleft()  # those too small for what is read now are let go
            except IndexError:
                return np.empty(size, dtype=np.uint8)
            if len(memory) >= size:
                return memory
