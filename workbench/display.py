"""What a notebook shows of an artefact in one call: its tables and its figures, one under the other."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .catalogue import RUN_KINDS
from .errors import UserError
from .small_files import read_from
from .store import Store

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from .store.overview import StoreOverview


@dataclass(frozen=True, eq=False)
class Display:
    """Tables and figures that Jupyter shows where this is the value of a cell."""

    title: str
    html: str
    """safe: whatever came from outside is escaped"""
    figures: tuple[go.Figure, ...]
    overview: StoreOverview | None = None
    """of a store: the numbers"""

    def _repr_html_(self) -> str:
        return f"<h4>{escape(self.title)}</h4>{self.html}"

    def _ipython_display_(self) -> None:
        from IPython.display import HTML, display

        display(HTML(self._repr_html_()), *self.figures)


def show(what: Store | str | Path, rows: int | None = None, seed: int = 0) -> Display:
    """The overview of a store, or the results of a finished run, to be looked at in a notebook.

    what: a store, or the folder of a store or of a run. rows, seed: the sample that a store's numbers are of (2,000 rows
    unless given). Raises UserError for a folder that is neither.

    >>> show(store).overview.norms  # doctest: +SKIP
    """
    if isinstance(what, Store):
        return _store(what, rows, seed)
    folder = Path(what).expanduser()
    if (folder / "metrics.json").is_file():
        return _run(folder)
    if any((folder / marker).is_file() for marker in RUN_KINDS):
        raise UserError(f"{what} is a run without results yet: run its job to the end")
    return _store(Store.open(folder), rows, seed)


def _store(store: Store, rows: int | None, seed: int) -> Display:
    from .store.overview import ROWS, store_overview
    from .store_plots import norms_by_layer, norms_by_position, outlier_dimensions

    found = store_overview(store, ROWS if rows is None else rows, seed)
    last = found.sites[-1]
    figures = norms_by_layer(found), norms_by_position(found, last), outlier_dimensions(found, last)
    return Display(f"Store {store.path.name}", found._repr_html_(), figures, found)


def _run(folder: Path) -> Display:
    from .summary import load_metrics

    for marker, kind in RUN_KINDS.items():
        if kind != "run" and (folder / marker).is_file():
            raise UserError(f"{folder} is a run of `workbench {kind}`: its report.html shows its results")
    metrics = load_metrics(folder)
    with read_from(folder / "metrics.json"):
        return _display_of_run(folder, metrics)


def _display_of_run(folder: Path, metrics: Any) -> Display:
    from . import plots
    from .summary import missing, result_frame

    table = result_frame(metrics).to_html(index=False, float_format="{:.3g}".format, na_rep="–")
    notes = "".join(f"<li>{escape(line)}</li>" for line in missing(metrics))
    html = f"{table}<ul>{notes}</ul>" if notes else table
    return Display(f"Run {folder.name}", html, (plots.arms(metrics), plots.forecast(metrics)))
