"""Ridge and pseudo-inverse solutions from one factorisation of the inputs, formed or only applied."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from .linear_map import LinearMap
from .symmetric import eigh, gram


@dataclass(frozen=True, eq=False)
class Solver:
    """The factorised inputs X - m = P diag(s) Q' of a least-squares problem, in float64.

    `p` [n, k], `s` [k], `q` [d, k], `mean` [d]; m is the column mean, or zero where nothing was centred. Every ridge
    strength and every target shares it. From the eigenvalues of the smaller of X'X and XX', so d may exceed n.
    `p` is None where the rows were summed up and not kept (`of_products`): then targets come as products with X.
    Where d exceeds n, `q` is formed when it is asked for: a fold needs it never, at 2 n d k FLOPs.
    """

    p: Float[Tensor, "n k"] | None
    s: Float[Tensor, " k"]
    basis: Float[Tensor, "d k"] | None
    """Q, where it was found first"""
    mean: Float[Tensor, " d"]
    centred: bool
    n: int
    rows: Float[Tensor, "n d"] | None = None
    """X - m, where Q was not"""

    @classmethod
    def factor(cls, x: Float[Tensor, "n d"], centre: bool = True, rtol: float = 0.0) -> Solver:
        """Factorises the rows of `x`; singular values below `rtol` of the largest are cut.

        Raises UserError when the rows are not finite, or all the same.
        """
        if not bool(torch.isfinite(x).all()):
            raise UserError("the inputs of a fit hold NaN or Inf; profile the model again in float32")
        x = x.double()
        mean = x.mean(0) if centre else torch.zeros(x.shape[1], dtype=x.dtype, device=x.device)
        x = x - mean
        wide = x.shape[0] < x.shape[1]
        values, vectors = eigh(gram(x.T if wide else x))
        # eigenvalues are squares: what is below eps of the largest is noise of the factorisation
        floor = max(x.shape) * torch.finfo(x.dtype).eps * values[-1]
        keep = (values > floor) & (values > rtol * rtol * values[-1])
        if not bool(keep.any()):
            raise UserError("the inputs of a fit do not vary: all rows are equal; give prompts that differ")
        s, v = values[keep].sqrt(), vectors[:, keep]
        if wide:
            return cls(v, s, None, mean, centre, len(x), x)
        return cls(x @ v / s, s, v, mean, centre, len(x))

    @classmethod
    def of_products(
        cls, products: Float[Tensor, "d d"], mean: Float[Tensor, " d"], n: int, centre: bool = True, rtol: float = 0.0
    ) -> Solver:
        """Factorises X'X of n rows that are not at hand: about `mean`, or about zero where not `centre`.

        Raises UserError as `factor` does.
        """
        if not bool(torch.isfinite(products).all()):
            raise UserError("the inputs of a fit hold NaN or Inf; profile the model again in float32")
        values, vectors = eigh(products.double())
        floor = max(n, len(mean)) * torch.finfo(torch.float64).eps * values[-1]
        keep = (values > floor) & (values > rtol * rtol * values[-1])
        if not bool(keep.any()):
            raise UserError("the inputs of a fit do not vary: all rows are equal; give prompts that differ")
        s, q = values[keep].sqrt(), vectors[:, keep]
        return cls(None, s, q, mean.double() if centre else torch.zeros_like(q[:, 0]), centre, n)

    @cached_property
    def q(self) -> Float[Tensor, "d k"]:
        """The directions of the columns, [d, k]."""
        return self.out_of(torch.eye(len(self.s)).to(self.s)) if self.basis is None else self.basis

    def along(self, u: Float[Tensor, "m d"]) -> Float[Tensor, "m k"]:
        """u Q."""
        if self.rows is None or self.p is None:
            return u.double() @ self.q
        return (u.double() @ self.rows.T) @ self.p / self.s

    def out_of(self, c: Float[Tensor, "k m"]) -> Float[Tensor, "d m"]:
        """Q c."""
        if self.rows is None or self.p is None:
            return self.q @ c
        return ((self.p @ (c / self.s[:, None])).T @ self.rows).T

    @property
    def unit(self) -> float:
        """The mean diagonal of X'X: what `alpha` is measured in."""
        return float(self.s.square().sum() / len(self.mean))

    def length(self, delta: Float[Tensor, "m d"], jitter: float = 1e-6) -> Float[Tensor, " m"]:
        """Mahalanobis lengths sqrt(delta S^-1 delta') in the covariance S of the rows, plus `jitter` of its mean diagonal.

        From the factors alone: no d x d matrix is formed. Outside of the span of the rows (n <= d) the jitter is all
        that S has: a length there says that the profile never went that way, not how far it would go.
        """
        delta = delta.double()
        along = self.along(delta)
        variance = self.s.square() / max(self.n - 1, 1)
        floor = jitter * float(variance.sum()) / len(self.mean)
        outside = (delta.square().sum(1) - along.square().sum(1)).clamp(min=0) / floor
        return ((along.square() / (variance + floor)).sum(1) + outside).sqrt()

    def gain(self, alpha: float) -> Float[Tensor, " k"]:
        """diag(s / (s^2 + alpha * unit)): the inverse singular values, shrunk."""
        return self.s / (self.s.square() + alpha * self.unit)

    def coefficients(self, y: Float[Tensor, "n m"], alpha: float) -> Float[Tensor, "d m"]:
        """W = (X'X + alpha unit I)^-1 X' (Y - mean Y), by way of [k, m]: m may be a rank, not a width."""
        y = y.double()
        return self.out_of(self.gain(alpha)[:, None] * (self._left.T @ (y - y.mean(0) if self.centred else y)))

    def project(self, u: Float[Tensor, "r d"], y: Float[Tensor, "n m"], alpha: float) -> Float[Tensor, "r m"]:
        """u @ W without forming W: what rows `u` written in the space of X become in the space of Y."""
        y = y.double()
        return (self.along(u) * self.gain(alpha)) @ self._left.T @ (y - y.mean(0) if self.centred else y)

    def of_cross(self, cross: Float[Tensor, "d m"], alpha: float) -> Float[Tensor, "d m"]:
        """`coefficients` from X'Y, centred as X is, in place of the rows of Y; its transpose is what `project` applies."""
        return self.out_of((self.gain(alpha) / self.s)[:, None] * self.along(cross.T).T)

    @property
    def _left(self) -> Float[Tensor, "n k"]:
        assert self.p is not None, "a solver of products has no rows; use of_cross"
        return self.p

    def solve(self, y: Float[Tensor, "n m"], alpha: float) -> LinearMap:
        """The map itself: y = x @ W + b."""
        weight = self.coefficients(y, alpha)
        bias = y.double().mean(0) - self.mean @ weight if self.centred else torch.zeros(y.shape[1], dtype=torch.float64)
        meta = {"method": "ridge" if self.centred else "pinv", "alpha": alpha, "n": len(y)}
        return LinearMap(weight.float(), bias.float().to(weight.device), meta)
