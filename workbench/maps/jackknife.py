"""Standard errors of anything computed from moments, by leaving out one shard at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from .moments import Moments, total


@dataclass(frozen=True, eq=False)
class Estimate:
    """A statistic of all rows and its standard error; tensors of one shape, float64 on the CPU."""

    value: Tensor
    error: Tensor
    shards: int

    def interval(self, widths: float = 1.96) -> tuple[Tensor, Tensor]:
        """value -+ widths * error."""
        return self.value - widths * self.error, self.value + widths * self.error


def leave_out_shards(statistic: Callable[[Moments], float | Tensor], shards: Sequence[Moments]) -> Estimate:
    """The jackknife over shards: rows of one shard (documents that lie together) leave together.

    With m_i of n rows in shard i, h_i = n / m_i, pseudo-values p_i = h_i t - (h_i - 1) t_(-i) and their weighted mean:
    error^2 = 1 / k sum_i (p_i - mean)^2 / (h_i - 1). For equal shards: (k - 1) / k sum (t_(-i) - mean)^2.

    Args:
        statistic: of moments; a number or a tensor.
        shards: moments of at least two disjoint sets of rows; 20 are usual.

    >>> x = torch.tensor([[0.0], [2.0], [4.0], [6.0]])
    >>> found = leave_out_shards(lambda m: m.mean("x")[0], [Moments().update({"x": x[i : i + 1]}) for i in range(4)])
    >>> found.value.item(), round(found.error.item(), 6) == round((20 / 3 / 4) ** 0.5, 6)
    (3.0, True)

    Source: Busing, Meijer, van der Leeden 1999, for shards of unequal size.
    """
    filled = [shard for shard in shards if shard.n]
    k = len(filled)
    if k < 2:
        raise UserError(f"a jackknife needs at least 2 shards that hold rows; got {k}")
    whole = total(filled)
    value = _table(statistic(whole))
    left = torch.stack([_table(statistic(whole - shard)) for shard in filled])
    return jackknife(value, left, [shard.n for shard in filled])


def jackknife(value: Tensor, left: Float[Tensor, "shards ..."], rows: Sequence[int]) -> Estimate:
    """The same from figures that are there already: of all rows, and without each shard of so many rows.

    Args:
        value: of all rows; left: without shard i, at its index.
        rows: of each shard, at least two shards with at least one row each.
    """
    k = len(rows)
    share = torch.tensor(rows, dtype=torch.float64) / sum(rows)
    share = share.reshape(-1, *[1] * value.ndim)
    pseudo = value / share - (1 / share - 1) * left
    middle = k * value - ((1 - share) * left).sum(0)
    error = ((pseudo - middle).square() / (1 / share - 1)).mean(0).sqrt()
    return Estimate(value, error, k)


def _table(value: float | Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).detach().cpu()
