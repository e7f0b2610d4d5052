"""How alike two representations are, from moments: CKA, SVCCA, PWCCA, Procrustes distance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from .cca import CanonicalCorrelations, whitening
from .moments import Moments
from .spectrum import Spectrum
from .symmetric import eigh
from .whitening import CUT


@dataclass(frozen=True, eq=False)
class Side:
    """One block of centred products, factorised once for every pair that it is in.

    Args:
        name: what an error calls it.
        cov: centred sum of products, [d, d], not divided by n.
        n: rows. cut: directions below this share of the largest variance do not count.
        variance: the share of the variance that the directions of SVCCA hold.
    """

    name: str
    cov: Float[Tensor, "d d"]
    n: int
    cut: float = CUT
    variance: float = 0.99

    @classmethod
    def of(cls, moments: Moments, name: str, *, variance: float = 0.99) -> Side:
        """Raises UserError for a constant block, and for a variance outside of 0 to 1."""
        if not 0 < variance <= 1:
            raise UserError(f"variance must lie in 0..1; got {variance}")
        return cls(name, _cov(moments, name, name), moments.n, max(CUT, moments.noise), variance)

    @property
    def trace(self) -> Float[Tensor, ""]:
        return self.cov.trace()

    @cached_property
    def leading(self) -> Float[Tensor, "d k"]:
        """Whitening of the fewest leading principal directions that hold `variance`, [d, k]."""
        values, vectors = self._spectrum
        share = values.cumsum(0) / values.sum()
        k = min(int((share < self.variance - 1e-12).sum()) + 1, len(values))
        k = min(k, int((values > self.cut * values[0]).sum()))
        return vectors[:, :k] / values[:k].sqrt()

    @cached_property
    def white(self) -> Float[Tensor, "d k"]:
        """Whitening of every direction that varies, [d, k]."""
        values, vectors = self._spectrum
        return whitening(values / self.n, vectors, self.cut)

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        values, vectors = eigh(self.cov)
        return values.flip(0).clamp_min(0), vectors.flip(1)


def linear_cka(moments: Moments, a: str = "x", b: str = "y") -> float:
    """||Sab||_F^2 / (||Saa||_F ||Sbb||_F) of centred moments: 1 for equal up to rotation and scale.

    Biased upwards where rows are few for the width; see `debiased_cka` and `cross_cka`.

    Source: arXiv:1905.00414, eq. 4.
    """
    return float(_cov(moments, a, b).square().sum() / (_cov(moments, a, a).norm() * _cov(moments, b, b).norm()))


def debiased_cka(
    moments: Moments, batches: Iterable[Mapping[str, Float[Tensor, "_n _d"]]], a: str = "x", b: str = "y"
) -> float:
    """CKA from unbiased HSIC; it needs the length of every row, so a second pass over the same rows.

    h_ab = ||Sab||^2 - n / (n - 2) sum_t |a_t|^2 |b_t|^2 + tr Saa tr Sbb / ((n - 1)(n - 2)), rows about their means.

    Source: Song et al. 2012, in the linear form of the code released with arXiv:1905.00414.
    """
    n = moments.n
    if n < 4:
        raise UserError(f"debiased CKA needs at least 4 rows; got {n}")
    sums, seen = dict.fromkeys([(a, b), (a, a), (b, b)], 0.0), 0
    means = {name: moments.mean(name) for name in (a, b)}
    for batch in batches:
        lengths = {name: (batch[name].to(mean) - mean).square().sum(1) for name, mean in means.items()}
        seen += len(lengths[a])
        for p, q in sums:
            sums[p, q] += float(lengths[p] @ lengths[q])
    if seen != n:
        raise UserError(f"debiased CKA needs the rows of the moments again: they had {n}, the second pass {seen}")
    trace = {name: float(_cov(moments, name, name).trace()) for name in (a, b)}
    hsic = {
        (p, q): float(_cov(moments, p, q).square().sum())
        - n / (n - 2) * sums[p, q]
        + trace[p] * trace[q] / ((n - 1) * (n - 2))
        for p, q in sums
    }
    return hsic[a, b] / (hsic[a, a] * hsic[b, b]) ** 0.5


def cross_cka(parts: Sequence[Moments], a: str = "x", b: str = "y") -> float:
    """CKA without its bias from moments alone: <S_ab of part i, S_ab of part j> over all pairs i != j.

    Covariances of disjoint rows have independent noise, so their inner product has none on average. Own definition;
    `debiased_cka` is the usual one.

    Args:
        parts: moments of at least two disjoint sets of rows.
    """
    if len(parts) < 2:
        raise UserError(f"cross_cka needs at least two parts; got {len(parts)}")
    tables = {(p, q): [_cov(part, p, q) / (part.n - 1) for part in parts] for p, q in ((a, b), (a, a), (b, b))}
    hsic = {key: sum(float((s * t).sum()) for s, t in permutations(found, 2)) for key, found in tables.items()}
    return hsic[a, b] / (hsic[a, a] * hsic[b, b]) ** 0.5


def procrustes_distance(moments: Moments, a: str = "x", b: str = "y") -> float:
    """min over rotations of ||A / |A| - B R / |B| ||^2 = 2 - 2 ||Sab||_* / sqrt(tr Saa tr Sbb), 0 to 2, centred.

    Source: arXiv:2108.01661 (Ding, Denain, Steinhardt), after scaling each side to length 1.
    """
    return 2 - 2 * procrustes_similarity(moments, a, b)


def procrustes_similarity(moments: Moments, a: str = "x", b: str = "y") -> float:
    """||Sab||_* / sqrt(tr Saa tr Sbb), 0 to 1: the largest correlation, over rotations of B, of all coordinates of A with
    those of B together; 1 - distance / 2."""
    return procrustes_between(Side.of(moments, a), _cov(moments, a, b), Side.of(moments, b))


def procrustes_between(a: Side, cross: Float[Tensor, "d_a d_b"], b: Side) -> float:
    """`procrustes_similarity` of sides that are at hand."""
    return float(torch.linalg.svdvals(cross).sum() / (a.trace * b.trace).sqrt())


def linearity_score(moments: Moments, a: str = "x", b: str = "y") -> float:
    """1 - min_W ||A W - B||^2 / ||B||^2, centred: the in-sample variance-weighted R2 of least squares.

    Source: arXiv:2405.12250, there called a Procrustes score although W is free.
    """
    spectrum = Spectrum.of(moments, a)
    return float(spectrum.gain(0.0) @ spectrum.cross(b).square().sum(1) / _cov(moments, b, b).trace())


def svcca(moments: Moments, a: str = "x", b: str = "y", *, variance: float = 0.99) -> float:
    """Mean canonical correlation between the leading principal components that hold `variance` of each side.

    Source: arXiv:1706.05806.
    """
    sides = [Side.of(moments, name, variance=variance) for name in (a, b)]
    return svcca_between(sides[0], _cov(moments, a, b), sides[1])


def svcca_between(a: Side, cross: Float[Tensor, "d_a d_b"], b: Side) -> float:
    """`svcca` of sides that are at hand."""
    rho = torch.linalg.svdvals(a.leading.T @ cross @ b.leading)
    return float(rho.clamp(max=1).mean())


def pwcca(moments: Moments, a: str = "x", b: str = "y") -> float:
    """Mean canonical correlation, each weighted by how much of `a` its variate accounts for: sum_j |<h_i, a_j>|.

    Source: arXiv:1806.05759, eq. 3; not symmetric: the weights are of the first side.
    """
    return pwcca_between(Side.of(moments, a), _cov(moments, a, b), Side.of(moments, b))


def pwcca_between(a: Side, cross: Float[Tensor, "d_a d_b"], b: Side) -> float:
    """`pwcca` of sides that are at hand; UserError where there are too few rows, as of `CanonicalCorrelations`."""
    cca = CanonicalCorrelations.between(a.white, b.white, cross / a.n, a.n, (a.name, b.name))
    weights = (cca.left.T @ a.cov).abs().sum(1)
    return float((weights * cca.rho).sum() / weights.sum())


def _cov(moments: Moments, a: str, b: str) -> Tensor:
    found = moments.cov(a, b)
    if a == b and not float(found.trace()) > 0:
        raise UserError(f"{a} is constant, so nothing is like it")
    return found
