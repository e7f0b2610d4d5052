"""Several transfer runs side by side: their arms in one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError
from .small_files import read_from
from .summary import load_metrics, result_frame

if TYPE_CHECKING:
    import pandas as pd


def compare_runs(runs: Mapping[str, str | Path] | Sequence[str | Path]) -> pd.DataFrame:
    """One row per run, behaviour and arm: `result_frame` of each run, with its name in `run`.

    runs: folders, or {name: folder}. Raises UserError for a folder without metrics, and where there are none.

    >>> compare_runs([])
    Traceback (most recent call last):
    workbench.errors.UserError: no runs to compare; give the folders of at least one
    """
    import pandas as pd

    named = runs if isinstance(runs, Mapping) else {Path(run).name: run for run in runs}
    if not named:
        raise UserError("no runs to compare; give the folders of at least one")
    frames = []
    for name, run in named.items():
        with read_from(Path(run) / "metrics.json"):
            frames.append(result_frame(load_metrics(run)).assign(run=name))
    return pd.concat(frames, ignore_index=True)
