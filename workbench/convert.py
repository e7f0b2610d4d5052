"""Converters between two models, and which layer of one answers to which of the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from .adapters.adapter import LowRank
from .errors import UserError
from .maps.linear_map import LinearMap
from .maps.quality import Quality, quality, r2
from .maps.solver import Solver
from .sites import Site

if TYPE_CHECKING:
    from .store import Store

METHODS = ("ridge", "pinv")


@dataclass(frozen=True, eq=False)
class Converter:
    """The two maps of one pair of sites, with how well each does on prompts that it was not fitted to.

    `to_donor` carries recipient states to the donor's space (an adapter is read through it), `to_recipient` carries
    what the adapter writes back. `quality_*` are on held-out prompts, None where nothing was held out.
    """

    donor: Site
    recipient: Site
    to_donor: LinearMap
    to_recipient: LinearMap
    method: str = "ridge"
    alpha: float = 0.0
    quality_to_donor: Quality | None = None
    quality_to_recipient: Quality | None = None

    def as_dict(self) -> dict[str, Any]:
        """The pair, the method and its quality figures, as JSON values."""
        sides = {"quality_to_donor": self.quality_to_donor, "quality_to_recipient": self.quality_to_recipient}
        warnings = [q.warning for q in sides.values() if q is not None and q.warning]
        return {
            "pair": f"{self.donor} <-> {self.recipient}",
            "method": self.method,
            "alpha": self.alpha,
            **{name: None if q is None else q.as_dict() for name, q in sides.items()},
            "warning": "; ".join(warnings) or None,
        }


def match_layers(
    donor_layers: Sequence[int],
    n_donor: int,
    n_recipient: int,
    policy: str = "nearest",
    recipient_layers: Sequence[int] | None = None,
) -> dict[int, int]:
    """Which recipient layer answers to each donor layer, by relative depth: {donor: recipient}.

    nearest: the recipient layer nearest to l * n_recipient / n_donor, ties to the lower (the released code of
    Command-V); floor: the largest not above it (its paper's formula, arXiv:2506.19140). Keys are always donor layers:
    the released code turns the map round where both lists have one length. Raises UserError for unknown policies and
    layers out of range.

    >>> match_layers([0, 2, 4], 28, 32), match_layers([0, 2, 4], 28, 32, "floor")
    ({0: 0, 2: 2, 4: 5}, {0: 0, 2: 2, 4: 4})
    """
    targets = sorted(range(n_recipient) if recipient_layers is None else recipient_layers)
    for name, layers, n in (("donor", donor_layers, n_donor), ("recipient", targets, n_recipient)):
        wrong = [l for l in layers if not 0 <= l < n]
        if wrong or not layers:
            raise UserError(f"{name} layers {wrong} are out of range: allowed 0 to {n - 1}, and at least one")
    scale = n_recipient / n_donor
    if policy == "nearest":
        return {l: min(targets, key=lambda t: (abs(t - scale * l), t)) for l in donor_layers}
    if policy == "floor":
        return {
            l: max((t for t in targets if t <= l * n_recipient // n_donor), default=targets[0]) for l in donor_layers
        }
    raise UserError(
        f"unknown layer matching {policy!r} by depth; allowed: nearest, floor (r2 and forecast need profiles)"
    )


def best_matching(scores: Mapping[tuple[int, int], float], monotone: bool = True) -> dict[int, int]:
    """The matching {donor: recipient} with the largest summed score; recipient layers never fall when monotone.

    scores: of each (donor layer, recipient layer), held-out R2 or a forecast. Dynamic programming over donor layers.
    """
    donors, recipients = sorted({d for d, _ in scores}), sorted({r for _, r in scores})
    if not monotone:
        return {d: max(recipients, key=lambda r: (scores[d, r], -r)) for d in donors}
    best: dict[int, tuple[float, tuple[int, ...]]] = {
        r: (0.0, ()) for r in recipients
    }  # best score of a path that ends at or below r
    for d in donors:
        reached: dict[int, tuple[float, tuple[int, ...]]] = {}
        top: tuple[float, tuple[int, ...]] = (float("-inf"), ())
        for r in recipients:
            score, path = best[r]
            top = max(top, (score + scores[d, r], (*path, r)), key=lambda t: t[0])
            reached[r] = top
        best = reached
    return dict(zip(donors, best[recipients[-1]][1], strict=True))


def paired_rows(donor: Store, recipient: Store, holdout: float = 0.2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(rows to fit, rows held out) of two stores that pair, split by prompt with a seed.

    Raises UserError when the stores do not pair (other prompts, positions or order).
    """
    from .store import check_pair

    check_pair(donor, recipient)
    prompts = torch.as_tensor(donor.prompt_index)
    n = int(prompts.max()) + 1
    if not 0 <= holdout < 1 or n - int(n * holdout) < 2:
        raise UserError(f"holdout {holdout} leaves {n - int(n * holdout)} of {n} prompts to fit; leave at least two")
    held = torch.zeros(n, dtype=torch.bool)
    held[torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: int(n * holdout)]] = True
    mask = held[prompts]
    return (~mask).nonzero().flatten(), mask.nonzero().flatten()


@dataclass
class ConverterFits:
    """Everything needed to fit converters between any two layers of two profiles, factorised once a layer.

    Converters are formed by `converter`, or never: `fold` takes a low-rank adapter part straight through a pair at a
    cost of rank x width (spec of the fold: arXiv:2506.19140, eq. 3; Gram form ours).
    """

    donor: Store
    recipient: Store
    holdout: float = 0.2
    seed: int = 0
    shuffled: bool = False  # the control: donor rows of other prompts
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.fit_rows, self.held_rows = paired_rows(self.donor, self.recipient, self.holdout, self.seed)
        order = torch.randperm(len(self.fit_rows), generator=torch.Generator().manual_seed(self.seed + 1))
        self._donor_rows = self.fit_rows[order] if self.shuffled else self.fit_rows

    def states(self, side: str, site: Site, held: bool = False) -> Float[Tensor, "n d"]:
        """The profile rows of one site, those that are fitted or those held out (float32)."""
        store = self.donor if side == "donor" else self.recipient
        rows = self.held_rows if held else self._donor_rows if side == "donor" else self.fit_rows
        return self._once(("states", side, site, held), lambda: store.read(site, rows, dtype=torch.float32))

    def solver(self, side: str, site: Site, centre: bool) -> Solver:
        """Factorised rows: centred for ridge; for pinv uncentred, with the cut of torch's pinv on float32 rows."""

        def make() -> Solver:
            x = self.states(side, site)
            return Solver.factor(x, centre, 0.0 if centre else max(x.shape) * torch.finfo(torch.float32).eps)

        return self._once(("solver", side, site, centre), make)

    def length(self, site: Site, delta: Float[Tensor, "n d"]) -> float:
        """Mean length of deltas of the recipient at `site`, in standard deviations of its profile (`Solver.length`)."""
        return float(self.solver("recipient", site, True).length(delta).mean())

    def _once(self, key: Any, make: Any) -> Any:
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def converter(self, donor: Site, recipient: Site, method: str = "ridge", alpha: float = 0.1) -> Converter:
        """Both maps of one pair, with their quality on the held-out prompts."""
        centre, alpha = _method(method, alpha)
        x, y = self.states("recipient", recipient), self.states("donor", donor)
        there = self.solver("recipient", recipient, centre).solve(y, alpha)
        back = self.solver("donor", donor, centre).solve(x, alpha)
        made = Converter(donor, recipient, there, back, method, alpha)
        if len(self.held_rows) < 2:
            return made
        hx, hy = self.states("recipient", recipient, held=True), self.states("donor", donor, held=True)
        return replace(
            made,
            quality_to_donor=quality(there, hx, hy, back=back, train_mean=y.mean(0), n_train=len(y)),
            quality_to_recipient=quality(back, hy, hx, back=there, train_mean=x.mean(0), n_train=len(x)),
        )

    def flops(self, parts: Sequence[tuple[Site, Site, int]]) -> float:
        """FLOPs of a paste of (donor site, recipient site, rank) each: factorising both profiles and folding.

        Two a multiply-add, and 9 k^3 for an eigendecomposition (Golub and Van Loan, Matrix Computations, section 8.3).
        """
        total = 0.0
        for side, site in {("donor", d) for d, _, _ in parts} | {("recipient", r) for _, r, _ in parts}:
            n, width = self.states(side, site).shape
            k = min(n, width)
            total += 4.0 * n * width * k + 9.0 * k**3
        for d, r, rank in parts:
            (n, a), b = self.states("donor", d).shape, self.states("recipient", r).shape[1]
            total += 4.0 * n * rank * (a + b) + 2.0 * rank * (min(n, a) * a + min(n, b) * b)
        return total

    def fold(self, part: LowRank, donor: Site, recipient: Site, method: str = "ridge", alpha: float = 0.1) -> LowRank:
        """An adapter part of the donor at `donor` as one of the recipient at `recipient`; equals folding `converter`."""
        centre, alpha = _method(method, alpha)
        x, y = self.states("recipient", recipient).double(), self.states("donor", donor).double()
        read = self.solver("recipient", recipient, centre)
        v64 = part.V.double()
        v = read.coefficients(y @ v64, alpha)  # W @ V, the width of the donor never squared
        b = part.b.double()
        if centre:
            b = b + y.mean(0) @ v64 - read.mean @ v
        u = self.solver("donor", donor, centre).project(part.U, x, alpha)
        return LowRank(v.float(), b.float(), u.float(), part.act)


def _method(method: str, alpha: float) -> tuple[bool, float]:
    if method not in METHODS:
        raise UserError(f"unknown converter {method!r}; allowed: {', '.join(METHODS)}")
    if not 0 <= alpha < float("inf"):
        raise UserError(f"alpha {alpha} is not a number of 0 or more, in units of the mean diagonal of X'X")
    return (True, alpha) if method == "ridge" else (False, 0.0)


def fit_converters(
    donor: Store,
    recipient: Store,
    pairs: Iterable[tuple[Site | int, Site | int]] | Mapping[int, int],
    *,
    method: str = "ridge",
    alpha: float = 0.1,
    holdout: float = 0.2,
    seed: int = 0,
) -> list[Converter]:
    """Fits the converters of the pairs (donor site, recipient site) on two profiles of the same prompts.

    method: `ridge` (centred, with bias; `alpha` in units of the mean diagonal of X'X) or `pinv` (uncentred, no bias, as
    published). holdout: the share of prompts kept for the quality figures. Raises UserError when the stores do not pair
    or lack a site.
    """
    fits = ConverterFits(donor, recipient, holdout, seed)
    listed = pairs.items() if isinstance(pairs, Mapping) else pairs
    return [fits.converter(Site.parse(d), Site.parse(r), method, alpha) for d, r in listed]


def r2_table(
    fits: ConverterFits, donors: Sequence[Site], recipients: Sequence[Site], alpha: float
) -> dict[tuple[int, int], float]:
    """Held-out R2 (variance-weighted) of the map to the donor, for every pair of layers: what `best_matching` takes."""
    table = {}
    for d in donors:
        for r in recipients:
            there = fits.solver("recipient", r, True).solve(fits.states("donor", d), alpha)
            held = fits.states("donor", d, held=True)
            table[d.layer, r.layer] = r2(held, there(fits.states("recipient", r, held=True))).weighted
    return table
