"""How much of an adapter lies in what a converter carries: read and write capture by the map's leading directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from .adapters.low_rank import LowRank
from .errors import UserError
from .maps.linear_map import LinearMap

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class MapCapture:
    """The share of an adapter part's read and write side that lies in the leading directions of the two maps.

    Entry k - 1 of `read` is ||R_k' V|| / ||V||, R_k [d_D, k] the directions of the donor's space to which `to_donor` gives
    most; of `write` ||U L_k|| / ||U||, L_k those from which `to_recipient` takes most. They go up to the rank of each map:
    what is left to 1 there is lost, whatever the recipient does. A part without structure of its own has sqrt(k / d).
    """

    read: Float[Tensor, " k_read"]
    write: Float[Tensor, " k_write"]
    width: int
    """d: of the donor"""
    rank: int
    """of the adapter part"""

    def __repr__(self) -> str:
        ends = [f"{name} {float(c[-1]):.3f} in {len(c)} of {self.width} directions (random {float(self.chance(len(c))[0]):.3f})"
                for name, c in (("read", self.read), ("write", self.write))]  # fmt: skip
        return f"MapCapture({', '.join(ends)})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{name}</th><td>{float(c[-1]):.3f}</td><td>{len(c)}</td><td>{low:.3f} to {high:.3f}</td></tr>"
            for name, c in (("read", self.read), ("write", self.write))
            for low, high in [[float(end) for end in self.chance(len(c))[1:]]]
        )
        heads = "<tr><th></th><th>captured</th><th>directions</th><th>of a random adapter, 95 %</th></tr>"
        return f"<table>{heads}{rows}</table>"

    def chance(self, k: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What k directions hold of a random adapter part of this rank: its root mean square, sqrt(k / d), and the ends
        between which 95 % of such parts lie: the share of the squares has the law Beta(r k / 2, r (d - k) / 2)."""
        from scipy import stats

        k = torch.as_tensor(k, dtype=torch.float64)
        a, b = self.rank * k / 2, (self.rank * (self.width - k) / 2).clamp_min(1e-9)
        ends = [torch.as_tensor(stats.beta.ppf(q, a.numpy(), b.numpy())).sqrt() for q in (0.025, 0.975)]
        return (k / self.width).sqrt(), ends[0], ends[1]

    def frame(self) -> pd.DataFrame:
        """One line per side and number of directions: side, directions, captured, chance, chance_low, chance_high."""
        import pandas as pd

        tables = []
        for side, curve in (("read", self.read), ("write", self.write)):
            k = torch.arange(1, len(curve) + 1)
            chance, low, high = self.chance(k)
            tables.append(pd.DataFrame({"side": side, "directions": k.numpy(), "captured": curve.numpy(),
                                        "chance": chance.numpy(), "chance_low": low.numpy(),
                                        "chance_high": high.numpy()}))  # fmt: skip
        return pd.concat(tables, ignore_index=True)


def capture_of_maps(part: LowRank, to_donor: LinearMap, to_recipient: LinearMap) -> MapCapture:
    """How much of what an adapter part reads and writes the two maps of a converter carry, by directions.

    Args:
        part: of the donor, V [d_D, r] and U [r, d_D].
        to_donor: W [d_R, d_D]; to_recipient: W [d_D, d_R].

    Raises:
        UserError: widths that do not meet; a part or a map that is zero.

    >>> part = LowRank(torch.eye(3)[:, :1], torch.zeros(1), torch.eye(3)[2:])
    >>> scale = LinearMap(torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.zeros(3))
    >>> found = capture_of_maps(part, scale, scale)
    >>> found.read.tolist(), found.write.tolist()
    ([1.0, 1.0, 1.0], [0.0, 0.0, 1.0])

    Source: the capture of the profile's span (`paste.capture`), here of the map's own directions, so that it tells
    something where the profile spans everything.
    """
    if not part.width == to_donor.d_out == to_recipient.d_in:
        raise UserError(f"widths do not meet: the adapter part has {part.width}, the map to the donor gives {to_donor.d_out}, "
                        f"the map back takes {to_recipient.d_in}")  # fmt: skip
    read, write = part.V.double().cpu(), part.U.double().cpu().T
    return MapCapture(_shares(_directions(to_donor, out=True), read), _shares(_directions(to_recipient, out=False), write),
                      part.width, part.rank)  # fmt: skip


def _directions(fitted: LinearMap, out: bool) -> Float[Tensor, "d k"]:
    """The directions of the space that a map goes to (or comes from), strongest first, as many as its rank."""
    u, _, vh = torch.linalg.svd(fitted.weight.double().cpu(), full_matrices=False)
    if not fitted.rank:
        raise UserError("this map is zero, so it carries nothing; fit the converter again")
    return (vh.T if out else u)[:, : fitted.rank]


def _shares(directions: Float[Tensor, "d k"], columns: Float[Tensor, "d r"]) -> Float[Tensor, " k"]:
    whole = float(columns.square().sum())
    if not whole > 0:
        raise UserError("a side of this adapter part is zero: it reads or writes nothing")
    return (((directions.T @ columns).square().sum(1).cumsum(0)) / whole).clamp(max=1).sqrt()
