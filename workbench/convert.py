"""Converters between two models: fitted to two profiles, formed as maps or only folded into an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .adapters.adapter import LowRank
from .converter_specs import METHODS, ConverterSpec
from .errors import UserError
from .layer_matching import best_matching, layer_scores, match_layers
from .maps.autoencoder import ReluMap, fit_autoencoder
from .maps.fit import fit_ridge, fit_ridge_moments
from .maps.linear_map import LinearMap
from .maps.pair_factors import Cores, PairFactors
from .maps.quality import Quality, quality, r2
from .maps.solver import Solver
from .paired_profiles import PairedProfiles
from .row_pairs import donor_name, folds, n_folds, recipient_name
from .sites import Site

if TYPE_CHECKING:
    from .store import Store

__all__ = [
    "METHODS",
    "Converter",
    "ConverterFits",
    "best_matching",
    "fit_converters",
    "fits_of_recipients",
    "layer_scores",
    "match_layers",
]
Alpha = int | float | Literal["cv"]
CORE_BUDGET = 1 << 26  # numbers of solved pairs that are kept for the next fold


@dataclass(frozen=True, eq=False)
class Converter:
    """The two maps of one pair of sites, with how well each does on prompts that it was not fitted to.

    `to_donor` carries recipient states to the donor's space (an adapter is read through it), `to_recipient` carries
    what the adapter writes back. `quality_*` are on held-out prompts, None where nothing was held out.
    """

    donor: Site
    recipient: Site
    to_donor: LinearMap
    to_recipient: LinearMap
    method: str = "ridge"
    alpha: float = 0.0
    quality_to_donor: Quality | None = None
    quality_to_recipient: Quality | None = None

    def as_dict(self) -> dict[str, Any]:
        """The pair, the method and its quality figures, as JSON values."""
        sides = {"quality_to_donor": self.quality_to_donor, "quality_to_recipient": self.quality_to_recipient}
        warnings = [q.warning for q in sides.values() if q is not None and q.warning]
        return {
            "pair": f"{self.donor} <-> {self.recipient}",
            "method": self.method,
            "alpha": self.alpha,
            **{name: None if q is None else q.as_dict() for name, q in sides.items()},
            "warning": "; ".join(warnings) or None,
        }


@dataclass
class ConverterFits(PairedProfiles):
    """Everything needed to fit converters between any two layers of two profiles, factorised once a layer.

    Converters are formed by `converter`, or never: `fold` takes a low-rank adapter part straight through a pair at a
    cost of rank x width (spec of the fold: arXiv:2506.19140, eq. 3; Gram form ours). Methods are named as
    `converter_specs.ConverterSpec` reads them; rows and arguments are those of `PairedProfiles`.
    """

    _cores: dict[Any, Cores] = field(default_factory=dict, repr=False)

    def cores(self, donor: Site, recipient: Site, spec: ConverterSpec) -> Cores:
        """A converter of a pair in the coordinates of `factors`; the last ones solved are kept."""
        key = donor, recipient, spec
        if key not in self._cores:
            made = self._solve(self.factors(donor, recipient), donor, recipient, spec)
            while self._cores and sum(c.there.numel() * 2 for c in self._cores.values()) > CORE_BUDGET:
                del self._cores[next(iter(self._cores))]
            self._cores[key] = made
        return self._cores[key]

    def _solve(self, pair: PairFactors, donor: Site, recipient: Site, spec: ConverterSpec) -> Cores:
        if spec.kind == "ridge":
            return pair.ridge(*self.alphas(donor, recipient, spec))
        if spec.kind in ("rrr", "pls"):
            return (pair.reduced_rank if spec.kind == "rrr" else pair.pls)(int(spec.number))
        return pair.cycle(spec.number) if spec.kind == "cycle" else getattr(pair, spec.kind)()

    def alphas(self, donor: Site, recipient: Site, spec: ConverterSpec) -> tuple[float, float]:
        """The ridge strengths (to the donor, to the recipient); `cv` chooses each by cross-validation over prompts."""
        if spec.value != "cv":
            return spec.number, spec.number
        return self._once("pair", ("alphas", donor, recipient), lambda: self._chosen_alphas(donor, recipient))

    def _chosen_alphas(self, donor: Site, recipient: Site) -> tuple[float, float]:
        if self.summed:
            parts, names = (
                folds(self.donor, self.recipient, self.rows, (donor, recipient), self.seed),
                (recipient_name(recipient), donor_name(donor)),
            )
            there, back = (fit_ridge_moments(parts, source=a, target=b) for a, b in (names, names[::-1]))
        else:
            x, y = self.states("recipient", recipient), self.states("donor", donor)
            how: dict[str, Any] = {
                "groups": self.rows.prompt.tolist(),
                "folds": n_folds(self.rows),
                "seed": self.seed,
            }
            there, back = (fit_ridge(a, b, alpha="cv", **how) for a, b in ((x, y), (y, x)))
        return there.alpha, back.alpha

    # -- converters and folds -----------------------------------------------------------------------------------------

    def converter(self, donor: Site, recipient: Site, method: str = "ridge", alpha: Alpha = 0.1) -> Converter:
        """Both maps of one pair, with their quality on the held-out prompts; `method` as `ConverterSpec` reads it."""
        spec = _linear(method, alpha)
        there, back = self._maps(donor, recipient, spec)
        strength = self.alphas(donor, recipient, spec)[0] if spec.kind == "ridge" else 0.0
        made = Converter(donor, recipient, there, back, "ridge" if spec.kind == "ridge" else str(spec), strength)
        if len(self.held_rows) < 2:
            return made
        scored = self._quality(donor, recipient, there, back)
        return replace(made, quality_to_donor=scored[0], quality_to_recipient=scored[1])

    def _maps(self, donor: Site, recipient: Site, spec: ConverterSpec) -> tuple[LinearMap, LinearMap]:
        if spec.kind != "pinv":
            there, back = self.factors(donor, recipient).maps(self.cores(donor, recipient, spec), str(spec))
            return there, back
        x, y = self.solver("recipient", recipient, False), self.solver("donor", donor, False)
        if not self.summed:
            return x.solve(self.states("donor", donor), 0.0), y.solve(self.states("recipient", recipient), 0.0)
        cross, meta = self._cross(donor, recipient, False), {"method": "pinv", "n": len(self.rows)}
        weights = x.of_cross(cross, 0.0).float(), y.of_cross(cross.T, 0.0).float()
        there, back = (LinearMap(w, torch.zeros(w.shape[1]).to(w), meta) for w in weights)
        return there, back

    def _quality(
        self, donor: Site, recipient: Site, there: LinearMap | ReluMap, back: LinearMap | ReluMap
    ) -> tuple[Quality, Quality]:
        hx, hy = self.states("recipient", recipient, held=True), self.states("donor", donor, held=True)
        means, n = (self.mean("recipient", recipient), self.mean("donor", donor)), len(self.rows)
        return (quality(there, hx, hy, back=back, train_mean=means[1], n_train=n),
                quality(back, hy, hx, back=there, train_mean=means[0], n_train=n))  # fmt: skip

    def fold(self, part: LowRank, donor: Site, recipient: Site, method: str = "ridge", alpha: Alpha = 0.1) -> LowRank:
        """An adapter part of the donor at `donor` as one of the recipient at `recipient`; equals folding `converter`."""
        spec = _linear(method, alpha)
        if spec.kind not in ("ridge", "pinv"):
            pair, cores = self.factors(donor, recipient), self.cores(donor, recipient, spec)
            v, u = pair.read(cores.there, part.V), pair.write(cores.back, part.U)
            b = part.b.double() + pair.y.mean @ part.V.double() - pair.x.mean @ v
            return LowRank(v.float(), b.float(), u.float(), part.act)
        centre = spec.kind == "ridge"
        alphas = self.alphas(donor, recipient, spec) if centre else (0.0, 0.0)
        read, write = self.solver("recipient", recipient, centre), self.solver("donor", donor, centre)
        v64, b = part.V.double(), part.b.double()
        if self.summed:
            cross = self._cross(donor, recipient, centre)
            v, u = read.of_cross(cross @ v64, alphas[0]), _written(write, part.U.double(), cross.T, alphas[1])
        else:
            y, x = self.states("donor", donor).double(), self.states("recipient", recipient).double()
            v = read.coefficients(y @ v64, alphas[0])  # W @ V, the width of the donor never squared
            u = write.project(part.U, x, alphas[1])
        if centre:
            b = b + write.mean @ v64 - read.mean @ v
        return LowRank(v.float(), b.float(), u.float(), part.act)

    def reference(self, donor: Site, recipient: Site, hidden: int = 128, steps: int = 500) -> tuple[Quality, Quality]:
        """Held-out quality (to the donor, to the recipient) of a small ReLU autoencoder: what a map that is not linear
        would gain. It does not fold into an adapter. Raises UserError where no prompts are held out."""
        if len(self.held_rows) < 2:
            raise UserError("the reference needs held-out prompts for its figures; give a holdout above 0")
        x, y = self.states("recipient", recipient), self.states("donor", donor)
        there, back = (fit_autoencoder(a, b, hidden=hidden, steps=steps, seed=self.seed) for a, b in ((x, y), (y, x)))
        return self._quality(donor, recipient, there, back)

    def held_out_r2(self, donor: Site, recipient: Site, alpha: float = 0.1) -> float:
        """R2 (variance-weighted) of the ridge map to the donor on held-out rows."""
        there, _ = self._maps(donor, recipient, ConverterSpec("ridge", alpha))
        held = self.states("donor", donor, held=True)
        return r2(held, there(self.states("recipient", recipient, held=True))).weighted


def _linear(method: str, alpha: Alpha) -> ConverterSpec:
    spec = ConverterSpec.parse(method, alpha)
    if spec.kind == "autoencoder":
        raise UserError("a ReLU autoencoder does not fold into an adapter: it is a reference for quality figures alone "
                        "(ConverterFits.reference); take a linear converter such as ridge")  # fmt: skip
    return spec


def _written(write: Solver, u: Tensor, cross: Tensor, alpha: float) -> Tensor:
    """u B with B = (Y'Y + a)^-1 Y'X, from Y'X."""
    return write.out_of((write.along(u) * (write.gain(alpha) / write.s)).T).T @ cross


def fits_of_recipients(
    donor: Store, recipients: Sequence[Store], *, holdout: float = 0.2, seed: int = 0, pairing: str = "last"
) -> list[ConverterFits]:
    """Fits from one donor to several recipients; the donor's rows are read and factorised once for all.

    They are shared where the same rows of the donor are fitted, as with `last`; aligned rows depend on the recipient's
    tokenizer. Raises UserError as `ConverterFits`, and for no recipients.
    """
    if not recipients:
        raise UserError("no recipients; give the profile of at least one")
    made = [ConverterFits(donor, r, holdout, seed, pairing=pairing) for r in recipients]
    first = made[0]
    for other in made[1:]:
        same = torch.equal(first.fit_rows, other.fit_rows) and torch.equal(first.held_rows, other.held_rows)
        if same and not (first.summed or other.summed):
            other._donors = first._donors
    return made


def fit_converters(
    donor: Store,
    recipient: Store,
    pairs: Iterable[tuple[Site | int, Site | int]] | Mapping[int, int],
    *,
    method: str = "ridge",
    alpha: Alpha = 0.1,
    holdout: float = 0.2,
    seed: int = 0,
    pairing: str = "last",
) -> list[Converter]:
    """Fits the converters of the pairs (donor site, recipient site) on two profiles of the same prompts.

    method: as `converter_specs.ConverterSpec` reads it: `ridge` (centred, with bias; `alpha` in units of the mean
    diagonal of X'X, or `cv`), `pinv` (uncentred, no bias, as published), `procrustes`, `rrr:16`, `pls:32`, `whitened`,
    `cycle:1`. holdout: the share of prompts kept for the quality figures. pairing: `last`, or `aligned` for profiles of
    all tokens. Raises UserError when the stores do not pair or lack a site.
    """
    fits = ConverterFits(donor, recipient, holdout, seed, pairing=pairing)
    listed = pairs.items() if isinstance(pairs, Mapping) else pairs
    return [fits.converter(Site.parse(d), Site.parse(r), method, alpha) for d, r in listed]
