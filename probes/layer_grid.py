"""Which layer of a shallow model says what a deep one's layer holds: a ridge map from every layer to every layer.

    error(l, m) = mean over held-out tokens of ||h^deep_l - f_lm(h^shallow_m)|| / ||h^deep_l||

f_lm is the centred ridge map of `workbench.convert`, never formed: both sides are factorised once a layer, and a pair costs
two products of coordinates. Source: arXiv:2505.13898, section 5 (there on models of one tokenizer).
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from itertools import permutations
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.convert import ConverterFits
from workbench.converter_specs import ConverterSpec
from workbench.errors import UserError
from workbench.evaluate.scoring import ratio_interval
from workbench.evaluate.statistics import Interval, spearman
from workbench.layer_matching import best_matching
from workbench.progress import progress
from workbench.sites import Site
from workbench.store import Store

if TYPE_CHECKING:
    import pandas as pd

DRAWS = 2000


@dataclass(frozen=True, eq=False)
class LayerGrid:
    """Held-out errors of the maps from each layer of a shallow model to each of a deep one; sums over the tokens of each of
    n held-out prompts."""

    deep: str
    shallow: str
    deep_layers: tuple[int, ...]
    shallow_layers: tuple[int, ...]
    n_deep: int
    """layers of the deep model, for relative depths"""
    n_shallow: int
    sums: Float[Tensor, "l m n"] = field(repr=False)
    mean_sums: Float[Tensor, "l n"] = field(repr=False)
    """the baseline: of the deep layer's mean in place of the map"""
    shuffled_sums: Float[Tensor, "l m n"] | None = field(repr=False)
    """the control: of maps fitted to rows of other prompts"""
    counts: Float[Tensor, " n"] = field(repr=False)
    alpha: float | str
    n_fit: int
    """rows that were fitted"""

    def __repr__(self) -> str:
        size = f"{len(self.deep_layers)} x {len(self.shallow_layers)} layers"
        return f"LayerGrid({self.shallow} -> {self.deep}, {size}, {self.n_fit:,} rows fitted)"

    def error(self, deep: int, shallow: int) -> Interval:
        """The error of one map, with Student's interval over held-out prompts."""
        return ratio_interval(self.sums[self._deep(deep), self._shallow(shallow)], self.counts)

    def baseline(self, deep: int) -> Interval:
        """The error of the deep layer's mean, which knows nothing of the shallow model."""
        return ratio_interval(self.mean_sums[self._deep(deep)], self.counts)

    def control(self, deep: int, shallow: int) -> Interval:
        """The error of the map fitted to other prompts' rows; UserError where the control was left out."""
        if self.shuffled_sums is None:
            raise UserError("this grid was made without its control; make it again with control=True")
        return ratio_interval(self.shuffled_sums[self._deep(deep), self._shallow(shallow)], self.counts)

    @property
    def errors(self) -> Float[Tensor, "l m"]:
        return self.sums.sum(-1) / self.counts.sum()

    @property
    def best(self) -> dict[int, int]:
        """{deep layer: the shallow layer that says most of it}: the argmin of each line."""
        found = self.errors.argmin(1).tolist()
        return {layer: self.shallow_layers[m] for layer, m in zip(self.deep_layers, found, strict=True)}

    def matching(self, monotone: bool = True) -> dict[int, int]:
        """{deep layer: shallow layer} with the least summed error; the shallow layers never fall where `monotone`.

        With the deep model as the donor, and errors in place of held-out R2, what `layer_matching.matched_sites` finds with
        match="r2". Not monotone, it is `best`.
        """
        e = self.errors
        scores = {
            (d, s): -float(e[i, j]) for i, d in enumerate(self.deep_layers) for j, s in enumerate(self.shallow_layers)
        }
        return best_matching(scores, monotone)

    def order(self) -> float | None:
        """Spearman's correlation of a deep layer's relative depth with that of its best shallow layer; None where it does
        not exist (fewer than three deep layers, or one shallow layer best for all)."""
        best = self.best
        return spearman(
            [d / max(1, self.n_deep - 1) for d in best], [s / max(1, self.n_shallow - 1) for s in best.values()]
        )

    def order_by_chance(self, seed: int = 0) -> Interval | None:
        """The mean of `order` when the deep layers change places, and what it lies between in 95 % of the orders: all of
        them, or 2,000 drawn with `seed` where there are more."""
        if self.order() is None:
            return None
        best = list(self.best.values())
        if math.factorial(len(best)) <= DRAWS:
            orders = [list(one) for one in permutations(best)]
        else:
            draw = random.Random(seed)
            orders = [draw.sample(best, len(best)) for _ in range(DRAWS)]
        found = torch.tensor([spearman(list(self.deep_layers), one) for one in orders], dtype=torch.float64)
        low, high = found.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return Interval(float(found.mean()), low, high)

    def frame(self) -> pd.DataFrame:
        """One line per pair: deep, shallow, error, error_low, error_high, mean (the baseline), shuffled (the control), best."""
        import pandas as pd

        best, lines = self.best, list[dict[str, Any]]()
        for d in self.deep_layers:
            for s in self.shallow_layers:
                found = self.error(d, s)
                line = {"deep": d, "shallow": s, "error": found.value, "error_low": found.low, "error_high": found.high,
                        "mean": self.baseline(d).value, "best": best[d] == s}  # fmt: skip
                if self.shuffled_sums is not None:
                    line["shuffled"] = self.control(d, s).value
                lines.append(line)
        return pd.DataFrame(lines)

    def _repr_html_(self) -> str:
        table = self.frame().pivot(index="deep", columns="shallow", values="error")
        return str(table.to_html(float_format="{:.4f}".format))

    def _deep(self, layer: int) -> int:
        return _place(layer, self.deep_layers, f"deep model {self.deep}")

    def _shallow(self, layer: int) -> int:
        return _place(layer, self.shallow_layers, f"shallow model {self.shallow}")


def _place(layer: int, layers: tuple[int, ...], of: str) -> int:
    if layer not in layers:
        raise UserError(f"layer {layer} of the {of} is not in this grid; it has {', '.join(map(str, layers))}")
    return layers.index(layer)


def layer_grid(
    deep: Store,
    shallow: Store,
    *,
    alpha: int | float | Literal["gcv", "cv"] = "gcv",
    holdout: float = 0.25,
    pairing: str = "aligned",
    control: bool = True,
    seed: int = 0,
) -> LayerGrid:
    """Fits a ridge map from every `resid_post` of the shallow model's profile to every one of the deep model's.

    Args:
        deep, shallow: profiles of the same prompts, of all tokens where `aligned`.
        alpha: in units of the mean diagonal of X'X; "gcv": chosen for each pair by generalised cross-validation, at no cost;
            "cv": by folds of prompts, which factorises each pair several times. A strong penalty favours layers of few
            directions, and so moves the best layers.
        holdout: share of the prompts that no map sees; the errors are of these.
        pairing: `aligned`, tokens that end at the same character, so that the tokenizers may differ; `last`, row by row.
        control: also fit each pair to rows of other prompts.

    Raises UserError for profiles that do not pair, that have no resid_post, or leave fewer than two prompts held out.

    >>> layer_grid(Store.open("donor"), Store.open("recipient")).best     # doctest: +SKIP
    """
    sites = [[s for s in store.sites if s.point == "resid_post"] for store in (deep, shallow)]
    for store, found in zip((deep, shallow), sites, strict=True):
        if not found:
            raise UserError(f"store {store.path} has no resid_post; profile the model again at its layers")
    fits = ConverterFits(deep, shallow, holdout, seed, pairing=pairing)
    if len(fits.held.prompt.unique()) < 2:
        raise UserError(f"holdout={holdout:g} holds out fewer than two prompts; give a larger share, or more prompts")
    spec = None if alpha == "gcv" else ConverterSpec.parse("ridge", alpha)
    prompts, row = fits.held.prompt.unique(return_inverse=True)
    counts = torch.zeros(len(prompts), dtype=torch.float64).index_add_(
        0, row, torch.ones(len(row), dtype=torch.float64)
    )
    sums, mean_sums = _errors(fits, sites[0], sites[1], spec, row, len(prompts))
    others = None
    if control:
        shuffled = ConverterFits(deep, shallow, holdout, seed, shuffled=True, pairing=pairing)
        others, _ = _errors(shuffled, sites[0], sites[1], spec, row, len(prompts))
    n_layers = [int(store.manifest["model"]["n_layers"]) for store in (deep, shallow)]
    return LayerGrid(deep.name, shallow.name, tuple(s.layer for s in sites[0]), tuple(s.layer for s in sites[1]),
                     n_layers[0], n_layers[1], sums, mean_sums, others, counts, alpha, len(fits.rows))  # fmt: skip


def _errors(
    fits: ConverterFits, deep: list[Site], shallow: list[Site], spec: ConverterSpec | None, row: Tensor, n: int
) -> tuple[Float[Tensor, "l m n"], Float[Tensor, "l n"]]:
    """Sums over each held-out prompt of the relative errors of every map, and of the deep layers' means.

    A prediction lies in the span of the fitted rows, Qy: what is outside of it is missed by every map, and inside of it
    y Qy - (x Qx) core is all that is needed.
    """
    sums = torch.zeros(len(deep), len(shallow), n, dtype=torch.float64)
    mean_sums = torch.zeros(len(deep), n, dtype=torch.float64)
    xs = []
    for site in shallow:
        x = fits.solver("recipient", site, True)
        xs.append(x.along(fits.states("recipient", site, held=True).double() - x.mean))
    for i, d in enumerate(progress(deep, desc="maps to each deep layer", unit="layer")):
        y, held = fits.solver("donor", d, True), fits.states("donor", d, held=True).double()
        centred, size = held - y.mean, held.norm(dim=1)
        inside = y.along(centred)
        outside = (centred.square().sum(1) - inside.square().sum(1)).clamp(min=0)
        mean_sums[i].index_add_(0, row, centred.norm(dim=1) / size)
        for j, s in enumerate(shallow):
            pair = fits.factors(d, s)
            core = pair.ridge(pair.gcv_alpha()).there if spec is None else fits.cores(d, s, spec).there
            missed = inside - xs[j] @ core
            sums[i, j].index_add_(0, row, (missed.square().sum(1) + outside).sqrt() / size)
    return sums, mean_sums
