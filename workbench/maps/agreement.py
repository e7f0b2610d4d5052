"""Agreement: what a map predicts against what is there, counted in cells, so that any number of rows can be drawn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ..errors import UserError
from .linear_map import LinearMap
from .quality import r2

REACH = 4.0
"""standard deviations of an output that are told apart; what lies further out is counted in the outermost cells"""


@dataclass(frozen=True, eq=False)
class Agreement:
    """Every output of every row, predicted and actual, in standard deviations of that output about its mean.

    Both are those of the actual values over these rows, so that outputs of any size can be counted together, and a
    perfect map has all counts on the diagonal.
    """

    edges: Float[Tensor, " cells_and_1"]
    """of the cells, the same for both sides, in standard deviations"""
    counts: Int64[Tensor, "cells cells"]
    """values by cell: actual down, predicted across"""
    r2_uniform: float
    r2_weighted: float
    """of the rows, as `quality.r2` has them"""
    n_rows: int
    n_outputs: int
    """outputs that vary; others are left out"""
    outside: int
    """values of which either side lies beyond the edges; they are counted in the outermost cells"""

    def __repr__(self) -> str:
        return (f"Agreement({self.n_rows} rows x {self.n_outputs} outputs in {len(self.counts)} x {len(self.counts)} cells, "
                f"R2 {self.r2_weighted:.3f} weighted)")  # fmt: skip

    def _repr_html_(self) -> str:
        rows = (("rows", f"{self.n_rows:,}"), ("outputs", f"{self.n_outputs:,}"), ("values", f"{int(self.counts.sum()):,}"),
                ("beyond the edges", f"{self.outside:,}"), ("R² (mean over outputs)", f"{self.r2_uniform:.4f}"),
                ("R² (weighted by variance)", f"{self.r2_weighted:.4f}"))  # fmt: skip
        return "<table>" + "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in rows) + "</table>"


def agreement_of(
    fitted: LinearMap, x: Float[Tensor, "n d_in"], y: Float[Tensor, "m d_out"], *, cells: int = 61, reach: float = REACH
) -> Agreement:
    """Counts fitted(x) against y.

    Args:
        x, y: rows that pair, not those that the map was fitted on; cells: along each side; reach: where the edges end.

    Raises:
        UserError: rows that do not pair, fewer than two of them, or outputs none of which varies.

    >>> y = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    >>> found = agreement_of(LinearMap.identity(3), y, y)
    >>> int(found.counts.diagonal().sum()), found.r2_uniform
    (300, 1.0)
    """
    if len(x) != len(y) or len(x) < 2:
        raise UserError(
            f"x and y must pair row by row, two rows at least; got {len(x)} rows of x and {len(y)} rows of y"
        )
    y, predicted = y.double(), fitted(x.double())
    deviation, mean = y.std(0, correction=0), y.mean(0)
    live = deviation > 0
    if not bool(live.any()):
        raise UserError("no output varies over these rows, so there is nothing to compare")
    score = r2(y, predicted)
    edges = torch.linspace(-reach, reach, cells + 1, dtype=torch.float64, device=y.device)
    sides = [((side - mean) / deviation)[:, live].flatten() for side in (y, predicted)]
    outside = int(((sides[0].abs() > reach) | (sides[1].abs() > reach)).sum())
    rows, columns = (torch.bucketize(side, edges[1:-1]) for side in sides)
    counts = torch.bincount(rows * cells + columns, minlength=cells * cells).reshape(cells, cells)
    return Agreement(edges.cpu(), counts.cpu(), score.uniform, score.weighted, len(y), int(live.sum()), outside)
