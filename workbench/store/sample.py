"""Rows of a store drawn evenly over what its tables say of them, without reading the store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import UserError
from .checks import TABLES

if TYPE_CHECKING:
    from .store import Store

CONSIDERED = 1 << 20
"""rows among which a sample is drawn: of a larger store, windows that are spread evenly over it"""
WINDOWS = 64
ROW_COLUMNS = ("prompt", "position", "token_id")
META = "meta."
"""in front of a key of the prompts' meta, where it is the name of a column"""


def stratified_rows(
    store: Store, n: int, by: str = "row", *, seed: int = 0, first: bool | None = None
) -> Int[Tensor, " m"]:
    """At most `n` rows of a store, ascending, drawn evenly; the same for the same seed.

    by: `row` draws one row from each of n equal stretches of the store, so that every prompt and position is there in
        proportion. A column draws as many rows of each of its values as of any other, as far as there are so many:
        prompt, position or token_id; id, label or another column of the prompts; or `meta.KEY`.
    first: rows at position 0 alone (True), without them (False), or both (None).
    Of a store of more than a million rows, those in 64 windows spread evenly over it are considered: no table is read
    whole, and no activation at all. Raises UserError for a column that is not there.

    >>> stratified_rows(store, 2000, by="label", seed=0)  # doctest: +SKIP
    """
    rng = np.random.default_rng(seed)
    if n < 1:
        raise UserError(f"n={n}: a sample has at least one row")
    rows = _considered(store.n_rows, rng)
    if first is not None:
        at_start = _row_column(store, rows, "position") == 0
        rows = rows[at_start if first else ~at_start]
    strata = np.zeros(len(rows), np.int64) if by == "row" else _strata(store, rows, by)
    return torch.from_numpy(np.sort(rows[_drawn(strata, n, rng)]))


def _considered(n_rows: int, rng: np.random.Generator) -> np.ndarray:
    """Every row, or those of a window in each of equal stretches of the store."""
    if n_rows <= CONSIDERED:
        return np.arange(n_rows)
    width, edges = CONSIDERED // WINDOWS, np.linspace(0, n_rows, WINDOWS + 1).astype(np.int64)
    starts = rng.integers(edges[:-1], edges[1:] - width + 1)
    return (starts[:, None] + np.arange(width)).ravel()


def _strata(store: Store, rows: np.ndarray, by: str) -> np.ndarray:
    """A number for each row: equal for rows with equal values of a column."""
    if by in ROW_COLUMNS:
        return _codes(_row_column(store, rows, by))
    prompt = _row_column(store, rows, "prompt")
    index, which = np.unique(prompt, return_inverse=True)
    return _codes(prompt_column(store, index, by))[which]


def _codes(values: np.ndarray) -> np.ndarray:
    import pandas as pd

    return pd.factorize(values, use_na_sentinel=False)[0]


def _row_column(store: Store, rows: np.ndarray, column: str) -> np.ndarray:
    """A column of rows.parquet at some rows, which ascend; empty cells are -1."""
    if not len(rows):
        return np.empty(0, np.int64)
    found = store.tables.take(TABLES[0], rows, [column])[column]
    return found.fill_null(-1).to_numpy()


def prompt_column(store: Store, prompts: Int[np.ndarray, " p"], name: str) -> np.ndarray:
    """A column of the prompts at some indices, or a key of their meta (`meta.KEY`); None where there is none."""
    columns = store.tables.columns(TABLES[1])
    column = "meta" if name.startswith(META) else name
    if column not in columns:
        allowed = [*ROW_COLUMNS, *(c for c in columns if c not in ("meta", "index")), f"{META}KEY"]
        raise UserError(f"unknown column {name!r:.80} of rows or prompts of store {store.path}; allowed: row, "
                        f"{', '.join(allowed)}")  # fmt: skip
    found = store.tables.take(TABLES[1], prompts, [column])[column].to_pylist()
    if column != name:
        found = [meta_of(text).get(name.removeprefix(META)) for text in found]
    return np.array(found, dtype=object)


def meta_of(text: str | None) -> dict[str, Any]:
    """The meta of a prompt as a store keeps it, values as plain ones (others as JSON); empty where it is none."""
    import json

    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    plain = (str, int, float, bool, type(None))
    if not isinstance(found, dict):
        return {}
    return {key: value if isinstance(value, plain) else json.dumps(value) for key, value in found.items()}


def _drawn(strata: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Places of at most n rows, as many of each stratum as of any other as far as it has them, spread over each."""
    if n >= len(strata):
        return np.arange(len(strata))
    order = np.argsort(strata, kind="stable")
    _, starts, counts = np.unique(strata[order], return_index=True, return_counts=True)
    quota = _quotas(counts, n, rng)
    place = np.arange(quota.sum()) - np.repeat(np.cumsum(quota) - quota, quota)  # 0, 1, ... within each stratum
    count, of = np.repeat(counts, quota), np.repeat(quota, quota)
    low, high = place * count // of, (place + 1) * count // of  # each row from a stretch of its own
    return order[np.repeat(starts, quota) + rng.integers(low, high)]


def _quotas(counts: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """How many of each: the same for all, or all there are; who gets one more is drawn."""
    low, high = 0, int(counts.max())
    while low < high:  # the highest level that does not give too many
        level = (low + high + 1) // 2
        low, high = (level, high) if np.minimum(counts, level).sum() <= n else (low, level - 1)
    quota = np.minimum(counts, low)
    more = rng.permutation(np.flatnonzero(counts > low))[: n - quota.sum()]
    quota[more] += 1
    return quota
