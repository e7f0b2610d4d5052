"""A store at a glance: what it holds, how long its rows are, which dimensions stand out, and where activations are massive."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import UserError
from ..sites import Site
from .context import row_frame
from .listing import compact_sites
from .sample import stratified_rows
from .views import size_text

if TYPE_CHECKING:
    import pandas as pd

    from .store import Store

ROWS = 2000
VALUES = 16 << 20
"""values of one site that are held at a time, at most"""
QUANTILES = {"q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95}
BINS = 48
"""of positions"""
TOP = 16
"""dimensions of a site that are listed"""
OUTLIER, SHARE = 6.0, 0.06
MASSIVE, TIMES = 100.0, 1000.0
LISTED = 100
"""massive activations that are listed, the largest first"""
RULES = (
    f"Outlier dimension: at least {OUTLIER:g} times the root mean square of its row, in at least {SHARE:.0%} of the rows "
    "that are neither first nor massive (after arXiv:2208.07339, whose magnitude of 6 is of inputs that a norm has scaled).",
    f"Massive activation: a magnitude above {MASSIVE:g} and at least {TIMES:,.0f} times the median magnitude of its row "
    "(arXiv:2402.17762).",
)


@dataclass(frozen=True, eq=False)
class StoreOverview:
    """What `store_overview` found. All numbers are of the `sampled` rows; norms are L2 norms, in the model's own units."""

    path: str
    about: dict[str, Any]
    """model, family, layers, prompts, n_prompts, tokens, rows, sites, dtype, n_bytes, basis"""
    sites: tuple[Site, ...]
    """those that were looked at"""
    sampled: int
    """rows that were drawn evenly over the store"""
    first: int
    """rows at position 0 that were drawn beside them"""
    seed: int
    norms: pd.DataFrame
    """one line per site and group (first: rows at position 0; others): site, point, layer, group, n, nonfinite (rows with
    a value that is none), q05, q25, median, q75, q95 of the norm"""
    positions: pd.DataFrame
    """one line per site and stretch of positions: site, low, high, n, and the quantiles of the norm"""
    dimensions: pd.DataFrame
    """the dimensions of each site that stand out most, by the rows that are neither first nor massive: site, dim, mean_abs,
    std, max_abs, ratio (mean_abs over its median of all dimensions), share (of rows where it is large), outlier"""
    massive: pd.DataFrame
    """massive activations: site, row, prompt, position, token, dim, value, ratio (to the row's median), first"""

    @property
    def outliers(self) -> pd.DataFrame:
        """The dimensions that are outliers by the rule."""
        return self.dimensions[self.dimensions["outlier"]]

    def facts(self) -> list[tuple[str, str]]:
        """What the store holds, in words."""
        about = self.about
        return [
            ("model", f"{about['model']} ({about['family']}, {about['layers']} layers)"),
            ("prompts", f"{about['prompts']}: {about['n_prompts']:,}"),
            ("rows", f"{about['rows']:,} (tokens: {about['tokens']})"),
            ("sites", f"{compact_sites(about['sites'])}; width {', '.join(map(str, about['widths']))}"),
            ("values", f"{about['dtype']}, {size_text(about['n_bytes'])}, basis {about['basis']}"),
            ("sample", self.sample),
        ]  # fmt: skip

    @property
    def sample(self) -> str:
        """How many rows of how many the numbers are of."""
        more = f", and {self.first:,} rows at position 0" if self.first else "; no row is at position 0"
        drawn = f"drawn evenly over prompts and positions (seed {self.seed})"
        return f"{self.sampled:,} of {self.about['rows']:,} rows, {drawn}{more}"

    def _repr_html_(self) -> str:
        norms = self.norms.iloc[_spread(len(self.norms), 24)]
        parts = [
            _table((), self.facts()),
            f"<p><b>L2 norms of rows</b> ({len(norms)} of {len(self.norms)} lines)</p>",
            _frame_table(norms[["site", "group", "n", "nonfinite", *QUANTILES]]),
            f"<p><b>Outlier dimensions: {len(self.outliers)}</b>. {escape(RULES[0])}</p>",
            _frame_table(self.outliers.head(TOP)),
            f"<p><b>Massive activations: {self.told_apart}</b>. {escape(RULES[1])}</p>",
            _frame_table(self.massive[~self.massive["first"].astype(bool)].head(TOP)),
        ]
        return f"<div>{''.join(parts)}</div>"

    @property
    def told_apart(self) -> str:
        """How many rows with massive activations are first in their prompt, and how many are not."""
        rows = self.massive.drop_duplicates("row")
        first = int(rows["first"].sum())
        return f"{first} rows at position 0, {len(rows) - first} elsewhere (listed)"


def store_overview(
    store: Store, rows: int = ROWS, seed: int = 0, *, sites: Iterable[Site | str | int] | None = None
) -> StoreOverview:
    """A store at a glance, from a sample of its rows: some hundred MB are held at most, and nothing is read whole.

    rows: how many are drawn evenly over the store, and so over its prompts and positions; an eighth as many more are
        drawn from those at position 0, which are told apart from all others. Of very wide sites fewer are drawn.
    sites: all unless given.
    Raises UserError for a site that the store does not have.

    >>> store_overview(store).norms  # doctest: +SKIP
    """
    import pandas as pd

    chosen = list(dict.fromkeys(_site(store, site) for site in sites)) if sites is not None else store.sites
    rows = max(1, min(rows, VALUES // max(store.width(site) for site in chosen)))
    even = stratified_rows(store, rows, seed=seed)
    start = stratified_rows(store, max(1, rows // 8), seed=seed + 1, first=True)
    frame = row_frame(store, even)
    later = torch.tensor((frame["position"] != 0).to_numpy(bool))
    index = torch.cat([even[later], start])
    frame = row_frame(store, index)
    found = [_site_parts(store, site, index, frame) for site in chosen]
    tables = [pd.concat([part[i] for part in found], ignore_index=True) for i in range(4)]
    about = store.manifest
    facts = {
        "model": about["model"]["name"], "family": about["model"].get("family", "?"), "layers": about["model"]["n_layers"],
        "prompts": about["prompts"]["name"], "n_prompts": about["prompts"]["count"], "tokens": store.tokens,
        "rows": store.n_rows, "sites": tuple(map(str, store.sites)), "dtype": store.dtype, "n_bytes": store.n_bytes,
        "widths": sorted({store.width(site) for site in store.sites}), "basis": about["basis"],
    }  # fmt: skip
    tables[3] = tables[3].sort_values("value", key=abs, ascending=False, ignore_index=True, kind="stable")
    return StoreOverview(str(store.path), facts, tuple(chosen), len(even), len(start), seed, *tables)


def _site(store: Store, site: Site | str | int) -> Site:
    parsed = Site.parse(site, store.manifest["model"]["n_layers"])
    if parsed not in store.sites:
        raise UserError(f"store {store.path} has no {parsed}; it has {', '.join(map(str, store.sites))}")
    return parsed


def _site_parts(
    store: Store, site: Site, index: Tensor, frame: pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The four tables of one site; the sampled rows of it are read once."""
    x = store.read(site, index).float()
    good = torch.isfinite(x).all(1)
    norm = torch.linalg.vector_norm(x, dim=1).double().numpy()
    position, finite = frame["position"].to_numpy(), good.numpy()
    first = np.asarray(position == 0, bool)
    magnitude = x.abs()
    median = magnitude.median(1).values
    massive = (magnitude > MASSIVE) & (magnitude >= TIMES * median[:, None]) & good[:, None]
    others = torch.from_numpy(finite & ~first) & ~massive.any(1)
    return (
        _norms(site, norm, finite, first),
        _positions(site, norm[finite], position[finite]),
        _dimensions(site, x, magnitude, others),
        _massive(site, x, massive, median, frame),
    )


def _quantiles(norm: np.ndarray) -> dict[str, float]:
    values = np.quantile(norm, list(QUANTILES.values())) if len(norm) else [float("nan")] * len(QUANTILES)
    return dict(zip(QUANTILES, map(float, values), strict=True))


def _norms(site: Site, norm: np.ndarray, finite: np.ndarray, first: np.ndarray) -> pd.DataFrame:
    import pandas as pd

    lines = []
    for group, mask in (("others", ~first), ("first", first)):
        if mask.any():
            lines.append({"site": str(site), "point": site.point, "layer": site.layer, "group": group, "n": int(mask.sum()),
                          "nonfinite": int((mask & ~finite).sum()), **_quantiles(norm[mask & finite])})  # fmt: skip
    return pd.DataFrame(lines)


def _positions(site: Site, norm: np.ndarray, position: np.ndarray) -> pd.DataFrame:
    """Quantiles of the norm by position: each by itself where there are few, stretches of equal length where not."""
    import pandas as pd

    columns = ["site", "low", "high", "n", *QUANTILES]
    known = ~pd.isna(position)
    place, norm = position[known].astype(np.int64), norm[known]
    if not len(place):
        return pd.DataFrame(columns=columns)
    width = max(1, -(-int(place.max()) // BINS))
    stretch = np.where(place == 0, -1, (place - 1) // width)  # the first position stays by itself
    lines = []
    for number in np.unique(stretch):
        mine = stretch == number
        lines.append({"site": str(site), "low": int(place[mine].min()), "high": int(place[mine].max()),
                      "n": int(mine.sum()), **_quantiles(norm[mine])})  # fmt: skip
    return pd.DataFrame(lines, columns=columns)


def _dimensions(
    site: Site, x: Float[Tensor, "n d"], magnitude: Float[Tensor, "n d"], rows: Bool[Tensor, " n"]
) -> pd.DataFrame:
    import pandas as pd

    columns = ["site", "dim", "mean_abs", "std", "max_abs", "ratio", "share", "outlier"]
    x, magnitude = (x, magnitude) if bool(rows.all()) else (x[rows], magnitude[rows])
    if not len(x):
        return pd.DataFrame(columns=columns)
    mean_abs, std = magnitude.mean(0), x.std(0, correction=0)
    rms = x.square().mean(1, keepdim=True).sqrt()
    share = ((magnitude >= OUTLIER * rms) & (rms > 0)).float().mean(0)
    middle = mean_abs.median()
    ratio = mean_abs / middle if middle > 0 else torch.full_like(mean_abs, float("nan"))
    outlier = share >= SHARE
    # outliers first, then by how large they are; of equal ones the first
    order = np.lexsort((-mean_abs.numpy(), ~outlier.numpy()))[: max(TOP, int(outlier.sum()))]
    top = torch.from_numpy(order)
    values = {"mean_abs": mean_abs, "std": std, "max_abs": magnitude.amax(0), "ratio": ratio, "share": share,
              "outlier": outlier}  # fmt: skip
    return pd.DataFrame({"site": str(site), "dim": order} | {k: v[top].numpy() for k, v in values.items()})


def _massive(
    site: Site, x: Float[Tensor, "n d"], massive: Bool[Tensor, "n d"], median: Float[Tensor, " n"], frame: pd.DataFrame
) -> pd.DataFrame:
    import pandas as pd

    which, dim = massive.nonzero(as_tuple=True)
    order = x[which, dim].abs().argsort(descending=True, stable=True)[:LISTED]
    which, dim = which[order], dim[order]
    lines = frame.iloc[which.numpy()][["row", "prompt", "position", "token"]].reset_index(drop=True)
    ratio = (x[which, dim].abs() / median[which]).numpy()
    found = lines.assign(dim=dim.numpy(), value=x[which, dim].numpy(), ratio=ratio)
    found.insert(0, "site", pd.Series([str(site)] * len(found), dtype=object))
    return found.assign(first=(found["position"] == 0).astype(bool))


def _spread(n: int, most: int) -> list[int]:
    return list(range(n)) if n <= most else sorted({round(i * (n - 1) / (most - 1)) for i in range(most)})


def _frame_table(frame: pd.DataFrame) -> str:
    return _table(list(frame.columns), frame.itertuples(index=False)) if len(frame) else "<p>none</p>"


def _table(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """An HTML table of anything, every cell escaped and cut at 200 characters."""
    top = f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>" if head else ""
    body = "".join(f"<tr>{''.join(f'<td>{escape(_cell(cell))}</td>' for cell in line)}</tr>" for line in lines)
    return f"<table>{top}{body}</table>"


def _cell(value: Any) -> str:
    if isinstance(value, (float, np.floating)):
        return f"{value:.4g}"
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}… ({len(text):,} characters)"
