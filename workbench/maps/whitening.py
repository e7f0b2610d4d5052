"""Whitener: the symmetric square root of a covariance and its inverse, on the directions that vary."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from .moments import Moments
from .symmetric import eigh

CUT = 1e-10
"""directions with less than this share of the largest variance do not count: the cut is relative, never absolute"""


@dataclass(frozen=True, eq=False)
class Whitener:
    """S^(1/2) and S^(-1/2) of a covariance S = U diag(w) U^T [d, d]; both are zero outside of its `rank` directions.

    >>> import torch
    >>> white = Whitener.of(torch.diag(torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64)))
    >>> white.inverse_root.diagonal().tolist(), white.rank
    ([0.5, 1.0, 0.0], 2)
    """

    root: Float[Tensor, "d d"]
    inverse_root: Float[Tensor, "d d"]
    rank: int

    @classmethod
    def of(cls, covariance: Float[Tensor, "d d"], *, cut: float = CUT, shrink: float = 0.0) -> Whitener:
        """Decomposes a covariance.

        Args:
            covariance: symmetric, [d, d].
            cut: variances below this share of the largest count as none.
            shrink: share of the mean variance that is added to every direction first.

        Raises:
            UserError: nothing varies.
        """
        s = covariance.double()
        values, vectors = eigh(s)
        if shrink:
            values = values + shrink * float(s.diagonal().mean())
        largest = float(values[-1])
        if not largest > 0:
            raise UserError("there is nothing to whiten: no direction varies")
        keep = values > cut * largest
        w, u = values[keep].sqrt(), vectors[:, keep]
        return cls((u * w) @ u.T, (u / w) @ u.T, int(keep.sum()))

    @classmethod
    def of_block(cls, train: Moments, name: str, *, cut: float = CUT, shrink: float = 0.0) -> Whitener:
        """Of one block's covariance (divided by its rows) over the training rows.

        cut: never below what the products round off (`Moments.noise`): with float32 products directions of less than
        2.4e-7 of the largest variance are left out of every whitened figure, with float64 those of less than 1e-10.
        """
        return cls.of(train.cov(name, name) / train.n, cut=max(cut, train.noise), shrink=shrink)
