"""What a probe says of rows of a store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.store import Store
from workbench.store.resident import ResidentRows

from .probe import Probe
from .probe_transfer import check_base

if TYPE_CHECKING:
    import pandas as pd

BATCH = 4096


@dataclass(frozen=True, eq=False)
class RowScores:
    """A probe's score of row `rows[i]`: the log-odds of `target` in nats, or the quantity."""

    probe: Probe
    target: str
    """the class; "" for a quantity"""
    rows: Int[Tensor, " n"]
    scores: Float[Tensor, " n"]
    """float32 on the CPU; NaN for rows with a value that is not finite"""

    def __repr__(self) -> str:
        return f"RowScores({self.name}, {len(self.rows):,} rows at {self.probe.site})"

    @property
    def name(self) -> str:
        """What the scores are of, and their unit."""
        if not self.target:
            return f"{self.probe.label}, read by a probe"
        return f"{self.probe.label}: {self.target} (log-odds, nats)"

    def frame(self) -> pd.DataFrame:
        """One line per row: row, score."""
        import pandas as pd

        return pd.DataFrame({"row": self.rows.numpy(), "score": self.scores.numpy()})

    def _repr_html_(self) -> str:
        from html import escape

        return f"<p>{escape(repr(self))}</p>"


def score_rows(
    source: Store | ResidentRows,
    probe: Probe,
    rows: Int[Tensor, " n"],
    *,
    target: str | None = None,
    allow_mismatch: bool = False,
) -> RowScores:
    """A probe's score of some rows of the site that it reads, batch by batch.

    source: a store, or its rows on a device, which are used where the site is kept there. rows: their indices.
    target: the class whose log-odds are wanted; None: the last.
    Raises UserError for a probe of another model or width, a class that it does not have, and what `Store.read` raises.

    >>> score_rows(store, probe, stratified_rows(store, 20_000), target="refusal").scores  # doctest: +SKIP
    """
    store = source.store if isinstance(source, ResidentRows) else source
    check_base(probe, store.fingerprint, store.name, allow_mismatch)
    said = probe.classes[probe.target_number(target)] if probe.classes else ""
    read = source.some if isinstance(source, ResidentRows) else source.read
    found = [probe.log_odds(read(probe.site, part).float(), target).cpu() for part in rows.split(BATCH)]
    scores = torch.cat(found) if found else torch.zeros(0)
    return RowScores(probe, said, rows, torch.where(torch.isfinite(scores), scores, torch.nan))
