"""Which rows of two profiles belong together, and which of them are fitted or held out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from .errors import UserError
from .maps.fit import fold_ids
from .maps.moments import Moments
from .sites import Site

if TYPE_CHECKING:
    from .store import Store

PAIRINGS = ("last", "aligned")
BATCH = 16384  # rows read at a time where they are summed up
FOLDS = 5
Names = tuple[Site, Site]  # a site of the donor, a site of the recipient


@dataclass(frozen=True, eq=False)
class RowPairs:
    """Row `donor[i]` of one store answers to row `recipient[i]` of the other; both come from prompt `prompt[i]`."""

    donor: Int[Tensor, " n"]
    recipient: Int[Tensor, " n"]
    prompt: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.donor)

    @classmethod
    def of(cls, donor: Store, recipient: Store, pairing: str = "last") -> RowPairs:
        """Pairs the rows of two profiles of the same prompts.

        pairing: `last`, row i with row i, as stores of the last token (or of one tokenizer) have them; `aligned`, the
        rows whose tokens end at the same character (`alignment.pair_rows`), so that few prompts give many rows where
        both profiles keep all tokens. Raises UserError for stores that do not pair, and for another pairing.
        """
        if pairing not in PAIRINGS:
            raise UserError(f"unknown pairing {pairing!r} of rows; allowed: {', '.join(PAIRINGS)}")
        if pairing == "last":
            from .store import check_pair

            check_pair(donor, recipient)
            rows = torch.arange(donor.n_rows)
            return cls(rows, rows, torch.as_tensor(donor.prompt_index))
        from .alignment import pair_rows

        mine, theirs = (s.manifest["basis"] for s in (donor, recipient))
        if mine != theirs:
            raise UserError(f"stores {donor.path} and {recipient.path} do not pair: they differ in basis ({mine} and {theirs})"
                            "; profile both models with the same options")  # fmt: skip
        rows_donor, rows_recipient = pair_rows(donor, recipient)
        return cls(rows_donor, rows_recipient, torch.as_tensor(donor.prompt_index)[rows_donor])

    def take(self, index: Tensor) -> RowPairs:
        """Some of the pairs, by index or mask."""
        return RowPairs(self.donor[index], self.recipient[index], self.prompt[index])

    def spread(self, at_most: int) -> RowPairs:
        """An even sample of the pairs, in their order; all where there are no more."""
        if len(self) <= at_most:
            return self
        return self.take(torch.arange(at_most) * len(self) // at_most)

    def split(self, holdout: float = 0.2, seed: int = 0) -> tuple[RowPairs, RowPairs]:
        """(to fit, held out), whole prompts, drawn with a seed; UserError where fewer than two prompts are left to fit."""
        found = self.prompt.unique()
        n = len(found)
        if not 0 <= holdout < 1 or n - int(n * holdout) < 2:
            raise UserError(
                f"holdout {holdout} leaves {n - int(n * holdout)} of {n} prompts to fit; leave at least two"
            )
        held = torch.zeros(int(found[-1]) + 1, dtype=torch.bool)
        held[found[torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: int(n * holdout)]]] = True
        mask = held[self.prompt]
        return self.take(~mask), self.take(mask)

    def shuffled(self, seed: int) -> RowPairs:
        """The control: each row of the recipient with a donor row that was drawn for it."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return replace(self, donor=self.donor[order])


def donor_name(site: Site) -> str:
    return f"donor {site}"


def recipient_name(site: Site) -> str:
    return f"recipient {site}"


def batches(
    donor: Store, recipient: Store, rows: RowPairs, donors: Sequence[Site], recipients: Sequence[Site]
) -> Iterator[dict[str, Tensor]]:
    """The rows of some sites of both sides in batches, float32, named as `moments` names them."""
    sides = (donor.iter_batches(donors, BATCH, rows.donor, dtype=torch.float32),
             recipient.iter_batches(recipients, BATCH, rows.recipient, dtype=torch.float32))  # fmt: skip
    for mine, theirs in zip(*sides, strict=True):
        yield {donor_name(s): x for s, x in mine.items()} | {recipient_name(s): x for s, x in theirs.items()}


def moments(donor: Store, recipient: Store, rows: RowPairs, wanted: Sequence[Names]) -> Moments:
    """The moments of pairs of sites over many rows, read once, in batches: no more than a batch is held."""
    summed = Moments(pairs=[(donor_name(d), recipient_name(r)) for d, r in wanted])
    for batch in batches(donor, recipient, rows, *(list(dict.fromkeys(s)) for s in zip(*wanted, strict=True))):
        summed.update(batch)
    return summed


def folds(donor: Store, recipient: Store, rows: RowPairs, pair: Names, seed: int) -> list[Moments]:
    """The moments of one pair of sites by fold, no prompt in two of them."""
    assigned = fold_ids(len(rows), groups=rows.prompt, folds=n_folds(rows), seed=seed)
    return [moments(donor, recipient, rows.take(assigned == k), [pair]) for k in range(int(assigned.max()) + 1)]


def n_folds(rows: RowPairs) -> int:
    """Five, or one for each prompt where there are fewer."""
    return min(FOLDS, len(rows.prompt.unique()))
