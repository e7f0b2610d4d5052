"""Rows of a site in two dimensions: PCA, or UMAP where it is installed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import UserError
from workbench.sites import Site
from workbench.store import Store
from workbench.store.resident import ResidentRows
from workbench.store.sample import stratified_rows

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Projection", "project_rows", "stratified_rows"]

METHODS = ("pca", "umap")
FITTED = 4000
"""rows that a projection is fitted on, at most"""
BATCH = 4096
UMAP_DIMENSIONS = 50
"""principal components that UMAP is given"""


@dataclass(frozen=True, eq=False)
class Projection:
    """What `project_rows` found: row `rows[i]` of the store lies at `points[i]`."""

    site: Site
    method: str
    rows: Int[Tensor, " n"]
    points: Float[Tensor, "n 2"]
    """float32 on the CPU; NaN for rows with a value that is not finite"""
    norms: Float[Tensor, " n"]
    """L2 norm of each row, in activation units"""
    shares: tuple[float, float] | None
    """of the variance of the fitted rows, along each axis; None for UMAP, whose axes mean nothing"""
    fitted: int
    """rows that it was fitted on, drawn evenly from `rows`"""
    n_rows: int
    """of the whole store"""
    seed: int

    def frame(self) -> pd.DataFrame:
        """One line per row: row, x, y."""
        import pandas as pd

        return pd.DataFrame({"row": self.rows.numpy(), "x": self.points[:, 0].numpy(), "y": self.points[:, 1].numpy()})

    @property
    def axes(self) -> tuple[str, str]:
        """The names of the two axes, with the share of variance where there is one."""
        if self.shares is None:
            return "UMAP 1 (no unit)", "UMAP 2 (no unit)"
        one, two = (f"PC {i} ({share:.1%} of variance, activation units)" for i, share in enumerate(self.shares, 1))
        return one, two

    @property
    def remark(self) -> str:
        """How many rows of how many are shown, and what the projection was fitted on."""
        return (f"{len(self.rows):,} of {self.n_rows:,} rows at {self.site}; {self.method.upper()} fitted on "
                f"{self.fitted:,} of them (seed {self.seed})")  # fmt: skip

    def _repr_html_(self) -> str:
        from html import escape

        return f"<p>{escape(self.remark)}; axes: {escape(', '.join(self.axes))}</p>"


def project_rows(
    source: Store | ResidentRows,
    site: Site | str | int,
    rows: Int[Tensor, " n"],
    method: str = "pca",
    *,
    seed: int = 0,
    fitted: int = FITTED,
) -> Projection:
    """Some rows of a site in two dimensions.

    pca: the two directions of most variance of at most `fitted` of the rows (randomised SVD, arXiv:0909.4061, after the
    mean is taken off; each axis so signed that its largest weight is positive), applied to all of them batch by batch:
    x -> (x - mean) @ V, in the activations' own units. umap: arXiv:1802.03426 with its defaults on the first 50 principal
    components, fitted on as many; the others are placed by it.

    source: a store, or its rows on a device, which are used where the site is kept there. rows: their indices, as
    `stratified_rows` draws them. Rows with values that are not finite have no place (NaN).
    Raises UserError for an unknown method, for umap where it is not installed, for fewer than two rows to fit on, and
    what `Store.read` raises.

    >>> project_rows(store, "resid_post.5", stratified_rows(store, 20_000)).points  # doctest: +SKIP
    """
    if method not in METHODS:
        raise UserError(f"unknown projection {method!r:.80}; allowed: {', '.join(METHODS)}")
    store = source.store if isinstance(source, ResidentRows) else source
    place = Site.parse(site, store.manifest["model"]["n_layers"])
    umap = _umap() if method == "umap" else None
    chosen = rows[torch.arange(min(fitted, len(rows))) * len(rows) // max(1, min(fitted, len(rows)))]
    x = _read(source, place, chosen).float().cpu()
    x = x[torch.isfinite(x).all(1)]
    if len(x) < 2:
        raise UserError(f"{len(x)} of {len(chosen)} rows of {place} can be used; a projection is fitted on two or more")
    pca = _fit(x.numpy(), 2 if umap is None else UMAP_DIMENSIONS, seed)
    parts, norms = zip(*_coordinates(source, place, rows, pca), strict=True)
    if umap is None:
        points, shares = _wide(torch.cat(parts)), _shares(pca)
    else:
        reducer = umap.UMAP(n_components=2, random_state=seed).fit(pca.transform(x.numpy()))
        points, shares = torch.cat([_placed(reducer, part) for part in parts]), None
    return Projection(place, method, rows, points, torch.cat(norms), shares, len(x), store.n_rows, seed)


def _read(source: Store | ResidentRows, site: Site, rows: Tensor) -> Tensor:
    return source.some(site, rows) if isinstance(source, ResidentRows) else source.read(site, rows)


def _fit(x: np.ndarray, components: int, seed: int) -> Any:
    from sklearn.decomposition import PCA

    with np.errstate(invalid="ignore", divide="ignore"):  # rows that are all the same have no variance to share
        return PCA(min(components, *x.shape), svd_solver="randomized", iterated_power=4, random_state=seed).fit(x)


def _coordinates(source: Store | ResidentRows, site: Site, rows: Tensor, pca: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """(x - mean) @ V and the norm of all rows, batch by batch on the device that they are on."""
    mean, axes = (torch.from_numpy(np.asarray(part, dtype=np.float32)) for part in (pca.mean_, pca.components_.T))
    for index in rows.split(BATCH):
        x = _read(source, site, index).float()
        found = (x - mean.to(x.device)) @ axes.to(x.device)
        found[~torch.isfinite(found).all(1)] = float("nan")
        yield found.cpu(), torch.linalg.vector_norm(x, dim=1).cpu()


def _wide(points: Tensor) -> Tensor:
    """Points with two coordinates, the second of which is 0 where there is but one."""
    return points if points.shape[1] == 2 else torch.nn.functional.pad(points, (0, 2 - points.shape[1]))


def _shares(pca: Any) -> tuple[float, float]:
    one, two = [*np.nan_to_num(pca.explained_variance_ratio_).tolist(), 0.0][:2]
    return one, two


def _placed(reducer: Any, part: Tensor) -> Tensor:
    points = torch.full((len(part), 2), float("nan"))
    good = torch.isfinite(part).all(1)
    if good.any():
        points[good] = torch.from_numpy(np.asarray(reducer.transform(part[good].numpy()), dtype=np.float32))
    return points


def has_umap() -> bool:
    """Whether `method="umap"` can be used."""
    from importlib.util import find_spec

    return find_spec("umap") is not None


def _umap() -> Any:
    try:
        import umap
    except ImportError:
        raise UserError("UMAP needs the package umap-learn, which is not installed: pip install umap-learn, or take "
                        "method='pca'") from None  # fmt: skip
    return umap
