"""Spectrum: one eigendecomposition of a source, shared by every penalty, every target and every fold that is scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from .linear_map import LinearMap
from .moments import Moments
from .symmetric import eigh

EPS = torch.finfo(torch.float64).eps
DRIFT = 512
"""eps by which a sum of 4,096 equal squares may drift, one after the other: each rounds off up to half of one, the same
way while the sum lies between two powers of 2"""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Sxx = V diag(l) V^T of one source over one training set, with the moments it was made of.

    Every ridge solution is V diag(1 / (l + a)) V^T Sxy: a target costs one product, a penalty almost nothing.

    Args:
        train: the moments of the training rows.
        source: the block that is mapped from.
        vectors: V, [d, d]; values: l, [d], ascending, none below 0.
        centred: False: no bias, moments about zero.

    >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> spectrum = Spectrum.of(Moments().update({"x": x, "y": 2 * x + 1}), "x")
    >>> spectrum.ridge("y", 0.0)(torch.ones(3, dtype=torch.float64)).round(decimals=6).tolist()
    [3.0, 3.0, 3.0]
    """

    train: Moments
    source: str
    vectors: Float[Tensor, "d d"]
    values: Float[Tensor, " d"]
    centred: bool = True

    @classmethod
    def of(cls, train: Moments, source: str = "x", *, centred: bool = True) -> Spectrum:
        """Decomposes Sxx (about the mean, or raw where not `centred`); UserError where the source never varies."""
        sxx = train.cov(source, source) if centred else train.raw(source, source)
        if not bool(torch.isfinite(sxx).all()):
            raise UserError(f"the moments of {source!r} hold NaN or infinite values; profile again in float32")
        values, vectors = eigh(sxx)
        values = values.clamp_min(0)
        if not float(values[-1]) > 0:
            raise UserError(f"{source} is constant, so there is nothing to fit")
        return cls(train, source, vectors, values, centred)

    @property
    def unit(self) -> float:
        """The mean diagonal of Sxx: what a relative penalty is measured in."""
        return float(self.values.sum()) / len(self.values)

    @property
    def rank(self) -> int:
        """Directions in which the source varies at all: l above d * eps of the largest, and above `Moments.noise` of it."""
        return int((self.values > self._floor(0.0)).sum())

    def _floor(self, alpha: float) -> float:
        """What is no direction: a penalty bounds what rounding in the products can do, least squares have the cut alone."""
        return float(self.values[-1]) * max(len(self.values) * EPS, 0.0 if alpha else self.train.noise)

    @property
    def x_mean(self) -> Float[Tensor, " d"]:
        """What the source is centred on, [d]: its training mean, or zero."""
        return self._mean(self.source)

    def y_mean(self, target: str) -> Float[Tensor, " d_out"]:
        """What a target is centred on, [d_out]."""
        return self._mean(target)

    def _mean(self, name: str) -> Tensor:
        mean = self.train.mean(name)
        return mean if self.centred else torch.zeros_like(mean)

    def covariance(self, a: str, b: str) -> Float[Tensor, "d_a d_b"]:
        """Training sum of products about what both blocks are centred on."""
        return self.train.cov(a, b) if self.centred else self.train.raw(a, b)

    def cross(self, target: str) -> Float[Tensor, "d d_out"]:
        """M = V^T Sxy."""
        return self.vectors.T @ self.covariance(self.source, target)

    def gain(self, alpha: float) -> Float[Tensor, " d"]:
        """1 / (l + alpha), alpha absolute; 0 in directions without variance or penalty."""
        kept = self.values + alpha
        return torch.where(kept > self._floor(alpha), 1 / kept, 0.0)

    def degrees(self, alpha: float) -> float:
        """Effective degrees of freedom: sum l / (l + alpha), and 1 for the bias."""
        return float((self.values * self.gain(alpha)).sum()) + self.centred

    def weight(self, target: str, alpha: float) -> Float[Tensor, "d d_out"]:
        """W = V diag(1 / (l + alpha)) M in float64."""
        return self.vectors @ (self.gain(alpha)[:, None] * self.cross(target))

    def ridge(
        self, target: str, alpha: float = 0.0, *, dtype: torch.dtype = torch.float64,
        cross: Float[Tensor, "d d_out"] | None = None,
    ) -> LinearMap:  # fmt: skip
        """The ridge map at an absolute penalty: min ||Yc - Xc W||^2 + alpha ||W||^2 (sklearn's `Ridge(alpha)`).

        At 0: minimum-norm least squares on the directions that count (`rank`). cross: M, where it is at hand.
        """
        return self.path(target, [alpha], dtype=dtype, cross=cross)[0]

    def path(
        self, target: str, alphas: Sequence[int | float], *, dtype: torch.dtype = torch.float64,
        cross: Float[Tensor, "d d_out"] | None = None,
    ) -> list[LinearMap]:  # fmt: skip
        """One ridge map per absolute penalty. cross: M, where it is at hand."""
        x_mean, y_mean = self.x_mean, self.y_mean(target)
        cross = self.cross(target) if cross is None else cross
        maps = []
        for alpha in alphas:
            weight = self.vectors @ (self.gain(alpha)[:, None] * cross)
            meta = {"method": "ridge", "n": self.train.n, "alpha_absolute": float(alpha)}
            maps.append(LinearMap(weight.to(dtype), (y_mean - x_mean @ weight).to(dtype), meta))
        return maps

    def gcv(
        self, target: str, alphas: Sequence[int | float], *, cross: Float[Tensor, "d d_out"] | None = None
    ) -> Float[Tensor, " k"]:
        """R2 by generalised cross-validation for every absolute penalty, uniform over outputs, without a second pass.

        1 - mean_j GCV_j / (Syy_jj / n), GCV_j = n RSS_j / (n - df)^2; outputs that never vary are left out. -inf
        where a penalty leaves no degree of freedom (n <= df). It takes rows as exchangeable, which tokens of one
        prompt are not: folds by prompt are the safe choice, this the fast one. cross: M, where it is at hand.

        Source: Golub, Heath, Wahba 1979.
        """
        n = self.train.n
        at = self.y_mean(target)
        squares = self.train.squares(target) if self.centred else self.train.squares(target, at)
        live = squares > constant_floor(self.train, target)
        share = torch.where(live, 1 / squares, 0.0)
        energy = (self.cross(target) if cross is None else cross).square() @ share  # mean over outputs comes last
        scores = []
        for alpha in alphas:
            gain = self.gain(alpha)
            residual = float(live.sum()) - float((energy * gain * (2 - self.values * gain)).sum())
            free = n - self.degrees(alpha)
            scores.append(
                1 - n * n * max(residual, 0.0) / free**2 / max(int(live.sum()), 1) if free > 0 else -torch.inf
            )
        return torch.tensor(scores, dtype=torch.float64)


def constant_floor(moments: Moments, name: str) -> Float[Tensor, " d"]:
    """Sums of squares at or below this are rounding: such a column never varies, [d].

    That of the mean, and that of the products, in proportion to the squares about the shift, of which they are left.
    """
    scale = moments.mean(name).abs().maximum(moments.shift[name].abs())
    squares = moments.product[name, name].diagonal()
    return moments.n * (8 * EPS * scale).square() + DRIFT * torch.finfo(moments.products).eps * squares


def sign_fixed(vectors: Float[Tensor, "d k"], *others: Float[Tensor, "_d k"]) -> tuple[Tensor, ...]:
    """Columns turned so that the largest entry of each of `vectors` is positive; `others` turn with them.

    >>> sign_fixed(torch.tensor([[1.0], [-2.0]]))[0].flatten().tolist()
    [-1.0, 2.0]
    """
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    turn = torch.where(largest < 0, -1.0, 1.0).to(vectors)
    return tuple(table * turn for table in (vectors, *others))
