"""FLOPs of what this package computes, from sizes alone: two a multiply-add, matrix products and decompositions only.

Products are counted as they are made: of a symmetric one little over half (`symmetric.STRIP`). What is done element by
element is bound by memory and not counted. Decompositions have the textbook's leading terms: of eigenvalues and
eigenvectors 9 d^3, of a singular value decomposition 20 m n^2 (m >= n), of a Cholesky factor d^3 / 3 (Golub and Van Loan,
Matrix Computations, 4th edition, sections 8.3, 8.6 and 4.2).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .symmetric import STRIP


def product_flops(n: int, inner: int, m: int) -> float:
    """[n, inner] @ [inner, m]."""
    return 2.0 * n * inner * m


def symmetric_flops(d: int, n: float, device: str = "cpu") -> float:
    """[d, n] @ [n, d] where that is symmetric: `symmetric.symmetric_product`, and `gram` of n rows.

    >>> symmetric_flops(256, 10) == product_flops(256, 10, 256), symmetric_flops(1024, 10) / product_flops(1024, 10, 1024)
    (True, 0.625)
    """
    step = STRIP.get(device, d)
    return sum(2.0 * n * (min(start + step, d) - start) * (d - start) for start in range(0, d, step))


def eigh_flops(d: int) -> float:
    """Eigenvalues and eigenvectors of a symmetric [d, d]."""
    return 9.0 * d**3


def svd_flops(n: int, d: int) -> float:
    """The thin singular value decomposition of [n, d]."""
    return 20.0 * max(n, d) * min(n, d) ** 2


def cholesky_flops(d: int) -> float:
    """The factor of a positive definite [d, d]."""
    return d**3 / 3


def moments_flops(
    n: float, widths: Sequence[int], pairs: Iterable[tuple[int, int]] | None = None, device: str = "cpu"
) -> float:
    """`Moments.update` of n rows of blocks of these widths.

    pairs: indices of the blocks whose cross products are kept; None keeps all. Those within each block always are.

    >>> moments_flops(10, [4, 4]) == 2 * symmetric_flops(4, 10) + product_flops(4, 10, 4)
    True
    """
    own = sum(symmetric_flops(d, n, device) for d in widths)
    if pairs is None:
        cross = (sum(widths) ** 2 - sum(d * d for d in widths)) / 2
    else:
        cross = sum(widths[a] * widths[b] for a, b in {(min(p), max(p)) for p in pairs if p[0] != p[1]})
    return own + 2.0 * n * cross


def ridge_flops(d: int, targets: Sequence[int], *, alphas: int = 1, folds: int = 0, device: str = "cpu") -> float:
    """`fit_ridge_targets` of a source of width d to targets of these widths.

    folds: as many where the penalty of `alphas` candidates is chosen by cross-validation, 0 for GCV or a given one.
    """
    own = eigh_flops(d) + sum(2 * product_flops(d, d, e) for e in targets)
    each = eigh_flops(d) + product_flops(d, d, d) + symmetric_flops(d, d, device)
    each += sum(2 * product_flops(d, d, e) + symmetric_flops(d, e, device) for e in targets)
    each += len(targets) * (product_flops(alphas, d, d) + product_flops(alphas, d, 1))
    return own + folds * each


def procrustes_flops(n: int, d: int, e: int) -> float:
    """`fit_procrustes` of n rows of widths d and e."""
    return product_flops(d, n, e) + svd_flops(d, e) + product_flops(d, min(d, e), e) + product_flops(1, d, e)


def reduced_rank_flops(d: int, e: int, rank: int) -> float:
    """`optimal_ranks` of a source d to a target e, decomposition and all, and its map of one rank."""
    k = min(d, e)
    family = eigh_flops(d) + product_flops(d, d, e) + product_flops(e, d, e) + eigh_flops(e)
    family += product_flops(d, e, k) + product_flops(d, d, k)
    return family + product_flops(d, rank, e) + product_flops(1, d, e)


def factor_flops(n: int, d: int, device: str = "cpu") -> float:
    """`Solver.factor` of n rows of width d: the smaller of X'X and XX', its eigenvectors, and the rows in them."""
    if n < d:
        return symmetric_flops(n, d, device) + eigh_flops(n)
    return symmetric_flops(d, n, device) + eigh_flops(d) + product_flops(n, d, d)


def pinv_flops(n: int, d: int, e: int) -> float:
    """pinv(X) Y by `torch.linalg.pinv`, formed: X [n, d], Y [n, e]."""
    return svd_flops(n, d) + product_flops(d, min(n, d), n) + product_flops(d, n, e)


def formed_fold_flops(d_recipient: int, d_donor: int, rank: int) -> float:
    """`paste.fold` of an adapter part of a rank through two maps that are there."""
    return 2 * product_flops(d_recipient, d_donor, rank) + product_flops(1, d_donor, rank)


def solver_fold_flops(n: int, d_recipient: int, d_donor: int, rank: int) -> float:
    """An adapter part folded through both solvers of n rows (`Solver.coefficients`, `project`), no map formed."""
    rows = product_flops(n, d_donor, rank) + product_flops(rank, n, d_recipient)
    return rows + sum(_along_flops(n, d, rank) + product_flops(rank, n, min(n, d)) for d in (d_recipient, d_donor))


def gram_fold_flops(n: int, d_recipient: int, d_donor: int, rank: int, device: str = "cpu") -> float:
    """`paste.fold_gram` of an adapter part: pinv(X) (Y V) and (U pinv(Y)) X through the Gram matrices of n rows."""
    if n >= min(d_recipient, d_donor):
        factors = factor_flops(n, d_recipient, device) + factor_flops(n, d_donor, device)
        return factors + solver_fold_flops(n, d_recipient, d_donor, rank)
    gram = symmetric_flops(n, d_recipient, device) + symmetric_flops(n, d_donor, device)
    solves = 2 * (cholesky_flops(n) + 2 * product_flops(n, n, rank))
    return gram + solves + 2 * product_flops(n, d_donor, rank) + 2 * product_flops(rank, n, d_recipient)


def _along_flops(n: int, d: int, rank: int) -> float:
    """`Solver.along` or `out_of` of as many vectors as the rank: by way of the rows where these are fewer than d."""
    if n < d:
        return product_flops(rank, d, n) + product_flops(rank, n, n)
    return product_flops(rank, d, d)
