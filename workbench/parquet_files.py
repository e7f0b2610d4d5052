"""Parquet files that anybody may have made: read in batches, and no further than a table of theirs can be long."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .small_files import plain_file

if TYPE_CHECKING:
    import pandas as pd

EXPANSION = 256
"""times its size on disk that a table may unpack to"""
SMALL = 256 << 20
"""bytes unpacked that are always allowed"""
BATCH = 1024  # rows that are unpacked at a time


def parquet_batches(file: str | Path, *, named: bool = False) -> Iterator[Any]:
    """The rows of a file as pyarrow batches, of no more than `SMALL` bytes where rows are not longer than that.

    A text that the file holds once and names a million times is small on disk and not in memory: so the batches are the
    smaller the more a row could unpack to, and their bytes are counted. named: as in `small_files.plain_file`.
    Raises OSError; ValueError, in few words, for a file that is damaged, or unpacks as only a bomb does.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = plain_file(file, named=named)
    most, total = max(SMALL, EXPANSION * path.stat().st_size), 0
    try:
        with pq.ParquetFile(path) as found:
            check_rows(found.metadata)
            groups = [found.metadata.row_group(i).total_byte_size for i in range(found.metadata.num_row_groups)]
            _check(sum(groups), most)
            step = max(1, min(BATCH, SMALL // max(1, *groups, 1)))
            for batch in found.iter_batches(step, use_threads=False):
                total += batch.nbytes
                _check(total, most)
                batch.validate(full=True)  # texts that are no UTF-8, above all
                yield batch
    except (pa.ArrowException, KeyError, TypeError, IndexError, OverflowError) as err:
        raise ValueError(f"not a parquet file ({(str(err).splitlines() or [type(err).__name__])[0][:120]})") from err


def check_rows(metadata: Any) -> None:
    """ValueError where a file's counts of rows are none that it can have: pyarrow ends the process on some of them."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    rows = [group.num_rows for group in groups]
    if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows:
        raise ValueError(f"it says that it has {metadata.num_rows} rows, in groups of {', '.join(map(str, rows[:4]))}")
    if metadata.num_rows and not metadata.num_columns:
        raise ValueError(f"it says that it has {metadata.num_rows} rows of no columns")


def read_frame(file: str | Path) -> pd.DataFrame:
    """The whole table as a frame; raises as `parquet_batches`."""
    import pandas as pd
    import pyarrow as pa

    batches = list(parquet_batches(file))
    if not batches:
        return pd.DataFrame()
    try:
        return pa.Table.from_batches(batches).to_pandas()
    except (pa.ArrowException, KeyError, TypeError, AttributeError, OverflowError) as err:
        raise ValueError(f"its columns are not those of a frame ({type(err).__name__})") from err


def _check(size: int, most: int) -> None:
    if not 0 <= size <= most:
        raise ValueError(f"it unpacks to {size:,} bytes or more, as only a bomb's does")
