"""What a reader of a store may ask for: which rows, in which dtype, on which device."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .shards import DTYPES


def span_of(rows: Any, n_rows: int) -> range | None:
    """Rows as a range of step 1 within a store of so many; None where they are no such thing."""
    if isinstance(rows, range) and rows.step == 1 and rows.start >= 0:
        rows = slice(rows.start, rows.stop)
    if rows is None or (isinstance(rows, slice) and rows.step in (None, 1)):
        start, stop, _ = _bounds(rows or slice(None), n_rows)
        return range(start, max(start, stop))
    return None


def index_of(rows: Any, n_rows: int, store: object) -> Tensor:
    """Rows as indices [n] from 0, int64 on the CPU; UserError, naming the store, for rows that it does not have."""
    if rows is None or isinstance(rows, slice):
        rows = range(*_bounds(rows or slice(None), n_rows))
    if isinstance(rows, range):
        index = torch.arange(rows.start, rows.stop, rows.step) if len(rows) else torch.empty(0)
    else:
        index = _tensor(rows)
    if index.dtype == torch.bool:
        if len(index) != n_rows:
            raise UserError(f"a mask of {len(index)} rows does not fit store {store} of {n_rows}")
        index = index.nonzero().flatten()
    if len(index) and (index.is_floating_point() or index.is_complex()):
        raise _no_rows(f"numbers of {index.dtype}")
    index = index.long().cpu()
    if len(index) and not (-n_rows <= int(index.min()) and int(index.max()) < n_rows):
        got = f"{int(index.min())} to {int(index.max())}"
        raise UserError(f"store {store} has rows 0 to {n_rows - 1}; got {got}")
    return torch.where(index < 0, index + n_rows, index)


def _bounds(rows: slice, n_rows: int) -> tuple[int, int, int]:
    try:
        return rows.indices(n_rows)
    except (TypeError, ValueError):
        raise _no_rows(repr(rows)) from None


def _tensor(rows: Any) -> Tensor:
    try:
        index = torch.as_tensor(rows).contiguous()
    except (TypeError, ValueError, RuntimeError):
        raise _no_rows(f"{rows!r:.80}") from None
    if index.ndim == 0:
        raise _no_rows(f"{rows!r:.80}; one row is [{int(index)}]")
    if index.ndim != 1:
        raise _no_rows(f"{index.ndim} dimensions of {index.dtype}")
    return index


def _no_rows(got: str) -> UserError:
    return UserError(f"rows must be a slice, a range, one list of whole numbers, or a mask; got {got}")


def number_of(value: Any, what: str) -> int:
    """A whole number; UserError, saying what it should be, for anything else."""
    try:
        return operator.index(value)
    except TypeError:
        raise UserError(f"{what} must be a whole number; got {value!r:.80}") from None


def dtype_of(dtype: torch.dtype | str | None, own: str) -> torch.dtype:
    """A dtype, or its name; the store's own unless given."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r:.80} of rows; allowed: {', '.join(DTYPES)}, or a torch dtype")
    return DTYPES[dtype or own]


def device_of(device: torch.device | str | None) -> torch.device:
    """A device that is there; the CPU unless given."""
    try:
        found = torch.device(device or "cpu")
    except RuntimeError as err:
        raise UserError(f"unknown device {device!r}; give cpu, cuda or cuda:N") from err
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"device {str(device)!r} is not there: this machine shows {count or 'no'} CUDA GPU"
                        f"{'' if count == 1 else 's'}; give {'cuda:0' if count else 'cpu'}")  # fmt: skip
    return found
