"""Products that are known to be symmetric: what lies below the diagonal is not multiplied again.

On the CPU NumPy's BLAS and LAPACK do what torch's do in about twice the time (x^T x of 4,096 x 2,304 in float32: 0.11 s
for 0.23 s of two threads; all eigenvectors of 2,304 x 2,304 in float64: 1.0 s for 1.7 s). Below a width of 1,024 that is lost
again where torch's threads spin beside NumPy's.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

WIDE = 1024
"""columns from which NumPy is used"""
STRIP = {"cpu": 256, "cuda": 2048}
"""rows of the result made at once: fewer save more of the lower half, and keep less of a device busy"""


def gram(x: Float[Tensor, "n d"], room: Float[Tensor, "d d"] | None = None) -> Float[Tensor, "d d"]:
    """x^T x; in `room` where that is given and there is use for it.

    >>> gram(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist()
    [[10.0, 14.0], [14.0, 20.0]]
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or x.shape[1] < WIDE:
        return symmetric_product(x.T, x)
    rows = x.detach().numpy()
    out = np.empty((x.shape[1],) * 2, rows.dtype) if room is None else room.numpy()
    np.matmul(rows.T, rows, out=out)  # a product with itself, which NumPy knows to be symmetric
    return torch.from_numpy(out)


def eigh(s: Float[Tensor, "d d"]) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    """Eigenvalues, ascending, and eigenvectors (columns) of a symmetric matrix, as torch.linalg.eigh.

    >>> [round(v, 6) for v in eigh(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))[0].tolist()]
    [1.0, 3.0]
    """
    if s.device.type != "cpu" or len(s) < WIDE:
        values, vectors = torch.linalg.eigh(s)
        return values, vectors
    found = np.linalg.eigh(s.detach().numpy())
    return torch.from_numpy(found.eigenvalues), torch.from_numpy(found.eigenvectors)


def symmetric_product(a: Float[Tensor, "d n"], b: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    """a @ b, where that is symmetric: its upper half in strips, then mirrored; little over half the work.

    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> symmetric_product(x.T, x).tolist()
    [[10.0, 14.0], [14.0, 20.0]]
    """
    strips = list(_strips(a))
    if len(strips) == 1:
        return a @ b
    out = torch.empty(len(a), len(a), dtype=a.dtype, device=a.device)
    for start, stop in strips:
        torch.matmul(a[start:stop], b[:, start:], out=out[start:stop, start:])
        out[stop:, start:stop] = out[start:stop, stop:].T
    return out


def quadratic_diagonal(s: Float[Tensor, "d d"], w: Float[Tensor, "d k"]) -> Float[Tensor, " k"]:
    """The diagonal of w^T s w for a symmetric s, [k]: sum over i <= j of w_i s_ij w_j, those beside the diagonal twice.

    >>> quadratic_diagonal(torch.eye(2), torch.tensor([[3.0, 1.0], [4.0, 0.0]])).tolist()
    [25.0, 1.0]
    """
    total = torch.zeros_like(w[0])
    for start, stop in _strips(s):
        mine = w[start:stop]
        part = torch.addmm(s[start:stop, start:stop] @ mine, s[start:stop, stop:], w[stop:], alpha=2)
        total += (mine * part).sum(0)
    return total


def _strips(a: Tensor) -> Iterator[tuple[int, int]]:
    step = STRIP.get(a.device.type, len(a))
    return ((start, min(start + step, len(a))) for start in range(0, len(a), step))
