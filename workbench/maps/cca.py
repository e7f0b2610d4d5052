"""Canonical correlations from moments: the ceiling of every linear predictor, and how many dimensions it carries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from .moments import Moments, total
from .spectrum import constant_floor, sign_fixed
from .symmetric import eigh
from .whitening import CUT

EDGE_MARGIN = 1.05
"""a squared correlation counts above this multiple of the edge of the null law: the edge itself fluctuates"""
CHANCE = 0.001
"""of one or more false counts among the held-out correlations of independent data (Bonferroni)"""
DIM_LIN_NULL = 64 / (9 * math.pi**2)
"""the participation ratio (sum rho)^2 / sum rho^2 of independent data, per dimension, for d much below n: 0.7205"""


@dataclass(frozen=True, eq=False)
class CanonicalCorrelations:
    """rho of one pair of blocks over one set of rows, with its variates; largest first.

    Args:
        rho: canonical correlations, [k], k = min(rank_x, rank_y).
        left: [d_x, k], right: [d_y, k]: (x - mean) @ left and (y - mean) @ right have unit variance and are
            uncorrelated but for rho.
        rank_x, rank_y: directions that vary, by a relative cut.
        n: rows.
    """

    rho: Float[Tensor, " k"]
    left: Float[Tensor, "d_x k"]
    right: Float[Tensor, "d_y k"]
    rank_x: int
    rank_y: int
    n: int

    @classmethod
    def of(cls, moments: Moments, source: str = "x", target: str = "y", *, cut: float = CUT) -> CanonicalCorrelations:
        """rho = singular values of Sxx^(-1/2) Sxy Syy^(-1/2) on the directions above `cut` times the largest variance.

        The cut is never below what the products round off (`Moments.noise`): float32 products lose the directions with
        less than 2.4e-7 of the largest variance, which then count neither in rho nor in the ranks.

        Raises:
            UserError: a side that never varies, or no more rows than directions of both sides together, where some
                correlations are 1 whatever the data.

        Source: Hotelling 1936; the cut is relative where the code released with arXiv:2508.17540 has 1e-12.
        """
        white_x, white_y = _whitening(moments, source, cut), _whitening(moments, target, cut)
        covariance = moments.cov(source, target) / moments.n
        return cls.between(white_x, white_y, covariance, moments.n, (source, target))

    @classmethod
    def between(
        cls, white_x: Float[Tensor, "d_x r_x"], white_y: Float[Tensor, "d_y r_y"], covariance: Float[Tensor, "d_x d_y"],
        n: int, names: tuple[str, str] = ("x", "y"),
    ) -> CanonicalCorrelations:  # fmt: skip
        """The same of two whitenings (`whitening`) and the covariance of the sides; UserError for too few rows."""
        rank_x, rank_y = white_x.shape[1], white_y.shape[1]
        if n - 1 <= rank_x + rank_y:
            # where all n - 1 directions of the rows are taken, how many there are is not known yet
            full = sum(len(w) if w.shape[1] >= n - 1 else w.shape[1] for w in (white_x, white_y))
            raise UserError(
                f"canonical correlations of {names[0]} with {names[1]} need more than {full + 1} rows; got {n}: profile "
                "more prompts"
            )
        u, rho, vh = torch.linalg.svd(white_x.T @ covariance @ white_y, full_matrices=False)
        left, right = sign_fixed(white_x @ u, white_y @ vh.T)
        return cls(rho.clamp(max=1), left, right, rank_x, rank_y, n)

    @property
    def ratios(self) -> tuple[float, float]:
        """Directions per row of either side, rank / (n - 1)."""
        return self.rank_x / (self.n - 1), self.rank_y / (self.n - 1)

    @property
    def inflation(self) -> float:
        """What the ceiling of independent data would be: rank_x / (n - 1)."""
        return self.ratios[0]

    def ceiling(self, *, corrected: bool = False) -> Float[Tensor, " k"]:
        """The highest in-sample whitened R2 of any affine map of rank 1..k: cumsum rho^2 / rank_y, [k].

        Args:
            corrected: less what noise adds: c_r - (1 - c_k) / (1 - f_k) f_r, with f the same sums of Wachter's law. At
                full rank that is the adjusted R2; below, it takes off the leading share of the noise, so it is no
                higher than the truth.
        """
        raw = self.rho.square().cumsum(0) / self.rank_y
        if not corrected:
            return raw
        null = null_squares(self.rank_x, self.rank_y, self.n).to(raw).cumsum(0) / self.rank_y
        return raw - (1 - raw[-1]) / (1 - null[-1]) * null

    @property
    def sum_rho2(self) -> float:
        """Transported dimensions, in whitened units: sum rho^2; independent data would have rank_x rank_y / (n - 1)."""
        return float(self.rho.square().sum())

    @property
    def sum_rho2_null(self) -> float:
        return self.rank_x * self.rank_y / (self.n - 1)

    @property
    def edge(self) -> float:
        """The upper edge of rho^2 of independent data; 4 d/n (1 - d/n) for equal ranks."""
        return null_edges(*self.ratios)[1]

    @property
    def wachter_count(self) -> int:
        """Correlations that independent data would not have: rho^2 above 1.05 times the edge."""
        return int((self.rho.square() > EDGE_MARGIN * self.edge).sum())

    @property
    def dim_lin(self) -> float:
        """(sum rho)^2 / sum rho^2, the size of arXiv:2508.17540. It does not change when every rho shrinks alike, so
        it says little: compare `dim_lin_null`."""
        square = self.sum_rho2
        return float(self.rho.sum()) ** 2 / square if square else 0.0

    @property
    def dim_lin_null(self) -> float:
        """`dim_lin` of independent data of this shape, from Wachter's law; 0.7205 d where d is far below n."""
        null = null_squares(self.rank_x, self.rank_y, self.n)
        return float(null.sqrt().sum()) ** 2 / float(null.sum())

    def correlations(self, moments: Moments, source: str = "x", target: str = "y") -> Float[Tensor, " k"]:
        """Correlation of each pair of variates on other rows, [k], signed: unbiased where rho itself is not."""
        cross = (self.left * (moments.cov(source, target) @ self.right)).sum(0)
        x = (self.left * (moments.cov(source, source) @ self.left)).sum(0)
        y = (self.right * (moments.cov(target, target) @ self.right)).sum(0)
        return torch.where(x * y > 0, cross / (x * y).sqrt(), 0.0)


@dataclass(frozen=True)
class SubspaceSize:
    """How many dimensions a linear map can carry from x to y, three ways, each beside its value on independent data."""

    sum_rho2: float
    sum_rho2_null: float
    wachter_count: int
    """squared correlations above 1.05 times `wachter_edge`"""
    wachter_edge: float
    held_out_sum: float
    """sum of signed squared correlations of held-out rows, in variates of the other folds; about 0 on independent data"""
    held_out_count: int
    """held-out correlations, pooled over folds, above a bar that independent folds would pass once in a thousand sets. Folds
    share training rows: of sets of independent data (n = 1,000, d = 4), 0.6 % passed it at 2 folds and 5 % at 6"""
    dim_lin: float
    """the participation ratio of arXiv:2508.17540"""
    dim_lin_null: float
    rank_x: int
    rank_y: int
    n: int


def subspace_size(parts: Sequence[Moments], source: str = "x", target: str = "y", *, cut: float = CUT) -> SubspaceSize:
    """Sizes of the linear transport subspace; the held-out ones by cross-fitting over the parts.

    Args:
        parts: moments of at least two disjoint sets of rows, which no prompt straddles.
        cut: directions below this share of the largest variance do not count; as of `CanonicalCorrelations.of`.

    Source: arXiv:2508.17540 (dim_lin); Wachter 1980 (the law of rho^2 of independent data).
    """
    if len(parts) < 2:
        raise UserError(f"held-out sizes need at least two parts; got {len(parts)}")
    chosen = [part.select([(source, target)]) for part in parts]
    whole = total(chosen)
    full = CanonicalCorrelations.of(whole, source, target, cut=cut)
    folds = []
    for part in chosen:
        train = CanonicalCorrelations.of(whole - part, source, target, cut=cut)
        found = train.correlations(part, source, target)
        folds.append(torch.nn.functional.pad(found, (0, len(full.rho) - len(found))) if len(found) < len(full.rho)
                     else found[: len(full.rho)])  # fmt: skip
    weights = torch.tensor([part.n / whole.n for part in chosen], dtype=torch.float64).to(full.rho)
    held = (torch.stack(folds) * weights[:, None]).sum(0)
    signed = (torch.stack(folds).square() * torch.stack(folds).sign() * weights[:, None]).sum(0)
    bar = -float(torch.special.ndtri(torch.tensor(CHANCE / len(full.rho), dtype=torch.float64))) / whole.n**0.5
    return SubspaceSize(
        full.sum_rho2, full.sum_rho2_null, full.wachter_count, full.edge, float(signed.sum()), int((held > bar).sum()),
        full.dim_lin, full.dim_lin_null, full.rank_x, full.rank_y, full.n,
    )  # fmt: skip


def null_edges(ratio_x: float, ratio_y: float) -> tuple[float, float]:
    """Where rho^2 of independent data lie: (sqrt(p (1 - q)) -+ sqrt(q (1 - p)))^2, p and q directions per row.

    >>> round(null_edges(2304 / 150_000, 2304 / 150_000)[1], 4)
    0.0605
    """
    a, b = math.sqrt(ratio_x * (1 - ratio_y)), math.sqrt(ratio_y * (1 - ratio_x))
    return (a - b) ** 2, (a + b) ** 2


def null_squares(rank_x: int, rank_y: int, n: int) -> Float[Tensor, " k"]:
    """Expected rho^2 of independent data, largest first, [min(rank_x, rank_y)]: quantiles of Wachter's law,
    sqrt((hi - s)(s - lo)) / (s (1 - s)), scaled to their exact sum rank_x rank_y / (n - 1)."""
    low, high = null_edges(rank_x / (n - 1), rank_y / (n - 1))
    k = min(rank_x, rank_y)
    # s = middle - half cos(t) takes the square roots at both ends out of the integral
    angle = (torch.arange(20_000, dtype=torch.float64) + 0.5) * math.pi / 20_000
    s = (low + high) / 2 - (high - low) / 2 * angle.cos()
    mass = (angle.sin().square() / (s * (1 - s))).cumsum(0)
    at = torch.searchsorted(mass / mass[-1], (torch.arange(k, dtype=torch.float64) + 0.5) / k)
    squares = s[at.clamp(max=len(s) - 1)].flip(0)
    return squares * (rank_x * rank_y / (n - 1) / float(squares.sum()))


def whitening(values: Float[Tensor, " d"], vectors: Float[Tensor, "d d"], cut: float = CUT) -> Float[Tensor, "d rank"]:
    """U diag(w)^(-1/2) of the directions of a covariance above `cut` times its largest eigenvalue, [d, rank]."""
    keep = values > cut * values.max()
    return vectors[:, keep] / values[keep].sqrt()


def _whitening(moments: Moments, name: str, cut: float) -> Tensor:
    """U diag(w)^(-1/2) of the directions that vary, [d, rank]."""
    values, vectors = eigh(moments.cov(name, name) / moments.n)
    if not bool((moments.squares(name) > constant_floor(moments, name)).any()):
        raise UserError(f"{name} is constant, so it correlates with nothing")
    return whitening(values, vectors, max(cut, moments.noise))
