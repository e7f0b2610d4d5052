"""The depth score: where along a model its effects lie, d = sum_l l e_l / sum_l e_l, over prompts or by kind of prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import UserError
from workbench.evaluate.scoring import ratio_interval
from workbench.evaluate.statistics import Interval

if TYPE_CHECKING:
    import pandas as pd


def depth_score(effects: Float[Tensor, "l n"], layers: Sequence[int] | None = None) -> Interval:
    """The mean layer, each layer weighed by its effect, with Student's interval over the n prompts.

        d = sum_l l e_l / sum_l e_l,   e_l the mean over prompts

    Args:
        effects: of each layer and prompt, not negative.
        layers: their numbers; 0 to l - 1 unless given.

    Raises UserError for effects that are negative, not finite, or all zero, and layers that are not as many.

    >>> depth_score(torch.tensor([[1.0, 1.0], [0.0, 0.0], [3.0, 3.0]])).value
    1.5

    Source: arXiv:2505.13898; there of one example at a time, here over prompts with an interval.
    """
    numbers = torch.arange(len(effects)) if layers is None else torch.tensor(list(layers))
    if len(numbers) != len(effects):
        raise UserError(f"{len(numbers)} layers do not fit effects of {len(effects)}")
    e = effects.double()
    if not bool(torch.isfinite(e).all()) or bool((e < 0).any()) or not bool(e.sum() > 0):
        raise UserError("a depth score needs effects that are finite, not negative, and not all zero")
    return ratio_interval((numbers.double()[:, None] * e).sum(0), e.sum(0))


def depth_scores(
    effects: Float[Tensor, "l n"], groups: Sequence[Any], layers: Sequence[int] | None = None
) -> pd.DataFrame:
    """The depth score of each kind of prompt: group, score, low, high, prompts; the group `all` comes first.

    groups: the kind of each prompt, such as its label or difficulty; prompts of None count in `all` alone.

    >>> depth_scores(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), ["short", "long"])["score"].tolist()
    [0.5, 0.0, 1.0]
    """
    import pandas as pd

    if len(groups) != effects.shape[1]:
        raise UserError(f"{len(groups)} groups do not fit effects of {effects.shape[1]} prompts")
    lines = []
    for group in [None, *dict.fromkeys(g for g in groups if g is not None)]:
        index = [i for i, g in enumerate(groups) if group is None or g == group]
        found = depth_score(effects[:, index], layers)
        name = "all" if group is None else str(group)
        lines.append({"group": name, "score": found.value, "low": found.low, "high": found.high, "prompts": len(index)})
    return pd.DataFrame(lines)
