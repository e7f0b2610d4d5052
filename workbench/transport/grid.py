"""TransportGrid: how much of each layer is carried linearly to each later one, for all pairs at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from ..maps.linear_map import LinearMap
from ..maps.moments import Moments
from ..maps.ridge import ALPHAS, Choice
from ..maps.scores import METRICS
from ..sites import Site
from ..tokens import Policy
from .control import control_notes
from .map_files import KeptMaps
from .pairs import OPERATOR, SHUFFLED, FittedArm, Options, SitePair, check_pairs, fit_pairs, moment_sets, site_pairs
from .positions import check_positions
from .routing import routing_notes
from .rows import RowSource, row_source
from .sums import Split, plan_sums, source_name, sum_pairs

if TYPE_CHECKING:
    import pandas as pd

    from ..engines import Engine
    from ..models import Model
    from ..store import Store

BASELINES = ("mean", "identity", "identity_bias", "procrustes")
Visit = Callable[[SitePair, str, list[Moments], list[Moments]], None]
"""told of each pair without BOS: (pair, name of its source block, moments of the folds, moments of the shards)"""


@dataclass(frozen=True, eq=False)
class TransportGrid:
    """Held-out R2 of the transport of every pair of sites, beside its baselines and the shuffled control.

    `table` has one line per pair, arm (`ridge`, the baselines, `shuffled`) and `bos` (whether rows at position 0 take
    part): `r2_uniform`, `r2_weighted` and `r2_whitened` (see `maps.scores` for what each is), each with `_se`, `_low` and
    `_high`: the jackknife over shards of held-out prompts, and its 95 % interval by Student's t. The intervals are of
    the score of that one map on further prompts; the maps are fitted once, on the training prompts.
    """

    table: pd.DataFrame = field(repr=False)
    per_output: Mapping[SitePair, Float[Tensor, "2 d"]] = field(repr=False)
    """of the operator without BOS: R2 of each output dimension and its standard error; NaN where one never varies"""
    meta: Mapping[str, Any] = field(repr=False)
    """JSON values: model, prompts, tokens, positions, folds, shards, alpha, seed, passes, warnings"""
    operators: Mapping[SitePair, LinearMap] = field(default_factory=dict, repr=False)
    """the maps without BOS, where they were kept; of a grid from disk each is read when it is asked for"""
    controls: Mapping[SitePair, LinearMap] = field(default_factory=dict, repr=False)
    """the maps fitted to shuffled pairs, where they were kept"""

    def __repr__(self) -> str:
        return f"TransportGrid({len(self.per_output)} pairs of {self.meta['model']}, arms {', '.join(self.arms)})"

    @property
    def pairs(self) -> list[SitePair]:
        return list(self.per_output)

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(self.table["arm"]))

    @property
    def has_bos(self) -> bool:
        """Whether the grid was also fitted with rows at position 0."""
        return bool(self.table["bos"].any())

    @property
    def warnings(self) -> list[str]:
        return list(self.meta["warnings"])

    def frame(self) -> pd.DataFrame:
        """The table, a copy."""
        return self.table.copy()

    def cell(self, source: Site | str | int, target: Site | str | int, *, arm: str = OPERATOR,
             bos: bool = False) -> dict[str, Any]:  # fmt: skip
        """One line of the table."""
        a, b = Site.parse(source), Site.parse(target)
        part = self._part(arm, bos)
        found = part[(part["source"] == str(a)) & (part["target"] == str(b))]
        if found.empty:
            raise UserError(
                f"no pair {a} to {b} in this grid; its pairs go from {', '.join(dict.fromkeys(part['source']))}"
            )
        return {str(key): value for key, value in found.iloc[0].items()}

    def matrix(self, metric: str = "uniform", *, arm: str = OPERATOR, bos: bool = False) -> pd.DataFrame:
        """Sources down, targets across; NaN where there is no pair."""
        _check_metric(metric)
        part = self._part(arm, bos)
        made = part.pivot(index="source", columns="target", values=f"r2_{metric}")
        return made.reindex(index=sorted(made.index, key=_place), columns=sorted(made.columns, key=_place))

    def curve(self, *, source: Site | str | int | None = None, target: Site | str | int | None = None,
              arm: str = OPERATOR, bos: bool = False) -> pd.DataFrame:  # fmt: skip
        """The lines of one source by target, or of one target by source."""
        if (source is None) == (target is None):
            raise UserError("a curve is of one source or of one target; give one of the two")
        part = self._part(arm, bos)
        key, site = ("source", source) if source is not None else ("target", target)
        name = str(Site.parse(site))  # type: ignore[arg-type]
        found = part[part[key] == name]
        if found.empty:
            raise UserError(f"no pair has the {key} {name}; there are {', '.join(dict.fromkeys(part[key]))}")
        return found.reset_index(drop=True)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Writes a folder: grid.json, grid.parquet, per_output.safetensors, and the maps that were kept, a file each."""
        from .files import save_grid

        save_grid(self, path, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path) -> TransportGrid:
        """Reads what `save` wrote; UserError where that is missing, damaged or of another kind."""
        from .files import load_grid

        return load_grid(path)

    def _part(self, arm: str, bos: bool) -> pd.DataFrame:
        if arm not in self.arms:
            raise UserError(f"no arm {arm!r} in this grid; it has {', '.join(self.arms)}")
        if bos and not self.has_bos:
            raise UserError("this grid has no rows at position 0, so there is none with BOS")
        return self.table[(self.table["arm"] == arm) & (self.table["bos"] == bos)]


def transport_grid(
    source: Store | Model | RowSource,
    prompts: Any = None,
    *,
    sites: Sequence[Site | str | int] | None = None,
    pairs: Sequence[tuple[Site | str | int, Site | str | int]] | None = None,
    tokens: Policy = "all",
    positions: str = "same",
    alpha: Choice = "cv",
    alphas: Sequence[int | float] = ALPHAS,
    absolute: bool = False,
    folds: int = 5,
    shards: int = 10,
    holdout: float = 0.25,
    baselines: Sequence[str] = BASELINES,
    control: bool = True,
    with_bos: bool = True,
    keep_maps: bool | Sequence[SitePair] = False,
    keep_controls: bool | Sequence[SitePair] | None = None,
    maps: str | Path | None = None,
    seed: int = 0,
    products: torch.dtype = torch.float32,
    memory: int | None = None,
    device: torch.device | str | None = None,
    batch_tokens: int = 8192,
    max_length: int | None = None,
    visit: Visit | None = None,
    engine: Engine | None = None,
) -> TransportGrid:
    """Fits and scores the transport between all pairs of sites, from moments: no activation is stored.

    Args:
        source: a store, or a model that runs `prompts`. tokens: which rows, with a model; a store has its own.
        sites: every pair of these, the earlier one as the source (every `resid_post` unless given); or `pairs`.
        positions: which token a row starts from: same, previous, random (an earlier one), shuffled (another prompt's), or
            attention: the one that the attention between the two sites sends most weight to (see `paired_rows`), of a model
            and not of a store. Every pair then has rows of its own: moments and an eigendecomposition each, twice with
            BOS, and the model runs with eager attention, whose maps are held a batch of one layer at a time beside one
            mean map [batch, t, t] for each source. `meta["routing"]` says of each pair where the sources lay.
        alpha: a penalty, "cv" over folds of the training prompts, or "gcv"; alphas, absolute: see `fit_ridge_targets`.
        folds, shards, holdout: prompts are dealt by `seed` into `folds` to fit and choose on, and, a share `holdout` of
            them, into `shards` that no map has seen.
        baselines: of `maps.baselines`. control: also fit each pair with the sources of other prompts, which should score 0.
        with_bos: the default leaves rows at position 0 out: where there are any, fit a second time with them, for
            comparison. Their massive activations make R2 look high whatever the map does.
        keep_maps: keep the operators without BOS: of all pairs, of none, or of those given. keep_controls: the same of
            the control's maps (as keep_maps, unless given).
        maps: a folder that the kept maps are written to as they are fitted, so that memory holds one at a time; None
            holds them all.
        products: of the moments: float32 as stored activations are, or float64.
        memory: bytes that moments may take; what does not fit is done in further passes over the rows.
        visit: called with the moments of each pair, for figures that this grid does not hold.
        engine: of `workbench.engines.open_engine`: its replicas of the model run the prompts, and the rows are summed here
            in the order of one process, so that the grid is the same bit for bit. Not with positions="attention".

    Raises UserError for sites that are not there, a source that is not before its target, too few prompts or rows for
    the width, sites that never vary, values that are not finite, and maps that do not fit on the disk.

    >>> grid = transport_grid(load("bundled:recipient"), "bundled:profile")                       # doctest: +SKIP
    >>> grid.cell(0, 3)["r2_uniform"], grid.cell(0, 3, arm="shuffled")["r2_uniform"]              # doctest: +SKIP

    Source: arXiv:2508.17540; there maps are fitted with the BOS rows, folds cut through prompts, and no control is given.
    """
    check_positions(positions)
    rows = row_source(source, prompts, device=device, positions=positions, engine=engine, **(
        {} if prompts is None else {"tokens": tokens, "batch_tokens": batch_tokens, "max_length": max_length}))  # fmt: skip
    wanted = _pairs(rows, sites, pairs)
    split = Split.of(rows.n_prompts, folds=folds, shards=shards, holdout=holdout, seed=seed)
    options = Options(alpha, tuple(map(float, alphas)), absolute, tuple(baselines), control and positions != "shuffled",
                      positions)  # fmt: skip
    first = with_bos and rows.has_first
    about: dict[str, Any] = {"positions": positions, "control": options.control}
    passes = plan_sums(rows, wanted, copies=moment_sets(folds, shards, first=first), memory=memory, **about)
    arms: list[tuple[bool, FittedArm]] = []
    keep = {OPERATOR: keep_maps, SHUFFLED: keep_maps if keep_controls is None else keep_controls}
    kept = KeptMaps.of(keep, wanted, {site: rows.width(site) for pair in wanted for site in pair}, maps)
    n_first, own, routing = 0, 0.0, dict[str, dict[str, float]]()
    for some in passes:
        every = sum_pairs(rows, some, split, first=first, products=products, seed=seed, **about)
        while every:
            sums = every.pop(0)
            n_first, own = sums.n_first, max(own, sums.own)
            routing |= {f"{a}>{b}": dict(sums.routing) for a, b in sums.pairs if sums.routing}
            for bos in (False, True) if n_first else (False,):
                for fitted in fit_pairs(sums, sums.pairs, options, first=bos):
                    if not bos:
                        kept.add(fitted.arm, fitted.pair, fitted.map)
                    arms.append((bos, replace(fitted, map=LinearMap.zeros(1, 1))))
            if visit is not None:
                parts, held = sums.parts()
                for pair in sums.pairs:
                    visit(pair, source_name(pair[0], positions), parts, held)
            del sums  # before the next is summed
    meta = {
        **rows.about, "positions": positions, "folds": folds, "shards": shards, "holdout": holdout, "seed": seed,
        "alpha": alpha, "alphas": list(options.alphas), "absolute": absolute, "n_first": n_first, "passes": len(passes),
        "products": str(products).removeprefix("torch."), "n_prompts": rows.n_prompts,
        "warnings": [*_warnings([one for bos, one in arms if not bos]), *control_notes(own), *routing_notes(routing)],
        **({"routing": routing} if routing else {}),
    }  # fmt: skip
    outputs = {one.pair: torch.stack([one.per_output.value, one.per_output.error]) for bos, one in arms
               if not bos and one.arm == OPERATOR}  # fmt: skip
    return TransportGrid(_table(arms), outputs, meta, kept.maps[OPERATOR], kept.maps[SHUFFLED])


def _pairs(
    rows: RowSource, sites: Sequence[Site | str | int] | None,
    pairs: Sequence[tuple[Site | str | int, Site | str | int]] | None,
) -> list[SitePair]:  # fmt: skip
    if sites is not None and pairs is not None:
        raise UserError("both sites and pairs were given; give one of them")
    if pairs is not None:
        return check_pairs([(rows.site(a), rows.site(b)) for a, b in pairs])
    return check_pairs(site_pairs(rows.every_site if sites is None else [rows.site(s) for s in sites]))


def _warnings(arms: list[FittedArm]) -> list[str]:
    """Each note once, with the first pair that it was made on and how many others."""
    seen: dict[str, list[SitePair]] = {}
    for one in arms:
        if one.arm == OPERATOR:
            for note in one.notes:
                seen.setdefault(note, []).append(one.pair)
    return [f"{a} to {b}: {note}" + (f" (and {len(rest)} more pairs)" if rest else "")
            for note, ((a, b), *rest) in seen.items()]  # fmt: skip


def _table(arms: list[tuple[bool, FittedArm]]) -> pd.DataFrame:
    import pandas as pd
    from scipy import stats

    lines = []
    for bos, one in arms:
        (a, b), half = one.pair, float(stats.t.ppf(0.975, one.overall.shards - 1))
        line: dict[str, Any] = {
            "source": str(a),
            "target": str(b),
            "layers": b.layer - a.layer,
            "bos": bos,
            "arm": one.arm,
        }
        for i, metric in enumerate(METRICS):
            value, error = float(one.overall.value[i]), float(one.overall.error[i])
            line |= {f"r2_{metric}": value, f"r2_{metric}_se": error, f"r2_{metric}_low": value - half * error,
                     f"r2_{metric}_high": value + half * error}  # fmt: skip
        alphas = (one.alpha, one.alpha_absolute)
        line |= {
            key: float("nan") if v is None else v for key, v in zip(("alpha", "alpha_absolute"), alphas, strict=True)
        }
        lines.append({**line, "n_train": one.n_train, "n_held_out": one.n_held_out, "notes": "; ".join(one.notes)})
    return pd.DataFrame(lines)


def _check_metric(metric: str) -> None:
    if metric not in METRICS:
        raise UserError(f"metric must be one of {', '.join(METRICS)}; got {metric!r}")


def _place(name: str) -> tuple[int, str]:
    site = Site.parse(name)
    return site.layer, site.point
