"""What a dictionary reads of the rows that a map makes, without making them: the map is folded into the dictionary."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.maps.linear_map import LinearMap

from .dictionaries import Dictionary


@dataclass(frozen=True, eq=False)
class Readout:
    """A map seen through a dictionary: map(x) @ u^T, and what fires on map(x), in two products of width f from x.

    A dictionary that normalises its rows needs the rows themselves; there the map is applied first.
    """

    directions: Float[Tensor, "d f"]
    """u^T, or W u^T where the map is folded in"""
    offset: Float[Tensor, " f"]
    encoder: Dictionary
    first: LinearMap | None
    """the map, where it is not folded in"""

    @classmethod
    def of(
        cls, operator: LinearMap, dictionary: Dictionary, directions: Float[Tensor, "f_some d"], dtype: torch.dtype
    ) -> Readout:
        """Folds in float64, on the device of the dictionary; `dtype` is that of the rows.

        directions: those to read along, [f, d].
        """
        u = directions.T
        if dictionary.normalise != "none":
            return cls(
                u.to(dtype), u.new_zeros(u.shape[1]).to(dtype), dictionary.to(dtype), operator.to(u.device, dtype)
            )
        weight, bias = (part.to(u.device, torch.float64) for part in (operator.weight, operator.bias))
        u, exact = u.double(), dictionary.to(torch.float64)
        return cls(_folded(weight, u).to(dtype), (bias @ u).to(dtype), _moved(exact, weight, bias).to(dtype), None)

    def __call__(self, x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n f_some"], Float[Tensor, "n f"]]:
        """(the read-out along each direction, what every feature of the dictionary makes of the row)."""
        x = x if self.first is None else self.first(x)
        return x @ self.directions + self.offset, self.encoder.encode(x)


def _moved(d: Dictionary, weight: Tensor, bias: Tensor) -> Dictionary:
    """The dictionary that encodes x as d encodes x W + b; it decodes nothing."""
    reach = (bias - d.b_dec if d.subtract_b_dec else bias) @ d.W_enc
    w_enc = _folded(weight, d.W_enc)
    b_mag = d.b_mag if d.b_mag is None or d.r_mag is None else d.b_mag + reach * d.r_mag.exp()
    blank = w_enc.new_zeros(1).expand(w_enc.shape[::-1])
    return replace(d, W_enc=w_enc, b_enc=d.b_enc + reach, W_dec=blank, b_dec=w_enc.new_zeros(len(w_enc)), b_mag=b_mag,
                   subtract_b_dec=False)  # fmt: skip


def _folded(weight: Tensor, columns: Tensor) -> Tensor:
    square = weight.shape[0] == weight.shape[1]
    return columns if square and torch.equal(weight, torch.eye(len(weight)).to(weight)) else weight @ columns
