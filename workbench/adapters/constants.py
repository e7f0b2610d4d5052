"""The constant that an adapter is, where it is one; else how much of it is not."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from ..sites import Site
from .adapter import Adapter
from .low_rank import LowRank

_ROWS = 1024


def varying_share(part: LowRank, states: Float[Tensor, "n d"] | None = None) -> float:
    """The share of the mean square of a part's delta that differs between states: 0 for a vector, 1 without a mean.

    states: rows on which it is taken; unless given, drawn with coordinates of mean 0 and variance 1.

    >>> part = LowRank(torch.zeros(4, 1), torch.ones(1), torch.ones(1, 4))
    >>> varying_share(part)
    0.0
    """
    if states is None:
        states = torch.randn(_ROWS, part.width, generator=torch.Generator().manual_seed(0)).to(part.V.device)
    deltas = part.delta(states.double())
    whole = float(deltas.square().sum())
    return float((deltas - deltas.mean(0)).square().sum()) / whole if whole else 0.0


def constants_of(adapter: Adapter, states: Mapping[Site, Tensor] | None = None) -> dict[Site, Float[Tensor, " d"]]:
    """The vectors that an adapter adds, strength included, float32 by site.

    Raises:
        UserError: for an adapter that adds something else to every state, with the share that differs (on `states`, rows
            of a profile by site, where they are given); or that acts differently at different positions.
    """
    found = {}
    for site, part in adapter.parts.items():
        constant = part.to(torch.float32).constant()
        if constant is None:
            rows = (states or {}).get(site)
            on = "states of mean 0 and variance 1" if rows is None else f"the {len(rows)} rows given"
            raise UserError(
                f"this adapter is no constant at {site}: {varying_share(part, rows):.1%} of the mean square of its delta "
                f"varies with the state (on {on}); save its mean delta as a vector, or write it as pyreft"
            )
        found[site] = constant.detach().cpu() * adapter.strength
    return found
