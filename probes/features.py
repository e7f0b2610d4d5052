"""How well a map carries each feature of a dictionary: what it reads there, and whether the feature then fires.

Everything is a running sum in float64 over batches, kept by shard of prompts, so that every figure has a jackknife
interval and nothing of the size rows x features is ever held.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import UserError
from workbench.maps.linear_map import LinearMap
from workbench.sites import Site

from .dictionaries import Dictionary, check_features
from .readouts import Readout

if TYPE_CHECKING:
    import pandas as pd

    from workbench.store import Store

CELLS = 1 << 21  # rows x features worked on at once
Batch = tuple[Tensor, Tensor, Tensor]  # source rows [n, d_in], target rows [n, d_out], prompt of each row [n]
SUMS = ("n", "t", "tt", "p", "pp", "tp", "ee")  # of truth t, prediction p and error e: over firing tokens, over all
FIRES = ("true", "predicted", "both")


@dataclass(frozen=True, eq=False)
class FeatureMetrics:
    """One figure per feature [f], float64, NaN where it does not exist.

    The truth of feature f at a token is <y, u_f>, u_f its decoder direction at length 1; the prediction <map(x), u_f>.
    Figures without a suffix are over the tokens where the feature truly fires (encode(y)_f above `firing`); those that
    end in `_all` are over all tokens. `se` holds the jackknife's standard error of each, over shards of prompts.
    """

    features: Int[Tensor, " f"]
    """their numbers in the dictionary"""
    tokens: int
    """rows in all"""
    shards: int
    """shards of prompts that the intervals come from; below 2 there are none"""
    count: Float[Tensor, " f"]
    """tokens where the feature truly fires"""
    r2: Float[Tensor, " f"]
    """1 - sum (t - p)^2 / sum (t - mean t)^2"""
    mse: Float[Tensor, " f"]
    pearson: Float[Tensor, " f"]
    calibration: Float[Tensor, " f"]
    """sum t p / sqrt(sum t^2 sum p^2), the uncentred cosine"""
    r2_all: Float[Tensor, " f"]
    mse_all: Float[Tensor, " f"]
    pearson_all: Float[Tensor, " f"]
    calibration_all: Float[Tensor, " f"]
    predicted_count: Float[Tensor, " f"]
    """tokens where the feature fires on the predicted row"""
    precision: Float[Tensor, " f"]
    """of those, the share where it truly fires"""
    recall: Float[Tensor, " f"]
    """of the tokens where it truly fires, the share where it fires on the predicted row"""
    f1: Float[Tensor, " f"]
    se: Mapping[str, Float[Tensor, " f"]]

    def __repr__(self) -> str:
        return f"FeatureMetrics({len(self.features)} features, {self.tokens} tokens, median R2 {self.median('r2'):.3f})"

    def median(self, name: str = "r2") -> float:
        """The median of a figure over the features that have it; NaN where none has."""
        return float(getattr(self, name).nanmedian())

    def interval(self, name: str = "r2", confidence: float = 0.95) -> tuple[Tensor, Tensor]:
        """(low, high) of a figure by feature: Student's t over the jackknife's shards."""
        from scipy import stats

        half = float(stats.t.ppf((1 + confidence) / 2, max(self.shards - 1, 1))) * self.se[name]
        return getattr(self, name) - half, getattr(self, name) + half

    def frame(self) -> pd.DataFrame:
        """One line per feature, indexed by its number; of r2, r2_all and f1 with 95 % intervals."""
        import pandas as pd

        columns = {f.name: getattr(self, f.name).numpy() for f in fields(self) if f.name in MEASURES}
        for name in ("r2", "r2_all", "f1"):
            low, high = self.interval(name)
            columns |= {f"{name}_low": low.numpy(), f"{name}_high": high.numpy()}
        return pd.DataFrame(columns, index=pd.Index(self.features.numpy(), name="feature"))


MEASURES = tuple(f.name for f in fields(FeatureMetrics) if f.name not in ("features", "tokens", "shards", "se"))


def row_batches(
    x: Float[Tensor, "n d_in"],
    y: Float[Tensor, "m d_out"],
    groups: Int[Tensor, " n"] | Sequence[int] | None = None,
    size: int = 8192,
) -> Iterator[Batch]:
    """Paired rows in batches, each with the prompt that its rows come from.

    groups: the prompt of each row; None: each row its own. Raises UserError where x, y and groups do not pair.
    """
    if len(x) != len(y) or not len(x):
        raise UserError(f"x and y must pair row by row; got {len(x)} rows of x and {len(y)} rows of y")
    labels = torch.arange(len(x)) if groups is None else torch.as_tensor(groups)
    if len(labels) != len(x):
        raise UserError(f"groups must name one group per row; got {len(labels)} for {len(x)} rows")
    _, dense = labels.unique(return_inverse=True)
    return ((x[i : i + size], y[i : i + size], dense[i : i + size]) for i in range(0, len(x), size))


def store_batches(
    store: Store, source: Site | str | int, target: Site | str | int, *, size: int = 8192,
    device: torch.device | str | None = None,
) -> Iterator[Batch]:  # fmt: skip
    """The rows of two sites of a store side by side, in float32, grouped by prompt; memory stays flat."""
    starts = range(0, store.n_rows, size)
    options: dict[str, Any] = {"dtype": torch.float32, "device": device}
    pairs = zip(starts, store.iter_batches(source, size, **options), store.iter_batches(target, size, **options),
                strict=True)  # fmt: skip
    return ((x, y, store.prompt_index[i : i + size]) for i, x, y in pairs)


def feature_metrics(
    operator: LinearMap,
    dictionary: Dictionary,
    batches: Iterable[Batch],
    *,
    features: Sequence[int] | Int[Tensor, " f"] | None = None,
    firing: float = 1e-6,
    shards: int = 20,
) -> FeatureMetrics:
    """How well one map predicts each feature; see `measure_features`.

    >>> rows = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    >>> axes = Dictionary(torch.eye(2), torch.zeros(2), torch.eye(2), torch.zeros(2), "relu")
    >>> feature_metrics(LinearMap.identity(2), axes, row_batches(rows, rows)).r2.tolist()
    [1.0, 1.0]
    """
    made = measure_features({"": operator}, dictionary, batches, features=features, firing=firing, shards=shards)
    return made[""]


def measure_features(
    operators: Mapping[str, LinearMap],
    dictionary: Dictionary,
    batches: Iterable[Batch],
    *,
    features: Sequence[int] | Int[Tensor, " f"] | None = None,
    firing: float = 1e-6,
    shards: int = 20,
) -> dict[str, FeatureMetrics]:
    """Several maps on the same rows in one pass: an operator beside the identity, a shuffled control, lower ranks.

    Args:
        operators: maps from source rows to target rows, by name; `operator.truncate(r)` is the one of matched rank r.
        dictionary: at the target.
        batches: from `row_batches` or `store_batches`; on the device where the work is to be done.
        features: those to measure; all unless given.
        firing: a feature fires where its activation is above this.
        shards: prompts are dealt into so many for the jackknife (prompt number modulo shards).

    Products are in the dtype of the rows (float32 at least), sums in float64. Raises UserError for widths that do not
    fit, unknown features, or no rows.

    Source: arXiv:2508.17540 and its released eval.py (masked R2, calibration); firing figures are ours, and features
    without two active tokens have NaN here where that code says 0.
    """
    if not operators:
        raise UserError("no operators to measure; give at least one")
    for name, operator in operators.items():
        if operator.d_out != dictionary.width:
            raise UserError(f"operator {name or 'given'} maps to width {operator.d_out}, the dictionary reads width "
                            f"{dictionary.width}; give one that maps to the dictionary's site")  # fmt: skip
    if shards < 1:
        raise UserError(f"shards must be at least 1; got {shards}")
    index = torch.arange(dictionary.n_features) if features is None else check_features(features, dictionary.n_features)
    pass_ = _Pass(operators, dictionary, index, firing, shards)
    for x, y, groups in batches:
        if len(x) != len(y) or len(x) != len(groups):
            raise UserError(f"a batch must pair row by row; got {len(x)} and {len(y)} rows of {len(groups)} groups")
        step = max(1, CELLS // len(index))
        for i in range(0, len(x), step):
            pass_.add(x[i : i + step], y[i : i + step], groups[i : i + step].cpu())
    if not pass_.tokens:
        raise UserError("no rows to measure features on; give at least one batch")
    return {name: pass_.result(name) for name in operators}


class _Pass:
    """Running sums by shard: [shards, f, sums] over firing and over all tokens, and counts of firing."""

    def __init__(
        self, operators: Mapping[str, LinearMap], dictionary: Dictionary, index: Tensor, firing: float, shards: int
    ) -> None:
        self.operators, self.firing, self.shards, self.index = dict(operators), firing, shards, index
        self.readouts: dict[str, Readout] = {}
        self.whole = dictionary.kind == "topk"  # its features compete, so all must be encoded
        self.dictionary = dictionary if self.whole else dictionary.select(index)
        self.directions = dictionary.directions[index.to(dictionary.W_dec.device)]
        self.tokens, self.seen, self.ready = 0, torch.zeros(shards, dtype=torch.bool), False
        f = len(index)
        self.sums = {name: torch.zeros(2, shards, f, len(SUMS), dtype=torch.float64) for name in operators}
        self.fires = {name: torch.zeros(shards, f, len(FIRES), dtype=torch.float64) for name in operators}

    def _prepare(self, x: Tensor, y: Tensor) -> None:
        """Moves everything to the rows' device and dtype, once."""
        self.dictionary.check(width=y.shape[1])
        dtype = torch.promote_types(y.dtype, torch.float32)
        exact, directions = self.dictionary.to(x.device), self.directions.to(x.device)
        self.readouts = {name: Readout.of(op, exact, directions, dtype) for name, op in self.operators.items()}
        self.dictionary, self.directions = exact.to(dtype), directions.to(dtype)
        self.sums = {name: value.to(x.device) for name, value in self.sums.items()}
        self.fires = {name: value.to(x.device) for name, value in self.fires.items()}
        self.ready = True

    def add(self, x: Tensor, y: Tensor, groups: Tensor) -> None:
        if not (x.isfinite().all() and y.isfinite().all()):
            raise UserError("rows hold NaN or infinite values; remove those rows first")
        if not self.ready:
            self._prepare(x, y)
        x, y = x.to(self.directions), y.to(self.directions)
        self.tokens += len(x)
        shard = groups.long() % self.shards
        self.seen[shard] = True
        order = shard.argsort(stable=True)  # rows of one shard lie together: a sum per shard is a sum over a slice
        parts = torch.bincount(shard, minlength=self.shards).tolist()
        x, y = x[order.to(x.device)], y[order.to(y.device)]
        truth, active = y @ self.directions.T, self._fires(self.dictionary.encode(y))
        for name, readout in self.readouts.items():
            predicted, acts = readout(x)
            fires, start = self._fires(acts), 0
            for s, size in enumerate(parts):
                part = slice(start, start + size)
                if size:
                    self._sum(name, s, truth[part], predicted[part], active[part], fires[part])
                start += size

    def _fires(self, acts: Tensor) -> Tensor:
        fires = acts > self.firing
        return fires[:, self.index.to(fires.device)] if self.whole else fires

    def _sum(self, name: str, s: int, t: Tensor, p: Tensor, active: Tensor, fires: Tensor) -> None:
        t, p, mask = t.double(), p.double(), active.double()
        e = t - p
        for i, weight in enumerate((mask, None)):
            n = mask.sum(0) if i == 0 else torch.full_like(mask[0], len(t))
            wt, wp, we = (t, p, e) if weight is None else (t * weight, p * weight, e * weight)
            parts = (n, wt.sum(0), (wt * t).sum(0), wp.sum(0), (wp * p).sum(0), (wt * p).sum(0), (we * e).sum(0))
            self.sums[name][i, s] += torch.stack(parts, 1)
        counts = (mask.sum(0), fires.double().sum(0), (active & fires).double().sum(0))
        self.fires[name][s] += torch.stack(counts, 1)

    def result(self, name: str) -> FeatureMetrics:
        sums, fires = self.sums[name].cpu(), self.fires[name].cpu()
        whole = _figures(sums.sum(1), fires.sum(0))
        used = self.seen.nonzero().flatten().tolist()
        n = len(used)
        if n < 2:
            se = {key: torch.full_like(value, torch.nan) for key, value in whole.items()}
        else:
            left_out = [_figures(sums.sum(1) - sums[:, s], fires.sum(0) - fires[s]) for s in used]
            se = {key: _jackknife(torch.stack([part[key] for part in left_out])) for key in whole}
        return FeatureMetrics(self.index, self.tokens, n, **whole, se=se)


def _jackknife(left_out: Float[Tensor, "s f"]) -> Float[Tensor, " f"]:
    """The delete-one standard error, sqrt((s - 1) / s sum (theta_i - mean)^2); NaN where one is missing."""
    s = len(left_out)
    return ((s - 1) / s * (left_out - left_out.mean(0)).square().sum(0)).sqrt()


def _figures(sums: Float[Tensor, "2 f 7"], fires: Float[Tensor, "f 3"]) -> dict[str, Tensor]:
    """Every measure from its sums; 0 / 0 is NaN, and so is the spread of fewer than two tokens."""
    out: dict[str, Tensor] = {"count": fires[:, 0]}
    for i, suffix in enumerate(("", "_all")):
        n, t, tt, p, pp, tp, ee = sums[i].unbind(-1)
        enough = torch.where(n >= 2, 1.0, torch.nan)
        var_t, var_p = (tt - t * t / n).clamp_min(0), (pp - p * p / n).clamp_min(0)
        # what rounding leaves of a variance that is 0 must not be divided by
        var_t, var_p = (torch.where(v > 1e-13 * q, v, 0.0) for v, q in ((var_t, tt), (var_p, pp)))
        out["r2" + suffix] = torch.where(var_t > 0, 1 - ee / var_t, torch.nan) * enough
        out["mse" + suffix] = ee / n
        spread = (var_t * var_p).sqrt()
        out["pearson" + suffix] = torch.where(spread > 0, (tp - t * p / n) / spread, torch.nan) * enough
        out["calibration" + suffix] = tp / (tt * pp).sqrt()
    true, predicted, both = fires.unbind(-1)
    out |= {"predicted_count": predicted, "precision": both / predicted, "recall": both / true}
    out["f1"] = torch.where(true > 0, 2 * both / (true + predicted), torch.nan)
    return out
