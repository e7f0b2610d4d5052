"""Moments: n, sums and cross products of named blocks of columns, from which everything linear is solved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from .symmetric import gram

ROWS = 4096
"""rows of one product below float64: what a product of more of them rounds off grows with their number"""
NOISE = 2
"""eps of the products, as a share of the largest eigenvalue, that rounding may give to a direction that does not vary:
half of one was measured with random rows, the worst, on a CPU"""
Pair = tuple[str, str]


class Moments:
    """Second moments of named blocks about a shift, accumulated in float64.

    With a fixed shift c_a per block: n, s_a = sum(x_a - c_a) and G_ab = sum (x_a - c_a)^T (x_b - c_b). They are
    additive over batches, shards and folds, and subtractable: training set = total - fold. The shift (the mean of the
    first batch) keeps the sums small, so that centring afterwards loses no digits; moments with other shifts are
    moved to a common one before they are added.

    Args:
        pairs: which cross products to keep, as pairs of block names; None keeps all. The products of a block with
            itself are always kept.
        products: dtype of the matrix products; with float32 (TF32 is off) rows of at most that precision are centred in
            it about a shift that it holds exactly, and never cast to float64 as a whole; all sums stay float64. The cost:
            directions with less than `noise` (2.4e-7) of the largest variance cannot be told from rounding, so that
            whitening, canonical correlations and least squares leave them out (float64: 1e-10, their own cut). Ridge
            and R2 by output need no such cut. A sum of moments of two precisions has the lower.
        shift: c_a per block, [d_a]; default the mean of the first batch. Moments of one shift add without moving.

    `meta` holds what `save` was told of their origin, as JSON values: model, prompts, sites. A sum has none.

    >>> x = torch.tensor([[0.0], [2.0], [4.0]])
    >>> whole = Moments().update({"x": x})
    >>> whole.n, whole.mean("x").item(), whole.cov("x", "x").item(), whole.raw("x", "x").item()
    (3, 2.0, 8.0, 20.0)
    >>> (whole - Moments().update({"x": x[:1]})).mean("x").item()
    3.0

    Source: the algebra of pairwise merging (Chan, Golub, LeVeque 1979), with a fixed shift instead of running means.
    """

    def __init__(
        self,
        *,
        pairs: Iterable[Pair] | None = None,
        products: torch.dtype = torch.float64,
        shift: Mapping[str, Float[Tensor, " _d"]] | None = None,
    ) -> None:
        self.n = 0
        self.products = products
        self.meta: dict[str, Any] = {}
        self.shift: dict[str, Tensor] = {}
        self.sum: dict[str, Tensor] = {}
        self.product: dict[Pair, Tensor] = {}
        self._pairs: set[Pair] | None = None if pairs is None else {(min(pair), max(pair)) for pair in pairs}
        if shift is not None:
            self._start(shift)

    @property
    def names(self) -> list[str]:
        """Names of the blocks, sorted."""
        return sorted(self.sum)

    @property
    def noise(self) -> float:
        """The share of the largest eigenvalue of a covariance that may be rounding of the products alone."""
        return NOISE * torch.finfo(self.products).eps

    def width(self, name: str) -> int:
        """Columns of a block."""
        return len(self.sum[self._known(name)])

    def update(self, blocks: Mapping[str, Float[Tensor, "_n _d"]]) -> Moments:
        """Adds a batch of rows; every block has the same number of rows. Returns self."""
        rows = {name: len(block) for name, block in blocks.items()}
        if not rows or len(set(rows.values())) != 1:
            raise UserError(f"every block of a batch needs the same number of rows; got {rows}")
        if not next(iter(rows.values())):
            return self
        if self.sum:
            self._same_blocks({name: block.shape[1] for name, block in blocks.items()})
        sums = {name: block.sum(0, dtype=torch.float64) for name, block in blocks.items()}
        for name, block in blocks.items():
            # a sum in float64 of what is narrower is finite where every summand is; of float64 it may overflow
            if not torch.isfinite(block if block.dtype == torch.float64 else sums[name]).all():
                raise UserError(f"block {name!r} holds NaN or infinite values; remove those rows first")
        n = next(iter(rows.values()))
        if not self.sum:
            self._start({name: s / n for name, s in sums.items()})
        self.n += n
        factors = {}
        for name, block in blocks.items():
            work = torch.promote_types(block.dtype, self.products)
            centred = block.to(work) - self.shift[name].to(work)
            if work == torch.float64:
                self.sum[name] += centred.sum(0)
            else:
                self.sum[name] += sums[name] - n * self.shift[name]
            factors[name] = centred.to(self.products)
        room: dict[tuple[int, int], Tensor] = {}  # fresh memory for each product would cost a tenth of it
        with _no_tf32():
            for a, b in self.product:
                shape = factors[a].shape[1], factors[b].shape[1]
                if shape not in room:
                    room[shape] = factors[a].new_empty(shape)
                for x, y in _chunks(factors[a], factors[b]):
                    made = gram(x, room[shape]) if a == b else torch.matmul(x.T, y, out=room[shape])
                    self.product[a, b] += made  # float64 += float32
        return self

    def mean(self, name: str) -> Float[Tensor, " d"]:
        """Mean of a block, [d]."""
        return self.shift[self._known(name)] + self.sum[name] / self._rows()

    def about(
        self, a: str, b: str, at_a: Float[Tensor, " d_a"], at_b: Float[Tensor, " d_b"]
    ) -> Float[Tensor, "d_a d_b"]:
        """sum (x_a - at_a)^T (x_b - at_b), [d_a, d_b]: G - s_a^T u_b - u_a^T s_b + n u_a^T u_b with u = at - shift."""
        product = self._product(a, b)
        u_a, u_b = at_a - self.shift[a], at_b - self.shift[b]
        return torch.addr(product, self.sum[a], u_b, alpha=-1).addr_(u_a, self.sum[b] - self.n * u_b, alpha=-1)

    def cov(self, a: str, b: str) -> Float[Tensor, "d_a d_b"]:
        """Centred sum of products, sum (x_a - mean_a)^T (x_b - mean_b), [d_a, d_b]; not divided by n."""
        return torch.addr(self._product(a, b), self.sum[a], self.sum[b], alpha=-1 / self._rows())

    def squares(self, name: str, at: Float[Tensor, " d"] | None = None) -> Float[Tensor, " d"]:
        """sum (x - at)^2 by column, [d]: the diagonal of `about`; about the mean, as that of `cov`, unless `at` is given."""
        product, s = self._product(name, name).diagonal(), self.sum[name]
        if at is None:
            return product - s.square() / self._rows()
        u = at - self.shift[name]
        return product - 2 * s * u + self.n * u.square()

    def raw(self, a: str, b: str) -> Float[Tensor, "d_a d_b"]:
        """Uncentred sum of products, sum x_a^T x_b, [d_a, d_b]."""
        return self.about(a, b, torch.zeros_like(self.sum[self._known(a)]), torch.zeros_like(self.sum[self._known(b)]))

    def __add__(self, other: Moments) -> Moments:
        """The moments of both sets of rows together."""
        return self._combine(other, +1)

    def __sub__(self, other: Moments) -> Moments:
        """The moments of the rows of self without those of other, which must be among them."""
        return self._combine(other, -1)

    def _combine(self, other: Moments, sign: int, in_place: bool = False) -> Moments:
        """The sum or difference; `in_place` uses the memory of self's products, which is then no more."""
        if not isinstance(other, Moments):
            return NotImplemented
        if not other.n:
            return self.copy()
        if not self.n and sign > 0:
            return other.copy()
        if other.n > self.n and sign < 0:
            raise UserError(f"cannot take {other.n} rows away from {self.n}")
        self._same_blocks({name: other.width(name) for name in other.names})
        if set(self.product) != set(other.product):
            raise UserError("these moments keep different cross products; accumulate both with the same pairs")
        result = Moments(pairs=self._pairs, products=lower(self.products, other.products))
        result.n, result.shift = self.n + sign * other.n, dict(self.shift)
        for name in self.names:
            moved = other.sum[name] + other.n * (other.shift[name] - self.shift[name])
            result.sum[name] = self.sum[name] + sign * moved
        near = {name for name in self.names if torch.equal(other.shift[name], self.shift[name])}
        for a, b in self.product:
            apart = not {a, b} <= near
            theirs = other.about(a, b, self.shift[a], self.shift[b]) if apart else other.product[a, b]
            mine = self.product[a, b]
            result.product[a, b] = torch.add(mine, theirs, alpha=sign, out=mine if in_place else None)
        return result

    def to(self, device: torch.device | str) -> Moments:
        """The same moments on another device."""
        moved = Moments(pairs=self._pairs, products=self.products)
        moved.n, moved.meta = self.n, dict(self.meta)
        moved.shift = {name: value.to(device) for name, value in self.shift.items()}
        moved.sum = {name: value.to(device) for name, value in self.sum.items()}
        moved.product = {pair: value.to(device) for pair, value in self.product.items()}
        return moved

    def select(self, pairs: Iterable[Pair]) -> Moments:
        """The moments of some pairs alone: nothing is copied, so that a sum or a difference costs no more than these.

        Raises UserError for a pair that was not kept.
        """
        kept = {(min(pair), max(pair)) for pair in pairs}
        names = sorted({name for pair in kept for name in pair})
        part = Moments(pairs=kept, products=self.products)
        part.n, part.meta = self.n, dict(self.meta)
        part.shift = {name: self.shift[self._known(name)] for name in names}
        part.sum = {name: self.sum[name] for name in names}
        part.product = {pair: self._product(*pair) for pair in sorted({*kept, *((name, name) for name in names)})}
        return part

    def save(self, path: str | Path, *, overwrite: bool = False, meta: Mapping[str, Any] | None = None) -> None:
        """Writes one .safetensors file; `meta` (JSON values) says where the rows are from, and `load` gives it back."""
        from .moment_files import save_moments

        save_moments(self, Path(path), overwrite=overwrite, meta=meta)

    @classmethod
    def load(cls, path: str | Path) -> Moments:
        """Reads what `save` wrote; UserError for a file that is damaged, of another kind, or of version 1, which does not
        say what its products were made in."""
        from .moment_files import load_moments

        return load_moments(Path(path))

    def _start(self, shift: Mapping[str, Tensor]) -> None:
        # rounded to what the products are made in: a shift may be any point, but it must be the same one everywhere
        self.shift = {name: point.to(self.products).double() for name, point in shift.items()}
        self.sum = {name: torch.zeros_like(c) for name, c in self.shift.items()}
        for i, a in enumerate(self.names):
            for b in self.names[i:]:
                if self._pairs is None or a == b or (a, b) in self._pairs:
                    self.product[a, b] = self.sum[a].new_zeros(len(self.sum[a]), len(self.sum[b]))

    def copy(self) -> Moments:
        """The same moments, which share nothing that `update` changes; without `meta`."""
        copy = Moments(pairs=self._pairs, products=self.products)
        copy.n, copy.shift = self.n, dict(self.shift)
        copy.sum = {name: value.clone() for name, value in self.sum.items()}
        copy.product = {pair: value.clone() for pair, value in self.product.items()}
        return copy

    def _known(self, name: str) -> str:
        if name not in self.sum:
            raise UserError(f"no block {name!r}; these moments hold {self.names}")
        return name

    def _rows(self) -> int:
        if not self.n:
            raise UserError("these moments hold no rows")
        return self.n

    def _same_blocks(self, widths: dict[str, int]) -> None:
        mine = {name: self.width(name) for name in self.names}
        if mine != widths:
            raise UserError(f"these moments hold blocks {mine} (name: width); got {dict(sorted(widths.items()))}")

    def _product(self, a: str, b: str) -> Tensor:
        self._known(a), self._known(b)
        if (a, b) in self.product:
            return self.product[a, b]
        if (b, a) in self.product:
            return self.product[b, a].T
        raise UserError(f"the cross products of {a!r} and {b!r} were not kept; name the pair when accumulating")


def total(parts: Sequence[Moments]) -> Moments:
    """The sum of several moments; of one alone, that one itself and no copy."""
    if not parts:
        raise UserError("no moments given")
    result = parts[0]
    for i, part in enumerate(parts[1:]):
        result = result._combine(part, +1, in_place=i > 0)  # what the first sum made is nobody else's
    return result


def lower(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """The one of two floating dtypes that rounds off more.

    >>> lower(torch.float64, torch.float32)
    torch.float32
    """
    return max(a, b, key=lambda dtype: torch.finfo(dtype).eps)


def _chunks(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    step = len(x) if x.dtype == torch.float64 else ROWS
    return zip(x.split(step), y.split(step), strict=True)


@contextmanager
def _no_tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
