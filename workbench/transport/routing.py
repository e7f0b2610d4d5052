"""Where attention takes each token's source from: the row that the layers between two sites send most weight to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from ..anatomy.attention import attention_modules, attention_weights
from ..errors import UserError
from ..profile.plan import Block
from ..profile.run import BlockRunner, Rows
from ..sites import Site
from .positions import Index

if TYPE_CHECKING:
    from ..models import Model
    from ..profile.plan import Plan

Span = tuple[int, int]
"""the first and the last layer whose attention lies between two sites"""
MOSTLY = 0.95  # of the tokens routed to themselves: then the policy is hardly another than `same`


@dataclass(frozen=True, eq=False)
class Route:
    """The source of each row of a block.

    >>> Route(np.array([[-1, 1], [0, 0]]), np.ones(2, dtype=np.float32)).kept(np.array([False, True])).source.tolist()
    [[0], [-1]]
    """

    source: Index
    """[2, n]: the number of the source's row, where position 0 may not be a source, and where it may; -1 for none"""
    weight: NDArray[np.float32]
    """[n]: the share of the averaged attention that goes to the first of these"""

    def kept(self, keep: NDArray[np.bool_]) -> Route:
        """The same after rows were left out. A source that was left out is none."""
        place = np.where(keep, np.cumsum(keep) - 1, -1)
        source = self.source[:, keep]
        return Route(np.where(source >= 0, place[source], -1), self.weight[keep])


def attention_between(a: Site, b: Site) -> Span:
    """The layers whose attention is computed after site a and at or before site b.

    >>> attention_between(Site(2), Site(5)), attention_between(Site(2, "resid_pre"), Site(2))
    ((3, 5), (2, 2))
    """
    first = a.layer if a.point == "resid_pre" else a.layer + 1
    last = b.layer - 1 if b.point == "resid_pre" else b.layer
    if first > last:
        raise UserError(f"no attention lies between {a} and {b}, so it routes nothing; give sites with a block between "
                        "them, or other positions")  # fmt: skip
    return first, last


def routing_figures(route: Route, rows: Index, position: Index) -> dict[str, float]:
    """Sums over some rows, routed without position 0: how many, to themselves, to the token before, how far, what weight."""
    back = (position[rows] - position[route.source[0, rows]]).astype(np.float64)
    return {"rows": float(len(rows)), "itself": float((back == 0).sum()), "previous": float((back == 1).sum()),
            "distance": float(back.sum()), "weight": float(route.weight[rows].sum())}  # fmt: skip


class RoutedRunner(BlockRunner):
    """Runs blocks of a plan and says of each row where its source is, for each span of layers.

    The maps of a layer are averaged over heads as they come and added to a running sum [b, t, t] for each first layer of
    the spans; a batch holds no more. Where memory runs out it is cut, as without.
    """

    def __init__(self, model: Model, plan: Plan, spans: Sequence[Span], bar: Any = None) -> None:
        super().__init__(model, plan, bar)
        self.stop_after = max(self.stop_after, *(last for _, last in spans))
        self._stops_in_hook = False  # the attention module may return after the last site was taken from inside it
        self.ends: dict[int, list[int]] = {}
        for first, last in sorted(set(spans)):
            self.ends.setdefault(first, []).append(last)
        layers = sorted({layer for first, last in spans for layer in range(first, last + 1)})
        self._modules = attention_modules(model, layers)
        self._sums: dict[int, Tensor] = {}
        self._found: dict[Span, tuple[Tensor, Tensor]] = {}
        self._keep = torch.empty(0, dtype=torch.bool)
        self._grid: tuple[Tensor, Tensor] | None = None

    def run_routed(self, block: Block, keep: NDArray[np.bool_]) -> tuple[Rows, dict[Span, Route]]:
        """The rows [n, d] of a block at each site, and its routes between those that `keep` names."""
        self._keep, self._found = torch.from_numpy(keep), {}
        with attention_weights(self.model, self._modules, self._listen):
            rows = self.run(block)
        none = torch.full((2, block.n), -1), torch.zeros(block.n)
        routes = {}
        for span in ((first, last) for first, lasts in self.ends.items() for last in lasts):
            source, weight = self._found.pop(span, none)  # a block may be without rows
            routes[span] = Route(source.cpu().numpy(), weight.cpu().numpy())
        return rows, routes

    def _forward(self, block: Block, sequences: list[int]) -> None:
        self._sums, self._grid = {}, None
        super()._forward(block, sequences)
        self._sums = {}

    def _listen(self, layer: int, weights: Float[Tensor, "b h t t"]) -> None:
        mean = weights.mean(1, dtype=torch.float32)
        for first, lasts in self.ends.items():
            if first > layer or layer > lasts[-1]:
                continue
            if first in self._sums:
                self._sums[first] += mean.to(self._sums[first].device)
            else:
                self._sums[first] = mean.clone()
            if layer in lasts:
                self._choose((first, layer), self._sums[first] / (layer - first + 1))
            if layer == lasts[-1]:
                del self._sums[first]

    def _choose(self, span: Span, mean: Float[Tensor, "b t t"]) -> None:
        """Writes down the source of each row of the batch: of the kept tokens, the one with most weight."""
        batch = self._batch
        assert batch is not None, "attention was heard outside a batch"
        n, (where, target) = len(self._keep), batch.index(mean.device)
        if self._grid is None:  # of each token the number of its row, and whether it may be a source
            number, allowed = (
                torch.zeros(mean.shape[:2], dtype=d, device=mean.device) for d in (torch.int64, torch.bool)
            )
            number.view(-1)[where], allowed.view(-1)[where] = target, self._keep.to(mean.device)[target]
            self._grid = number, allowed
        number, allowed = (x.to(mean.device) for x in self._grid)
        if span not in self._found:
            self._found[span] = (torch.full((2, n), -1, device=mean.device), torch.zeros(n, device=mean.device))
        source, share = (x.to(mean.device) for x in self._found[span])
        mean = mean * allowed[:, None, :]  # not in place: other spans go on with the sum
        for i in (1, 0):
            if i == 0:
                mean[:, 1:, 0] = 0
            weight, column = mean.max(-1)
            source[i, target] = number.gather(1, column).masked_fill(weight <= 0, -1).flatten()[where]
        share[target] = weight.flatten()[where]
        self._found[span] = source, share


def routing_notes(routing: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Of each pair that is hardly routed, that it is."""
    return [f"{pair.replace('>', ' to ')}: attention takes {100 * found['itself']:.0f} % of the tokens from themselves: "
            "read it as positions='same'" for pair, found in routing.items() if found["itself"] > MOSTLY]  # fmt: skip
