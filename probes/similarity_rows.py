"""The rows of two stores that answer to one another, in shards of whole prompts, and the layers that are read at them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import UserError
from workbench.maps.fit import fold_ids
from workbench.row_pairs import PAIRINGS, RowPairs
from workbench.sites import Site
from workbench.store import Store

LEAST_PROMPTS, LEAST_ROWS = 4, 8
HELD = 2 << 30
"""bytes of rows, in float64, that are held; of more, every layer is read anew each time"""


@dataclass(frozen=True, eq=False)
class ChosenRows:
    """Pairs of rows, those of a prompt and those of a shard lying together.

    Args:
        pairs: row `donor[i]` of the first store with row `recipient[i]` of the second.
        shards: rows of each shard.
        sample: the pairs that RSA and nearest neighbours look at: as many of one prompt as of any other.
        per_prompt: how many.
    """

    pairs: RowPairs
    shards: tuple[int, ...]
    sample: Int[Tensor, " m"]
    per_prompt: int
    pairing: str
    notes: tuple[str, ...] = ()

    @property
    def spans(self) -> list[slice]:
        """Where the rows of each shard lie."""
        ends = torch.tensor((0, *self.shards)).cumsum(0).tolist()
        return [slice(a, b) for a, b in pairwise(ends)]

    def shuffled(self, seed: int) -> tuple[Int[Tensor, " n"], Int[Tensor, " m"]]:
        """Orders of all rows and of the sample in which the rows of a prompt stay together and prompts are shuffled."""
        g = torch.Generator().manual_seed(seed)
        found = self.pairs.prompt.unique()
        place = torch.zeros(int(found[-1]) + 1, dtype=torch.int64)
        place[found] = torch.randperm(len(found), generator=g)
        every = self.pairs.prompt
        return place[every].argsort(stable=True), place[every[self.sample]].argsort(stable=True)


def choose_rows(
    a: Store,
    b: Store,
    *,
    pairing: str = "auto",
    max_rows: int = 4096,
    sample: int = 768,
    shards: int = 10,
    seed: int = 0,
) -> ChosenRows:
    """Which rows of two stores of the same prompts are compared.

    pairing: `last`, row i with row i; `aligned`, rows whose tokens end at the same character; `auto`, the first where the
        stores keep the last token or are of one tokenizer, else the second.
    max_rows: of more, so many are taken, spread evenly over the prompts. sample: rows of the sample, drawn with `seed`.

    Raises UserError for stores that do not pair, and for too few prompts or rows.
    """
    if pairing not in ("auto", *PAIRINGS):
        raise UserError(f"unknown pairing {pairing!r:.40} of rows; allowed: auto, {', '.join(PAIRINGS)}")
    if max_rows < LEAST_ROWS or sample < LEAST_ROWS:
        raise UserError(f"max_rows {max_rows} and sample {sample} must be at least {LEAST_ROWS}")
    if pairing == "auto":
        same = a.fingerprint.get("tokenizer") == b.fingerprint.get("tokenizer")
        pairing = "last" if a.tokens == b.tokens and (same or a.tokens == "last") else "aligned"
    every = RowPairs.of(a, b, pairing)
    pairs, notes = every.spread(max_rows), []
    if len(pairs) < len(every):
        notes.append(f"{len(pairs):,} of {len(every):,} pairs of rows are compared, spread evenly over the prompts")
    n_prompts = len(pairs.prompt.unique())
    if n_prompts < LEAST_PROMPTS or len(pairs) < LEAST_ROWS:
        raise UserError(f"stores {a.path} and {b.path} share {len(pairs)} rows of {n_prompts} prompts; a comparison needs at "
                        f"least {LEAST_ROWS} rows of {LEAST_PROMPTS} prompts: profile more")  # fmt: skip
    of = fold_ids(len(pairs), groups=pairs.prompt, folds=min(shards, n_prompts), seed=seed)
    order = of.argsort(stable=True)  # rows of a prompt lie together already
    pairs, of = pairs.take(order), of[order]
    chosen, each, left_out = _sample(pairs.prompt, sample, seed)
    if len(chosen) < len(pairs):
        notes.append(f"RSA and nearest neighbours: a sample of {len(chosen):,} rows, {each} of each prompt, drawn with seed "
                     f"{seed}" + (f"; {left_out} prompts with fewer rows are not in it" if left_out else ""))  # fmt: skip
    return ChosenRows(pairs, tuple(of.bincount().tolist()), chosen, each, pairing, tuple(notes))


def _sample(prompt: Tensor, most: int, seed: int) -> tuple[Tensor, int, int]:
    """As many rows of each prompt: their places, ascending; how many of each; prompts that have fewer."""
    g = torch.Generator().manual_seed(seed)
    found, counts = prompt.unique(return_counts=True)
    each = max(1, min(most // len(found), int(counts.double().quantile(0.1))))
    enough = found[counts >= each]
    picked = enough[torch.randperm(len(enough), generator=g)[: max(1, most // each)]]
    taken = []
    for one in picked.tolist():
        rows = (prompt == one).nonzero()[:, 0]
        taken.append(rows[torch.randperm(len(rows), generator=g)[:each].sort().values])
    return torch.cat(taken).sort().values, each, int((counts < each).sum())


class SiteRows:
    """Layers of a store at some rows, read one at a time and held while there is room; see `shard_products.Layers`."""

    def __init__(self, store: Store, sites: Sequence[Site], rows: Int[Tensor, " n"], device: str = "cpu") -> None:
        self.store, self.sites, self.rows, self.device = store, list(sites), rows, device
        self.widths = [store.width(site) for site in self.sites]
        self._hold = 8 * len(rows) * sum(self.widths) <= HELD
        self._held: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.sites)

    def centred(self, i: int) -> Float[Tensor, "n d"]:
        """The rows of layer i about their mean, float64. Raises UserError where they are not finite."""
        if i in self._held:
            return self._held[i]
        x = self.store.read(self.sites[i], self.rows, dtype=torch.float32).to(self.device).double()
        if not bool(torch.isfinite(x).all()):
            raise UserError(
                f"store {self.store.path}: {self.sites[i]} holds NaN or infinite values; profile again in float32"
            )
        x = x - x.mean(0)
        if self._hold:
            self._held[i] = x
        return x

    def gram(self, i: int, some: Int[Tensor, " m"]) -> Float[Tensor, "m m"]:
        """Inner products of some of the rows."""
        x = self.centred(i)[some.to(self.device)]
        return (x @ x.T).cpu()
