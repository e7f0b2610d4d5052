"""Paste: a donor's adapter rewritten in the recipient's own basis, through converters that fold into it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from .adapters.adapter import Adapter, LowRank
from .errors import UserError
from .maps.linear_map import LinearMap
from .maps.solver import Solver
from .maps.symmetric import gram
from .sites import Site

if TYPE_CHECKING:
    from .convert import Converter


SAFE = 1e-9  # of the trace: a smallest eigenvalue above it leaves a solve in float64 seven digits at least


@dataclass(frozen=True)
class Capture:
    """How much of an adapter part lies in the span of a profile, which is all that a map fitted on it can carry."""

    read: float
    """||P V|| / ||V||, P the projector on the span of the profile's rows"""
    write: float
    """||U P|| / ||U||; about sqrt(n / d) for rows without structure"""
    warning: str | None
    """set where the write side loses more than a tenth"""


def fold_part(part: LowRank, to_donor: LinearMap, to_recipient: LinearMap) -> LowRank:
    """The adapter part of the recipient that equals converting, adapting and converting back.

    V' = to_donor.W @ V, b' = b + to_donor.b @ V, U' = U @ to_recipient.W. The map back never adds its bias: a delta is
    a difference. Products in float64, the result in the wider of the two dtypes.

    Args:
        part: of the donor, [d_D, r] and [r, d_D].
        to_donor: recipient -> donor, W [d_R, d_D]; to_recipient: donor -> recipient, W [d_D, d_R].

    Raises:
        UserError: widths that do not meet, naming them.

    >>> part = LowRank(torch.ones(2, 1), torch.zeros(1), torch.ones(1, 2))
    >>> fold_part(part, LinearMap.identity(2), LinearMap.identity(2)) == part
    True

    Source: arXiv:2506.19140, eq. 3; there the three steps are taken at run time and the maps have no bias.
    """
    _check_widths(part, to_donor, to_recipient)
    dtype = torch.promote_types(part.V.dtype, to_donor.weight.dtype)
    device = part.V.device
    read, bias, write = (t.to(device).double() for t in (to_donor.weight, to_donor.bias, to_recipient.weight))
    v = part.V.double()
    b, u = part.b.double() + bias @ v, part.U.double() @ write
    return LowRank((read @ v).to(dtype), b.to(dtype), u.to(dtype), part.act)


def fold_gram(part: LowRank, x: Float[Tensor, "n d_R"], y: Float[Tensor, "m d_D"]) -> LowRank:
    """`fold_part` through the published converters, pinv(X) Y and pinv(Y) X, which are never formed.

    V' = pinv(X) (Y V), b' = b, U' = (U pinv(Y)) X, by the Cholesky factor of XX' where n < d and no direction is near
    being cut, else by the eigenvectors of the smaller Gram matrix of each side.

    Args:
        part: of the donor.
        x: recipient rows, [n, d_R]; y: donor rows of the same prompts, [n, d_D].

    Raises:
        UserError: rows that do not pair, or a width other than the part's.
    """
    if len(x) != len(y):
        raise UserError(f"x and y must pair row by row; got {len(x)} rows of x and {len(y)} rows of y")
    if y.shape[1] != part.width:
        raise UserError(f"this adapter part has width {part.width}; the donor's rows have width {y.shape[1]}")
    x, y = x.double(), y.double()
    v = _pinv_times(x, y @ part.V.to(y))
    u = _pinv_times(y, x, part.U.to(y))
    dtype = torch.promote_types(part.V.dtype, torch.float32)
    return LowRank(v.to(dtype), part.b.to(v.device, dtype), u.to(dtype), part.act)


def _pinv_times(x: Tensor, y: Tensor, u: Tensor | None = None) -> Tensor:
    """pinv(x) @ y, or u @ pinv(x) @ y, in float64; pinv(x) = x' (x x')^-1 where the rows are independent."""
    # Two thirds of the time of a fold are its two symmetric products, at the rate that the processor has for float64.
    # Tried and no faster: eigenvectors in place of the Cholesky factor, and the products a stretch of columns at a time. In
    # float32 they take half of the time, but x x' squares the condition of a profile, and 1e-5 has to be kept.
    if len(x) < x.shape[1]:
        products = gram(x.T)
        factor, failed = torch.linalg.cholesky_ex(products)
        if not failed and _smallest(factor) > SAFE * float(products.diagonal().sum()):
            if u is None:
                return (torch.cholesky_solve(y, factor).T @ x).T  # x' z the other way round takes 1/40 of the time
            return torch.cholesky_solve(x @ u.T, factor).T @ y
    solver = Solver.factor(x, centre=False)
    return solver.coefficients(y, 0.0) if u is None else solver.project(u, y, 0.0)


def _smallest(factor: Tensor, steps: int = 8) -> float:
    """An estimate of the smallest eigenvalue of L L', from above, by inverse iteration: within a factor of two."""
    at = torch.randn(len(factor), 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(factor)
    for _ in range(steps):
        at = torch.linalg.qr(torch.cholesky_solve(at, factor)).Q
    return float((factor.T @ at).norm(dim=0).square().min())


def three_step(
    part: LowRank, to_donor: LinearMap, to_recipient: LinearMap, h: Float[Tensor, "*batch d_R"]
) -> Float[Tensor, "*batch d_R"]:
    """The recipient's delta as published: h_D = to_donor(h), delta_D = part.delta(h_D), delta_D @ to_recipient.W.

    The reference that `fold_part` is tested against; at run time the fold is what is used.
    """
    _check_widths(part, to_donor, to_recipient)
    return part.delta(to_donor(h)) @ to_recipient.weight.to(h)


def paste_adapter(
    adapter: Adapter,
    converters: Sequence[Converter],
    *,
    recipient_fingerprint: Mapping[str, str] | None = None,
    strength: int | float = 1.0,
) -> Adapter:
    """The donor's adapter as an ordinary adapter of the recipient: no donor, converter or profile is needed after.

    Where several donor layers meet at one recipient site, their deltas are summed on the same state.

    Args:
        adapter: of the donor.
        converters: one for each site that the adapter edits; those for other sites are not used.
        recipient_fingerprint: kept as `base` of the result, so that it is refused by another model.
        strength: factor on the adapter's own strength.

    Raises:
        UserError: a site of the adapter without a converter, or with two; widths that do not meet.
    """
    if adapter.terms:
        made = [paste_adapter(t, converters, recipient_fingerprint=recipient_fingerprint) for t in adapter.split()]
        whole = functools.reduce(Adapter.__add__, made) * strength
        meta = {**made[0].meta, "pairs": [pair for one in made for pair in one.meta["pairs"]]}
        return replace(whole, name=adapter.name, meta=meta)
    by_donor: dict[Site, Converter] = {}
    for converter in converters:
        if converter.donor in by_donor:
            raise UserError(f"two converters for the donor's {converter.donor}; give one for each site")
        by_donor[converter.donor] = converter
    missing = [str(site) for site in adapter.parts if site not in by_donor]
    if missing:
        have = ", ".join(map(str, by_donor)) or "none"
        raise UserError(f"no converter for {', '.join(missing)} (given: {have}); fit them, or use adapter.only(layers)")
    parts: dict[Site, LowRank] = {}
    pairs, evidence = [], []
    for site, part in adapter.parts.items():
        used = by_donor[site]
        folded = fold_part(part, used.to_donor, used.to_recipient)
        parts[used.recipient] = parts[used.recipient] + folded if used.recipient in parts else folded
        pairs.append([str(site), str(used.recipient), used.method])
        if used.quality_to_donor or used.quality_to_recipient:
            evidence.append(used.as_dict())
    return Adapter(
        parts,
        positions=adapter.positions,
        strength=adapter.strength * strength,
        name=adapter.name,
        base=dict(recipient_fingerprint or {}),
        meta={"kind": "paste", "donor": dict(adapter.base), "pairs": pairs, "evidence": {"converters": evidence}},
    )


def capture(part: LowRank, profile: Float[Tensor, "n d"]) -> Capture:
    """The share of an adapter part's read and write side that lies in the span of a donor profile's rows.

    >>> part = LowRank(torch.eye(4)[:, :1], torch.zeros(1), torch.eye(4)[1:2])
    >>> capture(part, torch.eye(4)[:1]).read, capture(part, torch.eye(4)[:1]).write
    (1.0, 0.0)
    """
    span = Solver.factor(profile, centre=False).q
    read = float((span.T @ part.V.to(span)).norm() / part.V.to(span).norm())
    write = float((part.U.to(span) @ span).norm() / part.U.to(span).norm())
    n, d = profile.shape
    warning = None
    if write < 0.9:
        warning = (
            f"the profile ({n} rows of width {d}) spans {write:.0%} of what the adapter writes: profile more prompts"
        )
    return Capture(read, write, warning)


def _check_widths(part: LowRank, to_donor: LinearMap, to_recipient: LinearMap) -> None:
    if not part.width == to_donor.d_out == to_recipient.d_in or to_donor.d_in != to_recipient.d_out:
        raise UserError(
            f"widths do not meet: the adapter part has {part.width}, the map to the donor goes {to_donor.d_in} -> "
            f"{to_donor.d_out}, the map back {to_recipient.d_in} -> {to_recipient.d_out}"
        )
