"""LowRank: one part of an adapter, delta(h) = act(h @ V + b) @ U."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ..errors import UserError

ACTS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "linear": lambda z: z,
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_new": partial(F.gelu, approximate="tanh"),
        "silu": F.silu,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
    }
)


@dataclass(frozen=True, eq=False)
class LowRank:
    """One part of an adapter: delta(h) = act(h @ V + b) @ U.

    Args:
        V: read side, [d, r]; b: [r]; U: write side, [r, d].
        act: one of linear, relu, gelu, gelu_new (its tanh approximation), silu, tanh, sigmoid.

    Raises:
        UserError: shapes that do not fit together; an unknown act.

    >>> part = LowRank(torch.eye(3)[:, :1], torch.zeros(1), torch.ones(1, 3))
    >>> part.rank, part.width, (part * 2).delta(torch.tensor([5.0, 0.0, 0.0])).tolist()
    (1, 3, [10.0, 10.0, 10.0])
    """

    V: Float[Tensor, "d r"]
    b: Float[Tensor, " r_b"]
    U: Float[Tensor, "r_u d_u"]
    act: str = "linear"

    def __post_init__(self) -> None:
        shapes = list(self.V.shape), list(self.b.shape), list(self.U.shape)
        if self.V.ndim != 2 or self.b.shape != self.V.shape[1:] or self.U.shape != self.V.shape[::-1]:
            raise UserError(f"an adapter part needs V [d, r], b [r] and U [r, d]; got {shapes}")
        if self.act not in ACTS:
            raise UserError(f"unknown act {self.act!r}; allowed: {', '.join(ACTS)}")

    def __repr__(self) -> str:
        return f"LowRank(width {self.width}, rank {self.rank}, {self.act})"

    @property
    def rank(self) -> int:
        return self.V.shape[1]

    @property
    def width(self) -> int:
        return self.V.shape[0]

    def delta(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """act(h @ V + b) @ U for states h [..., d], in the dtype and on the device of h."""
        if h.shape[-1] != self.width:
            raise UserError(f"this adapter part has width {self.width}; the states have width {h.shape[-1]}")
        # F.linear rounds product and bias once, as the torch modules that such adapters were trained with do
        return ACTS[self.act](F.linear(h, self.V.to(h).T, self.b.to(h))) @ self.U.to(h)

    def to(self, *args: Any, **kwargs: Any) -> LowRank:
        """As `Tensor.to`: another device or dtype."""
        V, b, U = (tensor.to(*args, **kwargs) for tensor in (self.V, self.b, self.U))
        return LowRank(V, b, U, self.act)

    def plus(self, c: Float[Tensor, " d"]) -> LowRank:
        """The part whose delta is this one's plus the constant c [d]: one more rank, which reads nothing (V = 0, b = 1).

        So a bias of the write side needs no case of its own: it folds, adds and is saved as any other rank.

        >>> part = LowRank(torch.eye(2)[:, :1], torch.zeros(1), torch.ones(1, 2), "tanh")
        >>> part.plus(torch.tensor([0.5, -2.0])).delta(torch.zeros(2)).tolist()
        [0.5, -2.0]
        """
        one = ACTS[self.act](torch.ones((), dtype=torch.float64)).to(c.device)
        row = (c.double() / one).to(self.U)
        return replace(self, V=torch.cat([self.V, self.V.new_zeros(self.width, 1)], 1),
                       b=torch.cat([self.b, self.b.new_ones(1)]), U=torch.cat([self.U, row[None]]))  # fmt: skip

    def constant(self) -> Float[Tensor, " d"] | None:
        """The delta where it is the same on every state (no rank that writes reads), else None."""
        if bool((self.V.any(0) & self.U.any(1)).any()):
            return None
        return self.delta(self.U.new_zeros(self.width))

    def __mul__(self, scale: int | float) -> LowRank:
        """The part whose delta is `scale` times this one's (U is scaled)."""
        return self if scale == 1 else replace(self, U=self.U * scale)

    __rmul__ = __mul__

    def __neg__(self) -> LowRank:
        return self * -1

    def __add__(self, other: LowRank) -> LowRank:
        """The part whose delta is the sum of both, seen on the same state: ranks are concatenated."""
        if not isinstance(other, LowRank):
            return NotImplemented
        if (self.width, self.act) != (other.width, other.act):
            mine, theirs = f"width {self.width}, act {self.act}", f"width {other.width}, act {other.act}"
            raise UserError(f"these adapter parts do not add: {mine} and {theirs}; both must be the same")
        dtype = torch.promote_types(self.V.dtype, other.V.dtype)
        a, c = self.to(dtype), other.to(self.V.device, dtype)
        return LowRank(torch.cat([a.V, c.V], 1), torch.cat([a.b, c.b]), torch.cat([a.U, c.U]), self.act)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LowRank):
            return NotImplemented
        pairs = ((self.V, other.V), (self.b, other.b), (self.U, other.U))
        return self.act == other.act and all(a.dtype == c.dtype and torch.equal(a, c) for a, c in pairs)
