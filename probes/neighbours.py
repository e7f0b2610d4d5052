"""The rows of a whole store that lie nearest to one of them, or to any vector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import UserError
from workbench.sites import Site
from workbench.store import Store
from workbench.store.resident import ResidentRows

if TYPE_CHECKING:
    import pandas as pd

METRICS = ("cosine", "euclidean")
CPU_BATCH, BATCH = 1024, 16_384
"""rows at a time: what stays in the cache of a CPU; what keeps a GPU busy"""
LANES = 8
"""partial sums, at least, in which any machine adds up a row: it bounds the rounding of a float32 score"""
SCORED = 4096
Score = Callable[[Tensor], Tensor]
"""of rows in float32 that nobody needs afterwards: a higher one is nearer"""


@dataclass(frozen=True, eq=False)
class Neighbours:
    """What `nearest_rows` found, the nearest first; of equally near rows the one with the lower number."""

    site: Site
    metric: str
    query: int | None
    """the row whose neighbours these are; None for a vector"""
    rows: Int[Tensor, " k"]
    scores: Float[Tensor, " k"]
    """cosine similarity (higher is nearer), or Euclidean distance in activation units (lower is nearer); float64"""
    searched: int
    """rows that were compared"""

    def frame(self) -> pd.DataFrame:
        """One line per neighbour: row, and cosine or distance."""
        import pandas as pd

        name = "cosine" if self.metric == "cosine" else "distance"
        return pd.DataFrame({"row": self.rows.numpy(), name: self.scores.numpy()})

    def _repr_html_(self) -> str:
        return str(self.frame().to_html(index=False))


def nearest_rows(
    source: Store | ResidentRows,
    site: Site | str | int,
    query: int | Float[Tensor, " d"],
    k: int = 10,
    *,
    metric: str = "cosine",
    other_prompts: bool = False,
) -> Neighbours:
    """The k rows of a site, of all in the store, nearest to a row (which is not its own neighbour) or to a vector.

    Exact: all rows are scored in float32, batch by batch where they are (on a GPU the site stays there), and whatever
    float32's rounding cannot rule out is scored again in float64. Rows that are equal have equal scores, and are told
    apart by their number. Rows with values that are not finite are nobody's neighbours; a row of zeros has cosine 0.

    other_prompts: leaves out all rows of the query's own prompt.
    Raises UserError for an unknown metric, k below 1, a row or site that the store does not have, a query that is not
    finite or, for the cosine, zero, a vector of another width, and `other_prompts` with a vector.

    >>> nearest_rows(store, "resid_post.5", 1234, k=5, other_prompts=True).rows  # doctest: +SKIP
    """
    rows = source if isinstance(source, ResidentRows) else ResidentRows(source, "cpu")
    store = rows.store
    place = Site.parse(site, store.manifest["model"]["n_layers"])
    if metric not in METRICS:
        raise UserError(f"unknown metric {metric!r:.80}; allowed: {', '.join(METRICS)}")
    if k < 1:
        raise UserError(f"k={k}: ask for one neighbour or more")
    vector, left_out = _query(store, place, query, other_prompts)
    if not torch.isfinite(vector).all() or (metric == "cosine" and not vector.any()):
        raise UserError(f"{'the vector' if left_out is None else f'row {query}'} of {place} is zero or not finite, so that "
                        "nothing is near it; take another one")  # fmt: skip
    found = _candidates(rows, place, vector, k, metric, left_out or range(0))
    exact = _exact(rows, place, vector, found, metric)
    order = np.lexsort((found.numpy(), exact if metric == "euclidean" else -exact))[:k]
    number = query if isinstance(query, int) else None
    return Neighbours(place, metric, number, found[order], torch.from_numpy(exact[order]),
                      store.n_rows - len(left_out or ()))  # fmt: skip


def _query(store: Store, site: Site, query: int | Tensor, other_prompts: bool) -> tuple[Tensor, range | None]:
    """The vector [d] in float64, and the rows that are none of its neighbours; None where it is no row."""
    if isinstance(query, Tensor):
        if other_prompts:
            raise UserError("other_prompts leaves out the prompt of a row; a vector comes from none")
        if query.shape != (store.width(site),):
            raise UserError(
                f"a vector of {len(query)} values has no neighbours at {site}, which is {store.width(site)} wide"
            )
        return query.detach().double().cpu(), None
    vector = store.read(site, [query])[0].double()  # says what is wrong with a row that is not there
    row = query % store.n_rows
    if not other_prompts:
        return vector, range(row, row + 1)
    from workbench.store.context import row_frame

    return vector, store.rows_of(int(row_frame(store, [row])["prompt"][0]))


def _candidates(rows: ResidentRows, site: Site, vector: Tensor, k: int, metric: str, left_out: range) -> Tensor:
    """Every row that may be among the nearest k, in one pass over the store."""
    size = CPU_BATCH if rows.device.type == "cpu" else BATCH
    slack = 2 * (len(vector) / LANES + 16) * 2.0**-24
    score = _cosine(vector.float().to(rows.device)) if metric == "cosine" else _nearness(vector.float().to(rows.device))
    best = torch.full((k,), -torch.inf, device=rows.device)
    kept: list[tuple[Tensor, Tensor]] = []
    at, x = (
        0,
        torch.empty((size, len(vector)), device=rows.device),
    )  # fresh memory would cost more than all that is done
    for batch in rows.batches(site, size):
        found = score(x[: len(batch)].copy_(batch)).nan_to_num_(-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
        low, high = max(left_out.start - at, 0), min(left_out.stop - at, len(found))
        if low < high:
            found[low:high] = -torch.inf
        best = torch.cat([best, found]).topk(k).values
        may = (found >= _limit(best[-1], slack, metric)) & (found > -torch.inf)
        where = may.nonzero().flatten()
        kept.append((where + at, found[where]))
        at += len(found)
    number, scores = (torch.cat(parts) for parts in zip(*kept, strict=True))
    return number[scores >= _limit(best[-1], slack, metric)].cpu()


def _limit(worst: Tensor, slack: float, metric: str) -> Tensor:
    """What a score must reach lest rounding alone kept it from the nearest; a cosine's error is absolute, a length's not."""
    return worst - slack if metric == "cosine" else worst * (1 + slack)


def _cosine(vector: Tensor) -> Score:
    unit = vector / torch.linalg.vector_norm(vector)

    def score(x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=1)
        return torch.where(length == 0, length, x @ unit / length)

    return score


def _nearness(vector: Tensor) -> Score:
    return lambda x: -torch.linalg.vector_norm(x.sub_(vector), dim=1)


def _exact(rows: ResidentRows, site: Site, vector: Tensor, found: Tensor, metric: str) -> np.ndarray:
    """The scores of some rows in float64; a row's score does not depend on those beside it."""
    q, parts = vector.numpy(), [np.empty(0)]
    for index in found.split(SCORED):
        x = rows.some(site, index).cpu().double().numpy()
        if metric == "euclidean":
            parts.append(np.sqrt(np.square(x - q).sum(1)))
            continue
        lengths = np.sqrt(np.square(x).sum(1)) * np.sqrt(np.square(q).sum())
        parts.append(np.divide((x * q).sum(1), lengths, out=np.zeros(len(x)), where=lengths > 0))
    return np.concatenate(parts)
