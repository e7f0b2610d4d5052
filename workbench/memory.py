"""Too little memory: told from other errors, and answered by smaller batches."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

from .errors import UserError

T = TypeVar("T")
Made = TypeVar("Made")

log = logging.getLogger("workbench")
ON_THE_HOST = "can't allocate memory"
"""what torch says, in a RuntimeError, where the host has none left"""


def out_of_memory(err: BaseException | None) -> bool:
    """Whether an error says that a device, or the host, has no memory left.

    >>> out_of_memory(MemoryError()), out_of_memory(RuntimeError("shapes differ"))
    (True, False)
    """
    if isinstance(err, MemoryError) or type(err).__name__ == "OutOfMemoryError":
        return True
    return isinstance(err, RuntimeError) and ON_THE_HOST in str(err)


class Batch:
    """A batch that is tried: used as a context, it gives its rows, and ends quietly where memory runs out."""

    def __init__(self, rows: Sequence[int]) -> None:
        self.rows, self.failed = list(rows), False

    def __enter__(self) -> list[int]:
        return self.rows

    def __exit__(self, kind: Any, err: BaseException | None, trace: TracebackType | None) -> bool:
        self.failed = out_of_memory(err)
        if self.failed and len(self.rows) == 1:
            raise UserError(
                "one prompt alone does not fit the memory; give shorter prompts, or another device"
            ) from err
        return self.failed


def batches_that_fit(batches: Iterable[Sequence[int]], unit: str = "prompts") -> Iterator[Batch]:
    """Batches to be tried in a `with`, one after the other: one that runs out of memory comes again in halves.

    All that follow are as small then. What a batch leaves behind must be the same whether or not it was tried before: results
    are put in their place at the end of the block. Raises UserError where one alone does not fit.

    >>> for batch in batches_that_fit([[0, 1, 2, 3], [4, 5]]):
    ...     with batch as rows:
    ...         if len(rows) > 2: raise MemoryError
    ...         rows
    [0, 1]
    [2, 3]
    [4, 5]
    """
    most: int | None = None
    for whole in batches:
        left = list(whole)
        while left:
            batch = Batch(left[:most])
            yield batch
            if not batch.failed:
                left = left[len(batch.rows) :]
                continue
            most = len(batch.rows) // 2
            _give_back()
            log.warning("out of memory with %d %s at once; going on with %d", len(batch.rows), unit, most)


def parts_that_fit(items: Sequence[T], run: Callable[[Sequence[T]], Made], unit: str = "prompts") -> list[Made]:
    """The results of `run` on all items at once, or, where memory runs out, on halves, on quarters, one after another.

    >>> def run(part):
    ...     if len(part) > 2: raise MemoryError
    ...     return sum(part)
    >>> parts_that_fit([1, 2, 3, 4], run)
    [3, 7]
    """
    made: list[Made] = []
    for batch in batches_that_fit([range(len(items))], unit):
        with batch as rows:
            made.append(run([items[i] for i in rows]))
    return made


def _give_back() -> None:
    """What the failed pass had taken, where no exception holds it any more."""
    if "torch" in sys.modules:
        import torch

        torch.cuda.empty_cache()
