"""PairedProfiles: two profiles of the same prompts, row for row, each layer read and factorised once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from .maps.counts import factor_flops, solver_fold_flops
from .maps.moments import Moments
from .maps.pair_factors import PairFactors
from .maps.solver import Solver
from .row_pairs import BATCH, Names, RowPairs, donor_name, moments, recipient_name
from .sites import Site

if TYPE_CHECKING:
    from .store import Store

ROW_BUDGET = 1 << 26  # numbers of one site's rows that are held at once: 256 MiB of float32
SUM_BUDGET = 1 << 27  # numbers of moments that one pass over the rows accumulates: 1 GiB of float64
Made = TypeVar("Made")


@dataclass
class PairedProfiles:
    """The rows of a donor and a recipient that answer to one another, and what is computed from them once.

    Rows that are too many to hold (`row_budget` numbers of a site) and more than twice as many as the width are summed
    up in batches instead; `summed` says so.

    Args:
        holdout: share of the prompts that is not fitted, drawn with `seed`.
        shuffled: the control: donor rows of other prompts.
        pairing: `last` or `aligned` (`row_pairs.RowPairs.of`).
    """

    donor: Store
    recipient: Store
    holdout: float = 0.2
    seed: int = 0
    shuffled: bool = False
    pairing: str = "last"
    row_budget: int = ROW_BUDGET
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False)
    _sums: dict[Names, Moments] = field(default_factory=dict, repr=False)
    _donors: dict[Any, Any] = field(default_factory=dict, repr=False)  # of the donor alone; may be shared

    def __post_init__(self) -> None:
        self.rows, held = RowPairs.of(self.donor, self.recipient, self.pairing).split(self.holdout, self.seed)
        if self.shuffled:
            self.rows = self.rows.shuffled(self.seed + 1)
        widest = max(s.width(site) for s in (self.donor, self.recipient) for site in s.sites)
        most = max(self.row_budget // widest, 2 * widest)
        self.summed = len(self.rows) > most  # rows are read in batches, never held
        self.held = held.spread(most)
        self._sample = self.rows.spread(most)

    @property
    def fit_rows(self) -> Tensor:
        """The donor's rows that are fitted."""
        return self.rows.donor

    @property
    def held_rows(self) -> Tensor:
        """The donor's rows that are held out."""
        return self.held.donor

    def states(self, side: str, site: Site, held: bool = False) -> Float[Tensor, "n d"]:
        """Rows of one site, those that are fitted or those held out (float32); of too many, an even sample."""
        store, pairs = self._store(side), self.held if held else self._sample
        rows = pairs.donor if side == "donor" else pairs.recipient
        return self._once(side, ("states", site, held), lambda: store.read(site, rows, dtype=torch.float32))

    def shape(self, side: str, site: Site) -> tuple[int, int]:
        """(rows that are fitted, width) of a site."""
        return len(self.rows), self._store(side).width(site)

    def mean(self, side: str, site: Site) -> Float[Tensor, " d"]:
        """Mean of the fitted rows of a site, float64."""
        return self.solver(side, site, True).mean

    def solver(self, side: str, site: Site, centre: bool) -> Solver:
        """Factorised rows: centred for all but pinv; for that uncentred, with the cut of torch's pinv on float32 rows.

        Where rows are summed up, pinv's cut counts the width alone: counting millions of rows, it would cut all.
        """
        return self._once(side, ("solver", site, centre), lambda: self._solver(side, site, centre))

    def _solver(self, side: str, site: Site, centre: bool) -> Solver:
        n, width = self.shape(side, site)
        rtol = 0.0 if centre else (width if self.summed else max(n, width)) * torch.finfo(torch.float32).eps
        if not self.summed:
            return Solver.factor(self.states(side, site), centre, rtol)
        name = (donor_name if side == "donor" else recipient_name)(site)
        found = self._moments_of(side, site)
        products = found.cov(name, name) if centre else found.raw(name, name)
        return Solver.of_products(products, found.mean(name), n, centre, rtol)

    def factors(self, donor: Site, recipient: Site) -> PairFactors:
        """Both sides of a pair in coordinates: x the recipient's rows, y the donor's."""
        x, y = self.solver("recipient", recipient, True), self.solver("donor", donor, True)
        if not self.summed:
            return PairFactors.of_rows(x, y)
        return PairFactors.of_cross(x, y, self._cross(donor, recipient, True))

    def cka(self, donor: Site, recipient: Site) -> float:
        """Debiased CKA of the fitted rows of both sites."""
        return self.factors(donor, recipient).cka(
            (self._lengths("recipient", recipient), self._lengths("donor", donor))
        )

    def length(self, site: Site, delta: Float[Tensor, "n d"]) -> float:
        """Mean length of deltas of the recipient at `site`, in standard deviations of its profile (`Solver.length`)."""
        return float(self.solver("recipient", site, True).length(delta).mean())

    def flops(self, parts: Sequence[tuple[Site, Site, int]]) -> float:
        """FLOPs of a paste of (donor site, recipient site, rank) each: factorising both profiles and folding.

        `maps.counts` has the formulas; each side is factorised once, however many parts it serves.
        """
        sites = {("donor", d) for d, _, _ in parts} | {("recipient", r) for _, r, _ in parts}
        total = sum(factor_flops(*self.shape(side, site)) for side, site in sites)
        for d, r, rank in parts:
            (n, a), b = self.shape("donor", d), self.shape("recipient", r)[1]
            total += solver_fold_flops(n, b, a, rank)
        return total

    # -- rows and sums ------------------------------------------------------------------------------------------------

    def _store(self, side: str) -> Store:
        return self.donor if side == "donor" else self.recipient

    def _once(self, side: str, key: Any, make: Callable[[], Made]) -> Made:
        kept = self._donors if side == "donor" else self._cache
        if key not in kept:
            kept[key] = make()
        return kept[key]

    def _lengths(self, side: str, site: Site) -> Float[Tensor, " n"]:
        """Squared lengths of the centred rows."""
        mean = self.mean(side, site)
        if not self.summed:
            return (self.states(side, site).double() - mean).square().sum(1)
        rows = self.rows.donor if side == "donor" else self.rows.recipient
        read = self._store(side).iter_batches(site, BATCH, rows, dtype=torch.float64)
        return self._once(side, ("lengths", site), lambda: torch.cat([(x - mean).square().sum(1) for x in read]))

    def _cross(self, donor: Site, recipient: Site, centre: bool) -> Float[Tensor, "d_R d_D"]:
        found = self._moments(donor, recipient)
        names = recipient_name(recipient), donor_name(donor)
        return found.cov(*names) if centre else found.raw(*names)

    def _moments_of(self, side: str, site: Site) -> Moments:
        """Any moments that hold a site, at hand or else made."""
        mine = 0 if side == "donor" else 1
        for key, found in self._sums.items():
            if key[mine] == site:
                return found
        return self._moments(*((site, self.recipient.sites[0]) if side == "donor" else (self.donor.sites[0], site)))

    def _moments(self, donor: Site, recipient: Site) -> Moments:
        """The moments of a pair; in its pass over the rows, of as many other pairs as fit in memory. One pass is kept."""
        if (donor, recipient) not in self._sums:
            everyone = [(d, r) for d in self.donor.sites for r in self.recipient.sites]
            same = [(d, r) for d, r in everyone if d == donor]
            for wanted in (everyone, same, [(donor, recipient)]):
                sizes = [self.donor.width(d) * self.recipient.width(r) for d, r in wanted]
                if 3 * sum(sizes) <= SUM_BUDGET or len(wanted) == 1:
                    break
            made = moments(self.donor, self.recipient, self.rows, wanted)
            self._sums = dict.fromkeys(wanted, made)
        return self._sums[donor, recipient]
