"""The folder that a run of a question leaves behind: the job, its numbers, its tables and its report, all or nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.atomic import staged_folder, write_json

if TYPE_CHECKING:
    import pandas as pd


def json_values(value: Any) -> Any:
    """The same as JSON values: NaN and infinities as null, numbers of NumPy as Python's.

    >>> json_values({"a": (1.0, float("nan"))})
    {'a': [1.0, None]}
    """
    if isinstance(value, Mapping):
        return {str(key): json_values(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_values(part) for part in value]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def run_folder(
    out: Path, marker: str, job: Any, metrics: Mapping[str, Any], tables: Mapping[str, pd.DataFrame], report: str, *,
    overwrite: bool = False,
) -> Iterator[Path]:  # fmt: skip
    """Writes `marker` (the job, a dataclass, as TOML), metrics.json, a parquet file for each table and report.html; what else
    belongs to the run goes into the folder that it gives. UserError as `staged_folder`, where `out` is there."""
    import tomli_w

    with staged_folder(out, marker=marker, overwrite=overwrite) as folder:
        asked = {key: value for key, value in asdict(job).items() if value is not None}
        (folder / marker).write_text(tomli_w.dumps(asked), encoding="utf-8")
        write_json(folder / "metrics.json", metrics)
        for name, table in tables.items():
            table.to_parquet(folder / f"{name}.parquet", index=False)
        (folder / "report.html").write_text(report, encoding="utf-8")
        yield folder
