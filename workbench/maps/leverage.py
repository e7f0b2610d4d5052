"""Exact leave-one-out scores of a ridge path, by a second pass over the rows and never a refit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from .spectrum import Spectrum, constant_floor


@dataclass(frozen=True, eq=False)
class LeaveOneOut:
    """Prediction errors where every row is predicted by a map that was fitted without it."""

    alphas: tuple[float, ...]
    sse: Float[Tensor, "k d_out"]
    """sum over rows of the squared error, per absolute penalty and output"""
    r2_uniform: Float[Tensor, " k"]
    """mean over outputs of 1 - SSE_j / SST_j, SST about the mean of all rows"""
    n: int

    @property
    def best(self) -> float:
        """The penalty with the highest R2."""
        return self.alphas[int(self.r2_uniform.argmax())]


def leave_one_out(
    spectrum: Spectrum,
    batches: Iterable[Mapping[str, Float[Tensor, "_n _d"]]],
    target: str = "y",
    alphas: Sequence[int | float] = (0.0,),
) -> LeaveOneOut:
    """e_loo = e / (1 - h), h_t = 1 / n + sum_i p_ti^2 / (l_i + a), p = (x - mean) V: exact for every row and penalty.

    Args:
        spectrum: of the source over all of the rows; batches: the same rows again, as `Moments.update` took them.
        alphas: absolute penalties.

    Raises:
        UserError: other rows than those the spectrum was made of, by their number.

    It takes rows as exchangeable, which tokens of one prompt are not; see `Spectrum.gcv`.
    """
    train, source = spectrum.train, spectrum.source
    cross, x_mean, y_mean = spectrum.cross(target), spectrum.x_mean, spectrum.y_mean(target)
    gains = [spectrum.gain(alpha) for alpha in alphas]
    sse = torch.zeros(len(gains), cross.shape[1]).to(cross)
    n = 0
    for batch in batches:
        p = (batch[source].to(cross) - x_mean) @ spectrum.vectors
        y = batch[target].to(cross) - y_mean
        n += len(p)
        for i, gain in enumerate(gains):
            leverage = p.square() @ gain + spectrum.centred / train.n
            error = (y - p @ (gain[:, None] * cross)) / (1 - leverage)[:, None]
            sse[i] += error.square().sum(0)
    if n != train.n:
        raise UserError(f"leave-one-out needs the rows of the fit again: it had {train.n}, the second pass {n}")
    squares = train.cov(target, target).diagonal()
    live = squares > constant_floor(train, target)
    r2 = torch.where(live, 1 - sse / squares, 0.0).mean(1)
    return LeaveOneOut(tuple(map(float, alphas)), sse.cpu(), r2.cpu(), n)
