"""Transport efficiency: how much of what a linear map of a given rank could carry, a family of maps does carry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from workbench.errors import UserError
from workbench.maps.cca import CanonicalCorrelations, SubspaceSize, subspace_size
from workbench.maps.moments import Moments, total
from workbench.maps.reduced_rank import optimal_ranks, truncated_ranks
from workbench.maps.ridge import Choice, fit_ridge_targets
from workbench.maps.spectrum import Spectrum
from workbench.maps.whitening import Whitener

TOO_SMALL = 1e-8
"""a ceiling at or below this gives no ratio"""


@dataclass(frozen=True, eq=False)
class TransportEfficiency:
    """Whitened R2 over ranks of one pair of sites, each ratio with both sides on the same rows in the same metric.

    All arrays have one entry per rank 1..k; whitening is by the covariance of y over the training rows, and R2 about
    its training mean.
    """

    ranks: Int64[Tensor, " k"]
    optimal: Float[Tensor, " k"]
    """held-out R2 of the best map of each rank (reduced rank in the whitened metric), fitted on the training rows"""
    truncated: Float[Tensor, " k"]
    """held-out R2 of the ridge map cut to its leading singular triples, as the released code does it"""
    bound: Float[Tensor, " k"]
    """held-out R2 of the best map of each rank fitted on the held-out rows themselves: no affine map does better there"""
    ceiling: Float[Tensor, " k"]
    """cumsum rho^2 / rank(y) of the training rows, in sample: never compared with a held-out figure here"""
    ceiling_corrected: Float[Tensor, " k"]
    """the same less what independent data would give"""
    bound_inflation: float
    """what `bound` would be at full rank on independent data: rank_x / (n_held_out - 1)"""
    ceiling_inflation: float
    """what `ceiling` would be at full rank on independent data: rank_x / (n_train - 1)"""
    size: SubspaceSize
    """dimensions carried, over all rows"""
    alpha_absolute: float
    """ridge penalty of both families"""
    n_train: int
    n_held_out: int

    @property
    def efficiency(self) -> Float[Tensor, " k"]:
        """optimal / bound, at most 1; NaN where nothing can be carried."""
        return _ratio(self.optimal, self.bound)

    @property
    def efficiency_truncated(self) -> Float[Tensor, " k"]:
        """truncated / bound, at most 1; it measures the truncation as much as the model."""
        return _ratio(self.truncated, self.bound)


def transport_efficiency(
    train: Sequence[Moments],
    held_out: Moments,
    source: str = "x",
    target: str = "y",
    *,
    alpha: Choice = "cv",
    absolute: bool = False,
) -> TransportEfficiency:
    """Efficiency of transport from `source` to `target` at every rank, all from moments.

    The released code divides a test R2 by a training ceiling, in two metrics, and by the width where y may have fewer
    directions; its ratio exceeds 1 on a target of lower rank. Here both sides are held out, share one metric, and
    the bound is one.

    Args:
        train: moments of the folds of the training rows; held_out: moments of other prompts.
        alpha: ridge penalty of both families: a number, "cv" over the folds, or "gcv"; 0 is least squares.
        absolute: alpha counts as scikit-learn's; False: in units of the mean diagonal of X'X.

    Raises:
        UserError: too few rows on either side for its width, or a side that never varies.

    Source: arXiv:2508.17540, sections on matched rank and efficiency, with the corrections named above.
    """
    parts = [part.select([(source, target)]) for part in train]
    if not parts:
        raise UserError("no moments of training rows given")
    whole, held = total(parts), held_out.select([(source, target)])
    cca = CanonicalCorrelations.of(whole, source, target)
    bound_cca = CanonicalCorrelations.of(held, source, target)
    spectrum = Spectrum.of(whole, source)
    if alpha == 0:
        absolute_alpha = 0.0
    else:
        choice = fit_ridge_targets(parts, source, [target], alpha=alpha, absolute=absolute)[target]
        absolute_alpha = choice.alpha_absolute
    white = Whitener.of_block(whole, target)
    scored = {"train": whole, "whitener": white}
    optimal = optimal_ranks(spectrum, target, alpha=absolute_alpha, metric="whitened", whitener=white)
    cut = truncated_ranks(spectrum, target, alpha=absolute_alpha)
    best = optimal_ranks(Spectrum.of(held, source), target, metric="whitened", whitener=white)
    curves = [family.curve(held, source, target, **scored).r2_whitened for family in (optimal, cut, best)]  # type: ignore[arg-type]
    k = min(len(cca.rho), *(len(curve) - 1 for curve in curves if curve is not None))
    at = [curve[1 : k + 1] for curve in curves if curve is not None]
    return TransportEfficiency(
        torch.arange(1, k + 1), at[0], at[1], at[2], cca.ceiling()[:k].cpu(), cca.ceiling(corrected=True)[:k].cpu(),
        bound_cca.inflation, cca.inflation, subspace_size([*parts, held], source, target), absolute_alpha, whole.n, held.n,
    )  # fmt: skip


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > TOO_SMALL, part / whole, torch.nan)
