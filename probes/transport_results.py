"""What a transport run left in its folder, opened again: for its report, the explorer and a notebook."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import UserError
from workbench.maps.scores import METRICS
from workbench.parquet_files import read_frame
from workbench.sites import Site
from workbench.small_files import read_from, read_json
from workbench.transport.grid import TransportGrid

if TYPE_CHECKING:
    import pandas as pd

FORMAT = "workbench.transport"
PARTS = ("efficiency", "features", "causal", "shortcut")


@dataclass(frozen=True, eq=False)
class TransportResults:
    """The results of a transport run. A part that was not measured is None; so is one without a line."""

    grid: TransportGrid
    metrics: dict[str, Any] = field(repr=False)
    """of metrics.json; {} while the run is not finished"""
    efficiency: pd.DataFrame | None = field(default=None, repr=False)
    """one line per pair and rank"""
    features: pd.DataFrame | None = field(default=None, repr=False)
    """one line per pair and feature"""
    causal: pd.DataFrame | None = field(default=None, repr=False)
    """one line per pair and arm"""
    shortcut: pd.DataFrame | None = field(default=None, repr=False)
    """one line per run of blocks left out; `search` says by which search"""

    def of_pair(self, part: str, source: Site | str | int, target: Site | str | int) -> pd.DataFrame | None:
        """The lines of one pair in `efficiency`, `features` or `causal`; None where there are none."""
        table = getattr(self, part)
        if table is None:
            return None
        a, b = str(Site.parse(source)), str(Site.parse(target))
        found: pd.DataFrame = table[(table["source"] == a) & (table["target"] == b)].reset_index(drop=True)
        return None if found.empty else found

    def arms_of(self, source: Site | str | int, target: Site | str | int) -> pd.DataFrame:
        """The grid's lines of one pair: arm, BOS or not, and R2 in the three metrics with its 95 % interval."""
        a, b = str(Site.parse(source)), str(Site.parse(target))
        table = self.grid.frame()
        keep = ["arm", "bos", *(f"r2_{m}{end}" for m in METRICS for end in ("", "_low", "_high")), "alpha", "n_train",
                "n_held_out"]  # fmt: skip
        return table[(table["source"] == a) & (table["target"] == b)][keep].reset_index(drop=True)

    def size_of(self, source: Site | str | int, target: Site | str | int) -> dict[str, Any] | None:
        """The size of the transport subspace of a pair, as metrics.json has it; None where it was not measured."""
        a, b = str(Site.parse(source)), str(Site.parse(target))
        with read_from(Path("metrics.json")):
            sizes = self.metrics.get("efficiency", {}).get("sizes", [])
            return next((dict(s) for s in sizes if (s["source"], s["target"]) == (a, b)), None)

    def shortcuts(self) -> tuple[pd.DataFrame, pd.DataFrame] | None:
        """The shortcuts of one run of blocks, and those of the greedy search; None where none were measured."""
        if self.shortcut is None:
            return None
        return tuple(
            self.shortcut[self.shortcut["search"] == name].reset_index(drop=True) for name in ("single", "greedy")
        )  # type: ignore[return-value]


def load_transport(folder: str | Path) -> TransportResults:
    """Opens the folder of a transport run, finished or not; UserError where it has no grid yet, or a file is damaged.

    >>> load_transport("runs/transport").grid.cell(0, 3)["r2_uniform"]                            # doctest: +SKIP
    """
    folder = Path(folder)
    if not (folder / "grid").is_dir():
        raise UserError(f"{folder} has no grid of a transport yet; make one with `workbench transport`")
    metrics = read_metrics(folder) if (folder / "metrics.json").exists() else {}
    tables = {name: read_part(folder / f"{name}.parquet") for name in PARTS}
    return TransportResults(TransportGrid.load(folder / "grid"), metrics, **tables)


def read_metrics(folder: Path) -> dict[str, Any]:
    """metrics.json of a transport run; UserError where there is none, or it is another's."""
    try:
        found = read_json(folder / "metrics.json")
    except (OSError, ValueError) as err:
        raise UserError(f"{folder} has no results of a transport: its metrics.json cannot be read") from err
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{folder / 'metrics.json'} is not that of a transport; run it with `workbench transport`")
    return found


def read_part(file: Path) -> pd.DataFrame | None:
    """One table of a run; None where it is not there or empty, UserError where it is damaged."""
    if not file.is_file():
        return None
    try:
        found = read_frame(file)
    except (OSError, ValueError) as err:
        raise UserError(f"{file} cannot be read; run the transport again") from err
    return None if found.empty else found
