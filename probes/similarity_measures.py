"""The measures of likeness, for all pairs of layers at once: their values, without each shard, and with shuffled prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import UserError
from workbench.maps.pair_spectra import BETWEEN, PairSpectra, spectra_flops
from workbench.maps.row_likeness import Dissimilarities, NearestRows, cosines
from workbench.maps.shard_products import Grams, ShardProducts, product_flops, shuffled_products
from workbench.progress import progress

from .similarity_rows import ChosenRows, SiteRows

WORDS = {
    "cka": "linear CKA",
    "cka_debiased": "linear CKA, debiased",
    "svcca": "SVCCA (mean correlation)",
    "pwcca": "PWCCA (weighted mean correlation)",
    "procrustes": "Procrustes similarity",
    "rsa": "RSA (Spearman's correlation)",
    "knn": "mutual nearest neighbours (share)",
}
MEASURES = tuple(WORDS)
BY_PRODUCTS, BY_SPECTRA, BY_ROWS = MEASURES[:2], MEASURES[2:5], MEASURES[5:]
MOST = {"cpu": 3e12, "cuda": 1e15}
"""FLOPs that the measures of one kind may take unless they are asked for by name: a few minutes"""


@dataclass(frozen=True, eq=False)
class Found:
    """One measure of every pair, [a, b]; without each shard, [k, a, b]; and of each draw of shuffled prompts, [draws, a, b]."""

    measure: str
    value: Float[Tensor, "a b"]
    left: Float[Tensor, "k a b"] | None
    null: Float[Tensor, "draws a b"] | None
    shards: tuple[int, ...]
    rows: int


def measure_all(
    left: SiteRows, right: SiteRows, chosen: ChosenRows, measures: Sequence[str] | None, *, k: int = 10,
    variance: float = 0.99, permutations: int = 20, seed: int = 0,
) -> tuple[list[Found], list[str]]:  # fmt: skip
    """Every measure, in the order of `MEASURES`, and notes on what was left out or costs much.

    measures: None: all that take no more than `MOST`; what is named is computed whatever it takes.
    """
    orders = [chosen.shuffled(seed + 1 + i) for i in range(permutations)]
    wanted, found, notes = set(MEASURES if measures is None else measures), list[Found](), list[str]()
    most = MOST[left.device.partition(":")[0]] if measures is None else float("inf")
    if wanted & set(BY_PRODUCTS):
        names = [name for name in BY_PRODUCTS if name in wanted]
        found += _by_products(left, right, chosen, names, [o for o, _ in orders], most, notes)
    if wanted & set(BY_SPECTRA):
        names = [name for name in BY_SPECTRA if name in wanted]
        found += _by_spectra(left, right, chosen, names, [o for o, _ in orders], most, variance, notes)
    if wanted & set(BY_ROWS):
        names = [name for name in BY_ROWS if name in wanted]
        found += _by_rows(left, right, chosen, names, [o for _, o in orders], k)
    return found, notes


def _by_products(
    left: SiteRows, right: SiteRows, chosen: ChosenRows, names: Sequence[str], orders: Sequence[Tensor], most: float,
    notes: list[str],
) -> list[Found]:  # fmt: skip
    n = len(chosen.pairs)
    grams = Grams(left, right) if Grams.pays(left, right, n) else None
    once = 2.0 * n * n * len(left) * len(right) if grams else product_flops(left, right, n)[1]
    draws = min(len(orders), int(most / once)) if most < float("inf") else len(orders)
    if draws < len(orders):
        notes.append(f"CKA: {draws} draws of shuffled prompts in place of {len(orders)}, each of {once:.1e} FLOPs; name the "
                     "measure to have them all")  # fmt: skip
    made = ShardProducts.of(left, right, chosen.shards, grams)
    drawn = [(o, shuffled_products(left, right, o, grams))
             for o in progress(orders[:draws], desc="CKA of shuffled prompts", unit="draw")]  # fmt: skip
    found = []
    for name in names:
        debiased = name == "cka_debiased"
        out = torch.stack([made.cka(g, debiased=debiased) for g in range(len(chosen.shards))]).cpu()
        null = [made.shuffled(products, order, debiased=debiased).cpu() for order, products in drawn]
        found.append(Found(name, made.cka(debiased=debiased).cpu(), out, torch.stack(null) if null else None,
                           chosen.shards, n))  # fmt: skip
    return found


def _by_spectra(
    left: SiteRows, right: SiteRows, chosen: ChosenRows, names: list[str], orders: Sequence[Tensor], most: float,
    variance: float, notes: list[str],
) -> list[Found]:  # fmt: skip
    n, k = len(chosen.pairs), len(chosen.shards)
    layers, pairs = spectra_flops(left, right, n, names)
    said = f"{', '.join(names)}: an SVD for each of {len(left) * len(right):,} pairs, {layers + pairs:.1e} FLOPs"
    if layers + pairs > most:
        notes.append(f"{said}; left out, name them to have them")
        return []
    bare = (layers + pairs) * (1 + k) + pairs * len(orders) > most
    if bare:
        notes.append(f"{said}; without intervals and null, name them to have these")
    if "pwcca" in names and n - 1 <= min(left.widths) + min(right.widths):
        notes.append(f"PWCCA needs more rows than both layers have directions; there are {n:,} rows")
    whole = PairSpectra(left, right, names, variance=variance)
    value = whole.scores()
    out = null = None
    if not bare:
        every, spans = torch.arange(n), chosen.spans
        out = torch.stack([
            PairSpectra(left, right, names, kept=torch.cat([every[: s.start], every[s.stop :]]), variance=variance).scores()
            for s in progress(spans, desc="spectra without a shard", unit="shard")
        ])  # fmt: skip
        drawn = [whole.scores(o) for o in progress(orders, desc="spectra of shuffled prompts", unit="draw")]
        null = torch.stack(drawn) if drawn else None
    return [
        Found(
            name, value[m], None if out is None else out[:, m], None if null is None else null[:, m], chosen.shards, n
        )
        for m, name in enumerate(names)
    ]


def _by_rows(
    left: SiteRows, right: SiteRows, chosen: ChosenRows, names: Sequence[str], orders: Sequence[Tensor], k: int
) -> list[Found]:
    some = chosen.sample
    group = chosen.pairs.prompt[some]
    at = torch.repeat_interleave(torch.arange(len(chosen.shards)), torch.tensor(chosen.shards))[some]
    kept = [g for g in range(len(chosen.shards)) if bool((at == g).any())]
    if "knn" in names and len(some) <= k + chosen.per_prompt:
        raise UserError(f"mutual nearest neighbours with k={k} need more than {k + chosen.per_prompt} rows in the sample; "
                        f"there are {len(some)}: take a smaller k, or profile more prompts")  # fmt: skip
    grams = [torch.stack([side.gram(i, some) for i in range(len(side))]) for side in (left, right)]

    def sides(name: str, rows: Tensor | None) -> tuple[Dissimilarities, ...] | tuple[NearestRows, ...]:
        tables = [torch.stack([cosines(one, rows) for one in side]) for side in grams]
        groups = group if rows is None else group[rows]
        if name == "rsa":
            return tuple(Dissimilarities(table, groups) for table in tables)
        near = k if rows is None else min(k, int((groups[:, None] != groups[None]).sum(1).min()))
        return tuple(NearestRows(table, groups, near) for table in tables)

    def compared(made: tuple[Dissimilarities, ...] | tuple[NearestRows, ...], order: Tensor | None = None) -> Tensor:
        a, b = made
        if isinstance(a, Dissimilarities):
            assert isinstance(b, Dissimilarities)
            return a.correlations(b, order)
        assert isinstance(b, NearestRows)
        return a.overlap(b, order)

    found = []
    for name in names:
        made = sides(name, None)
        out = torch.stack(
            [compared(sides(name, (at != g).nonzero()[:, 0])) for g in progress(kept, desc=name, unit="shard")]
        )
        null = [compared(made, order) for order in orders]
        shards = tuple(int((at == g).sum()) for g in kept)
        found.append(Found(name, compared(made), out, torch.stack(null) if null else None, shards, len(some)))
    return found


assert set(BY_SPECTRA) == set(BETWEEN)
