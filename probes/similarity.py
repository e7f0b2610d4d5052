"""How alike the layers of two models are, or those of one: seven measures of every pair, beside shuffled prompts.

CKA, SVCCA, PWCCA and Procrustes similarity come from the moments of the rows that two stores of the same prompts share; RSA
and mutual nearest neighbours from a sample of those rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import UserError
from workbench.evaluate.statistics import spearman
from workbench.layer_matching import best_matching
from workbench.maps.jackknife import jackknife
from workbench.sites import Site
from workbench.store import Store

from .similarity_measures import MEASURES, WORDS, Found, measure_all
from .similarity_rows import SiteRows, choose_rows

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class LikenessTable:
    """One measure of every pair of layers, [a, b]."""

    measure: str
    value: Float[Tensor, "a b"]
    low: Float[Tensor, "a b"]
    """of the 95 % interval by leaving out one shard of prompts at a time; not a number where none was made"""
    high: Float[Tensor, "a b"]
    null: Float[Tensor, "a b"]
    """mean where the prompts of the second store are shuffled, rows of a prompt staying together"""
    null_high: Float[Tensor, "a b"]
    """the highest of those draws"""
    draws: int
    rows: int

    @classmethod
    def of(cls, found: Found) -> LikenessTable:
        from scipy import stats

        value, blank = found.value, torch.full_like(found.value, torch.nan)
        low = high = blank
        if found.left is not None:
            made = jackknife(value, found.left, found.shards)
            low, high = made.interval(float(stats.t.ppf(0.975, len(found.shards) - 1)))
        null, top = (blank, blank) if found.null is None else (found.null.mean(0), found.null.amax(0))
        draws = 0 if found.null is None else len(found.null)
        return cls(found.measure, value, low, high, null, top, draws, found.rows)

    @property
    def beyond(self) -> Tensor:
        """Where the value is above every draw of shuffled prompts, [a, b]."""
        return self.value > self.null_high


@dataclass(frozen=True, eq=False)
class LayerSimilarity:
    """What `layer_similarity` found.

    a, b: the models; sites_a, sites_b: their layers, by the rows and columns of every table.
    """

    a: str
    b: str
    sites_a: tuple[Site, ...]
    sites_b: tuple[Site, ...]
    tables: Mapping[str, LikenessTable] = field(repr=False)
    rows: int
    prompts: int
    shards: int
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, measure: str) -> LikenessTable:
        if measure not in self.tables:
            raise UserError(f"no measure {measure!r:.40} here; there are {', '.join(self.tables)}")
        return self.tables[measure]

    def frame(self) -> pd.DataFrame:
        """One line per measure and pair: measure, a, b, value, low, high, null, null_high, beyond, rows."""
        import pandas as pd

        lines: list[dict[str, Any]] = []
        for name, table in self.tables.items():
            columns = ("value", "low", "high", "null", "null_high", "beyond")
            lists = {key: getattr(table, key).tolist() for key in columns}
            lines += [
                {"measure": name, "a": str(a), "b": str(b), **{key: lists[key][i][j] for key in columns}, "rows": table.rows}
                for i, a in enumerate(self.sites_a) for j, b in enumerate(self.sites_b)
            ]  # fmt: skip
        return pd.DataFrame(lines)

    def best(self) -> pd.DataFrame:
        """For each measure and layer of `a` the layer of `b` that is most like it: value, low, high, null, null_high."""
        import pandas as pd

        table = self.frame().dropna(subset=["value"])
        if table.empty:
            return pd.DataFrame(columns=table.columns)
        most = table.groupby(["measure", "a"], sort=False)["value"].idxmax()
        return table.loc[most].reset_index(drop=True)

    def matching(self, measure: str) -> dict[Site, Site]:
        """Layers of `a` to layers of `b`, never falling in depth, with the largest sum of a measure."""
        value = self[measure].value
        scores = {(i, j): float(v) for i, line in enumerate(value.tolist()) for j, v in enumerate(line)}
        return {self.sites_a[i]: self.sites_b[j] for i, j in best_matching(scores).items()}

    def order(self, measure: str) -> float | None:
        """Spearman's correlation of the depth of `a`'s layers with that of the most similar layer of `b`; None for fewer than
        three layers, or where one layer of `b` is most like all."""
        value = self[measure].value
        kept = [i for i in range(len(value)) if bool(value[i].isfinite().any())]
        best = [int(value[i].nan_to_num(-torch.inf).argmax()) for i in kept]
        return spearman(kept, best) if kept else None

    @cached_property
    def summary(self) -> list[dict[str, Any]]:
        """A line per measure: mean over layers of the best partner's value, of the null there, and the order of depths."""
        best, lines = self.best(), []
        for name, table in self.tables.items():
            part = best[best["measure"] == name]
            lines.append({"measure": name, "best": part["value"].mean(), "null": part["null"].mean(),
                          "null_high": part["null_high"].max(), "beyond": part["beyond"].mean(), "order": self.order(name),
                          "rows": table.rows, "draws": table.draws})  # fmt: skip
        return lines

    def __repr__(self) -> str:
        size = f"{len(self.sites_a)} x {len(self.sites_b)} layers"
        return f"LayerSimilarity({self.a} with {self.b}, {size}, {', '.join(self.tables)}, {self.rows:,} rows)"

    def _repr_html_(self) -> str:
        from html import escape

        import pandas as pd

        words = pd.DataFrame(self.summary).assign(measure=[WORDS[name] for name in self.tables])
        return f"<p>{escape(repr(self))}</p>" + str(words.to_html(index=False, float_format="{:.3f}".format))


def layer_similarity(
    a: Store, b: Store | None = None, *, measures: Sequence[str] | None = None,
    sites_a: Sequence[Site | str | int] | None = None, sites_b: Sequence[Site | str | int] | None = None,
    pairing: str = "auto", max_rows: int = 4096, sample: int = 768, k: int = 10, variance: float = 0.99,
    permutations: int = 20, shards: int = 10, seed: int = 0, device: str | None = None,
) -> LayerSimilarity:  # fmt: skip
    """How alike every layer of `a` is to every layer of `b`, or to every other of its own where no `b` is given.

    Args:
        measures: of `similarity_measures.MEASURES`; unless given all but those that would take too long, which is noted.
        sites_a, sites_b: layers; all of the stores unless given.
        pairing, max_rows, sample, shards, seed: see `similarity_rows.choose_rows`.
        k: neighbours of the mutual nearest-neighbour measure.
        variance: share of the variance that SVCCA's directions hold.
        permutations: draws of shuffled prompts, the null; 0: none.
        device: where it is computed; a GPU where there is one.

    Raises UserError for stores that do not pair, a site that is not there, and too few rows or prompts.

    >>> layer_similarity(Store.open("a"), Store.open("b"))["cka_debiased"].value  # doctest: +SKIP
    """
    alone, b = b is None, a if b is None else b
    unknown = sorted(set(measures or ()) - set(MEASURES))
    if unknown:
        raise UserError(f"unknown measure {unknown[0]!r:.40}; allowed: {', '.join(MEASURES)}")
    if permutations < 0 or shards < 2:
        raise UserError(f"permutations {permutations} must be 0 or more, and shards {shards} at least 2")
    if not 0 < variance <= 1:
        raise UserError(f"variance must lie in 0..1; got {variance}")
    named = [
        _sites(store, sites) for store, sites in ((a, sites_a), (b, sites_a if alone and sites_b is None else sites_b))
    ]
    chosen = choose_rows(
        a,
        b,
        pairing="last" if alone and pairing == "auto" else pairing,
        max_rows=max_rows,
        sample=sample,
        shards=shards,
        seed=seed,
    )
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    left = SiteRows(a, named[0], chosen.pairs.donor, where)
    right = SiteRows(b, named[1], chosen.pairs.recipient, where)
    found, notes = measure_all(left, right, chosen, tuple(dict.fromkeys(measures)) if measures else None, k=k,
                               variance=variance, permutations=permutations, seed=seed)  # fmt: skip
    settings = {
        "pairing": chosen.pairing, "max_rows": max_rows, "sample": len(chosen.sample), "per_prompt": chosen.per_prompt, "k": k,
        "variance": variance, "permutations": permutations, "shards": len(chosen.shards), "seed": seed,
    }  # fmt: skip
    return LayerSimilarity(
        a.name, b.name, tuple(named[0]), tuple(named[1]), {one.measure: LikenessTable.of(one) for one in found},
        len(chosen.pairs), len(chosen.pairs.prompt.unique()), len(chosen.shards), (*chosen.notes, *notes), settings,
    )  # fmt: skip


def _sites(store: Store, wanted: Sequence[Site | str | int] | None) -> list[Site]:
    if wanted is None:
        return store.sites
    found = [Site.parse(site, store.manifest["model"]["n_layers"]) for site in wanted]
    for site in found:
        store.width(site)  # says what the store has
    if not found:
        raise UserError(f"no layers given; store {store.path} has {', '.join(map(str, store.sites))}")
    return list(dict.fromkeys(found))
