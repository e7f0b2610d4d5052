"""PairFactors: two sides that were factorised once, from which every linear converter of the pair is solved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from .linear_map import LinearMap
from .moments import Moments
from .pairs import fit_pair
from .pls import partial_least_squares
from .ridge import ALPHAS
from .similarity import debiased_cka, svcca
from .solver import Solver

RANK_ALPHA = 0.1
"""ridge strength under a reduced rank and a cycle: the default of ridge itself"""


class Cores(NamedTuple):
    """A map there and a map back in the coordinates of `PairFactors`: W = Qx there Qy', and back Qy back Qx'."""

    there: Float[Tensor, "kx ky"]
    back: Float[Tensor, "ky kx"]


@dataclass(frozen=True, eq=False)
class PairFactors:
    """Rows that pair, X - mean = Px diag(sx) Qx' and Y - mean = Py diag(sy) Qy', through their inner product Px' Py.

    Every map that does not depend on the choice of axes is found in the coordinates Px diag(sx) [n, kx] and
    Py diag(sy) [n, ky], k <= min(n - 1, d), and carried back by Qx and Qy: where n < d nothing of d x d is made.

    Args:
        x, y: the two sides, centred.
        inner: Px' Py, [kx, ky].

    >>> x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    >>> sides = Solver.factor(x), Solver.factor(x[:, [1, 0, 3, 2]])
    >>> pair = PairFactors.of_rows(*sides)
    >>> pair.maps(pair.procrustes())[0](torch.arange(1.0, 5.0)).round(decimals=4).tolist()
    [2.0, 1.0, 4.0, 3.0]
    """

    x: Solver
    y: Solver
    inner: Float[Tensor, "kx ky"]

    @classmethod
    def of_rows(cls, x: Solver, y: Solver) -> PairFactors:
        """From two sides that keep their rows."""
        assert x.p is not None
        assert y.p is not None
        return cls(x, y, x.p.T @ y.p)

    @classmethod
    def of_cross(cls, x: Solver, y: Solver, cross: Float[Tensor, "dx dy"]) -> PairFactors:
        """From two sides and X'Y about the means, where the rows are not at hand."""
        return cls(x, y, (x.q.T @ cross.double() @ y.q) / x.s[:, None] / y.s)

    # -- fits ---------------------------------------------------------------------------------------------------------

    def ridge(self, alpha: float, alpha_back: float | None = None) -> Cores:
        """Centred ridge both ways; `alpha` in units of the mean diagonal of each side's X'X."""
        back = alpha if alpha_back is None else alpha_back
        return Cores(self.x.gain(alpha)[:, None] * self.inner * self.y.s,
                     self.y.gain(back)[:, None] * self.inner.T * self.x.s)  # fmt: skip

    def gcv_alpha(self, alphas: Sequence[int | float] = ALPHAS) -> float:
        """The ridge strength of the map there with the least generalised cross-validation score, over all outputs together:

            n RSS(a) / (n - tr H(a))^2,   the mean among the degrees of freedom

        In the units of `ridge`; no further factorisation. It takes rows as exchangeable, which tokens of one prompt are not.
        Raises UserError where no strength leaves a degree of freedom.

        >>> x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
        >>> PairFactors.of_rows(Solver.factor(x), Solver.factor(2 * x + 1)).gcv_alpha([0.001, 1.0])
        0.001
        """
        n, energy = self.x.n, (self.inner * self.y.s).square().sum(1)
        total, best = float(self.y.s.square().sum()), (float("inf"), float("nan"))
        for alpha in alphas:
            kept = self.x.s * self.x.gain(float(alpha))
            free = n - 1 - float(kept.sum())
            if free > n * torch.finfo(torch.float32).eps:
                missed = total - float((energy * kept * (2 - kept)).sum())
                best = min(best, (max(missed, 0.0) / free**2, float(alpha)))
        if best[0] == float("inf"):
            raise UserError(
                f"{n} rows leave no degree of freedom to choose a ridge strength by; give more rows, or a number"
            )
        return best[1]

    def procrustes(self) -> Cores:
        """The (semi-)orthogonal map U V' from the SVD of X'Y, and its transpose; within the span of the rows."""
        u, _, vh = torch.linalg.svd(self.cross, full_matrices=False)
        return Cores(u @ vh, vh.T @ u.T)

    def reduced_rank(self, rank: int, alpha: float = RANK_ALPHA) -> Cores:
        """The best map of rank at most `rank` each way, under a ridge penalty (Mukherjee and Zhu 2011)."""
        return Cores(_reduced(self.x, self.inner * self.y.s, rank, alpha),
                     _reduced(self.y, self.inner.T * self.x.s, rank, alpha))  # fmt: skip

    def pls(self, components: int) -> Cores:
        """Partial least squares with at most `components` components each way."""
        moments, most = self.moments, min(components, len(self.x.s), len(self.y.s), self.x.n - 1)
        maps = []
        for source, target in (("x", "y"), ("y", "x")):
            family = partial_least_squares(moments, source, target, components=most)
            maps.append(family.left @ family.right)
        return Cores(*maps)

    def whitened(self) -> Cores:
        """Whitening, the best rotation, de-whitening (`pairs.fit_pair`)."""
        fit = fit_pair(self.moments, "whitened", dtype=torch.float64)
        return Cores(fit.there.weight, fit.back.weight)

    def cycle(self, weight: float, alpha: float = RANK_ALPHA) -> Cores:
        """Ridge maps that are asked to undo one another (`pairs.fit_pair`); weight 0 is ridge where n > d."""
        fit = fit_pair(self.moments, "cycle", dtype=torch.float64, alpha=alpha, cycle=weight, tolerance=1e-6,
                       max_iterations=200)  # fmt: skip
        return Cores(fit.there.weight, fit.back.weight)

    # -- what is made of them -----------------------------------------------------------------------------------------

    def maps(self, cores: Cores, method: str = "") -> tuple[LinearMap, LinearMap]:
        """The maps themselves, x to y and back, with biases: float32, [dx, dy] and [dy, dx]."""
        made = []
        for source, target, core in ((self.x, self.y, cores.there), (self.y, self.x, cores.back)):
            weight = source.out_of(core) @ target.q.T
            bias = target.mean - source.mean @ weight
            made.append(LinearMap(weight.float(), bias.float(), {"method": method, "n": self.x.n}))
        return made[0], made[1]

    def read(self, core: Float[Tensor, "kx ky"], v: Float[Tensor, "dy r"]) -> Float[Tensor, "dx r"]:
        """W v for W = Qx core Qy', which is not formed."""
        return self.x.out_of(core @ self.y.along(v.T).T)

    def write(self, core: Float[Tensor, "ky kx"], u: Float[Tensor, "r dy"]) -> Float[Tensor, "r dx"]:
        """u B for B = Qy core Qx', which is not formed."""
        return self.x.out_of((self.y.along(u) @ core).T).T

    def cka(self, rows: tuple[Float[Tensor, " n"], Float[Tensor, " n"]]) -> float:
        """Debiased CKA; `rows` are the squared lengths of the centred rows of both sides."""
        # only lengths enter, and one coordinate has room for them
        padded = {name: torch.nn.functional.pad(length.sqrt()[:, None], (0, k - 1))
                  for name, length, k in (("x", rows[0], len(self.x.s)), ("y", rows[1], len(self.y.s)))}  # fmt: skip
        return debiased_cka(self.moments, [padded])

    def svcca(self, variance: float = 0.99) -> float:
        """Mean canonical correlation of the leading directions that hold `variance` of each side."""
        return svcca(self.moments, variance=variance)

    @property
    def cross(self) -> Float[Tensor, "kx ky"]:
        """X'Y in coordinates."""
        return self.x.s[:, None] * self.inner * self.y.s

    @property
    def moments(self) -> Moments:
        """The moments of both sides in coordinates; their means are zero."""
        sides = {"x": self.x.s, "y": self.y.s}
        made = Moments(shift={name: torch.zeros_like(s) for name, s in sides.items()})
        made.n = self.x.n
        made.product = {("x", "x"): torch.diag(sides["x"] ** 2), ("x", "y"): self.cross,
                        ("y", "y"): torch.diag(sides["y"] ** 2)}  # fmt: skip
        return made


def _reduced(source: Solver, carried: Tensor, rank: int, alpha: float) -> Tensor:
    """Ridge of `carried` = P' Y in coordinates, on the leading directions of its fitted values (penalty counted in)."""
    if rank < 1:
        raise UserError(f"a reduced rank must be 1 or more; got {rank}")
    gain = source.gain(alpha)
    _, _, vh = torch.linalg.svd((gain * source.s).sqrt()[:, None] * carried, full_matrices=False)
    leading = vh[:rank].T
    return gain[:, None] * carried @ leading @ leading.T
