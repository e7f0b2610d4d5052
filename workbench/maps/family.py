"""fit_map: every linear map of the workbench through one interface, from moments alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from ..errors import UserError
from .baselines import BASELINES, baseline
from .linear_map import LinearMap
from .moments import Moments, total
from .pls import partial_least_squares
from .rank_family import RankFamily
from .reduced_rank import optimal_ranks, truncated_ranks
from .ridge import ALPHAS, Choice, fit_ridge_targets, penalty
from .row_counts import check_counts
from .scores import score_map
from .sparsity import sparse_path
from .spectrum import Spectrum

SPARSE_ALPHAS = (0.01, 0.1, 1.0, 10.0, 100.0)
"""of the lasso in arXiv:2508.17540, released code `transport_operator.py:87-99`; in units of y times x"""


class Candidate(NamedTuple):
    """Hyper-parameters that were tried, and their score: the mean held-out R2 over folds, or the R2 by GCV."""

    options: dict[str, float]
    score: float


@dataclass(frozen=True, eq=False)
class MapFit:
    """A fitted map, how it was chosen, and what to know about it."""

    map: LinearMap
    method: str
    chosen: dict[str, Any]
    """hyper-parameters of the map"""
    tried: tuple[Candidate, ...]
    """every candidate with its score; empty where nothing was chosen"""
    family: RankFamily | None
    """the same fit at every other rank, for the methods that have ranks"""
    n: int
    """rows that it was fitted on"""
    notes: tuple[str, ...]
    """warnings, one line each: too few rows, dimensions that never vary, no convergence"""


def fit_map(
    parts: Sequence[Moments],
    method: str = "ridge",
    *,
    source: str = "x",
    target: str = "y",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> MapFit:
    """Fits a map from `source` to `target` on the sum of `parts`, which are the folds where something is chosen.

    ====================================================================  =============================================
    method                                                                options (defaults)
    ====================================================================  =============================================
    mean identity identity_bias scalar scalar_bias procrustes             none
    procrustes_scaled
    lstsq                                                                 bias=True
    ridge                                                                 alpha="cv" | "gcv" | number, alphas=ALPHAS,
                                                                          absolute=False, metric="uniform", bias=True
    lasso                                                                 alpha="cv" | number, alphas=SPARSE_ALPHAS
    elastic_net                                                           the same, l1_ratios=(0.5,)
    reduced_rank                                                          rank="cv" | number, alpha=0.0 | "cv" | "gcv",
                                                                          metric="weighted", update=False
    truncation                                                            rank, alpha, update
    pls                                                                   components="cv" | number, at_most=20,
                                                                          scale=False
    ====================================================================  =============================================

    Ridge penalties count in units of the mean diagonal of the centred X'X unless `absolute`; lasso and elastic net as
    scikit-learn's. `metric` is the R2 that chooses or that a reduced rank maximises: uniform, weighted, whitened.

    Raises:
        UserError: an unknown method or option, too few rows for the width, a side that never varies, a rank or a
            penalty out of range, fewer than two parts where something is to be chosen by folds.

    >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    >>> fit_map([Moments().update({"x": x, "y": 3 * x + 1})], "scalar_bias").map(torch.ones(3)).tolist()
    [4.0, 4.0, 4.0]
    """
    if method not in METHODS:
        raise UserError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    fitter = METHODS[method]
    allowed = [name for name in inspect.signature(fitter).parameters if name not in ("data", "method")]
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise UserError(f"{method} has no option {unknown[0]!r}; it has {', '.join(allowed) or 'none'}")
    if not parts:
        raise UserError("no moments given")
    chosen_parts = tuple(part.select([(source, target)]) for part in parts)
    data = _Data(chosen_parts, total(chosen_parts), source, target)
    free = method == "lstsq" or (method in ("reduced_rank", "truncation") and options.get("alpha", 0.0) == 0)
    notes = check_counts(data.whole, source, target, penalised=not free, method=method)
    fit = fitter(data, method, **options)
    meta = {**fit.map.meta, "method": method}
    made = LinearMap(fit.map.weight.to(dtype), fit.map.bias.to(dtype), meta)
    return replace(fit, map=made, notes=(*notes, *fit.notes))


class _Data(NamedTuple):
    parts: tuple[Moments, ...]
    whole: Moments
    source: str
    target: str

    def folds(self) -> list[tuple[Moments, Moments]]:
        """(training, held out) of every fold."""
        if len(self.parts) < 2:
            raise UserError("cross-validation needs at least two folds; pass the moments of each fold as a part")
        return [(self.whole - part, part) for part in self.parts]

    def fit(self, made: LinearMap, method: str, chosen: dict[str, Any], **rest: Any) -> MapFit:
        return MapFit(made, method, chosen, **{"tried": (), "family": None, "n": self.whole.n, "notes": (), **rest})


def _baseline(data: _Data, method: str) -> MapFit:
    made = baseline(data.whole, method, data.source, data.target)
    return data.fit(made, method, {key: made.meta[key] for key in ("scale",) if key in made.meta})


def _lstsq(data: _Data, method: str, bias: bool = True) -> MapFit:
    made = Spectrum.of(data.whole, data.source, centred=bias).ridge(data.target)
    return data.fit(made, method, {})


def _ridge(
    data: _Data,
    method: str,
    alpha: Choice = "cv",
    alphas: Sequence[int | float] = ALPHAS,
    absolute: bool = False,
    metric: str = "uniform",
    bias: bool = True,
) -> MapFit:
    settings: dict[str, Any] = {"alpha": alpha, "alphas": alphas, "absolute": absolute, "metric": metric}
    settings |= {"centred": bias, "dtype": torch.float64}
    fit = fit_ridge_targets(data.parts, data.source, [data.target], **settings)[data.target]
    tried = tuple(Candidate({"alpha": a}, score) for a, score in fit.cv)
    chosen = {"alpha": fit.alpha, "alpha_absolute": fit.alpha_absolute}
    return data.fit(fit.map, method, chosen, tried=tried)


def _lasso(
    data: _Data, method: str, alpha: int | float | str = "cv", alphas: Sequence[int | float] = SPARSE_ALPHAS
) -> MapFit:
    return _elastic_net(data, method, alpha, alphas, (1.0,))


def _elastic_net(
    data: _Data,
    method: str,
    alpha: int | float | str = "cv",
    alphas: Sequence[int | float] = SPARSE_ALPHAS,
    l1_ratios: Sequence[int | float] = (0.5,),
) -> MapFit:
    given = alpha != "cv"
    if not given and not alphas:
        raise UserError("cross-validation needs at least one alpha")
    grid = [penalty(a) for a in ([alpha] if given else alphas)]
    pairs = [(a, float(ratio)) for ratio in l1_ratios for a in grid]
    if not pairs:
        raise UserError("elastic_net needs at least one l1_ratio")
    best = pairs[0]
    tried: tuple[Candidate, ...] = ()
    if len(pairs) > 1 or not given:
        folds = data.folds()
        scores = {pair: 0.0 for pair in pairs}
        for train, held in folds:
            spectrum = Spectrum.of(train, data.source)
            for ratio in dict.fromkeys(float(r) for r in l1_ratios):
                for a, made in zip(grid, sparse_path(spectrum, data.target, grid, l1_ratio=ratio).maps, strict=True):
                    scores[a, ratio] += score_map(made, held, data.source, data.target).r2_uniform / len(folds)
        tried = tuple(Candidate({"alpha": a, "l1_ratio": ratio}, scores[a, ratio]) for a, ratio in pairs)
        best = max(pairs, key=scores.__getitem__)
    path = sparse_path(Spectrum.of(data.whole, data.source), data.target, [best[0]], l1_ratio=best[1])
    late = () if path.converged else (f"{method} stopped at a gap of {path.gaps[0]:.1e}, above {path.tolerance:.0e}",)
    return data.fit(path.maps[0], method, {"alpha": best[0], "l1_ratio": best[1]}, tried=tried, notes=late)


def _ranked(
    data: _Data,
    method: str,
    rank: int | str = "cv",
    alpha: Choice = 0.0,
    metric: str = "weighted",
    update: bool = False,
) -> MapFit:
    if alpha in ("cv", "gcv"):
        absolute = fit_ridge_targets(data.parts, data.source, [data.target], alpha=alpha)[data.target].alpha_absolute
    else:
        absolute = penalty(alpha) * Spectrum.of(data.whole, data.source).unit if alpha else 0.0

    def family(train: Moments) -> RankFamily:
        spectrum = Spectrum.of(train, data.source)
        if method == "truncation":
            return truncated_ranks(spectrum, data.target, alpha=absolute, update=update)
        return optimal_ranks(spectrum, data.target, alpha=absolute, metric=metric, update=update)

    chosen = {"alpha_absolute": absolute, "update": update}
    return _of_rank(data, method, family, rank, chosen, metric)


def _truncation(data: _Data, method: str, rank: int | str = "cv", alpha: Choice = 0.0, update: bool = False) -> MapFit:
    return _ranked(data, method, rank, alpha, "weighted", update)


def _pls(data: _Data, method: str, components: int | str = "cv", at_most: int = 20, scale: bool = False) -> MapFit:
    limit = min(at_most, data.whole.width(data.source)) if components == "cv" else components
    if isinstance(limit, str):
        raise UserError(f'components must be a number or "cv"; got {components!r}')

    def family(train: Moments) -> RankFamily:
        return partial_least_squares(train, data.source, data.target, components=limit, scale=scale)

    return _of_rank(data, method, family, components, {}, "weighted")


def _of_rank(
    data: _Data,
    method: str,
    make: Callable[[Moments], RankFamily],
    rank: int | str,
    chosen: dict[str, Any],
    metric: str,
) -> MapFit:
    """The map of one rank of a family; "cv": of the rank (from 1 up) with the highest mean held-out R2."""
    family = make(data.whole)
    tried: tuple[Candidate, ...] = ()
    if rank == "cv":
        curves = []
        for train, held in data.folds():
            white = train if metric == "whitened" else None
            curves.append(make(train).curve(held, data.source, data.target, train=white).metric(metric))
        shortest = min(family.highest, *(len(curve) - 1 for curve in curves))
        scores = torch.stack([curve[: shortest + 1] for curve in curves]).mean(0).tolist()
        tried = tuple(Candidate({"rank": r}, scores[r]) for r in range(1, shortest + 1))
        rank = max(range(1, shortest + 1), key=scores.__getitem__)
    if isinstance(rank, str) or not 1 <= rank <= family.highest:
        raise UserError(f'rank must lie in 1..{family.highest}, or be "cv"; got {rank!r}')
    return data.fit(family.map(rank), method, {**chosen, "rank": rank}, tried=tried, family=family)


METHODS: dict[str, Callable[..., MapFit]] = {
    **{name: _baseline for name in BASELINES},
    "lstsq": _lstsq,
    "ridge": _ridge,
    "lasso": _lasso,
    "elastic_net": _elastic_net,
    "reduced_rank": _ranked,
    "truncation": _truncation,
    "pls": _pls,
}
"""every method that `fit_map` knows, by name"""
