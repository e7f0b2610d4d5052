"""What a paste will do, on and off target, before it is made: one backward pass of the plain recipient.

The first-order effect of adding delta at a site is delta . G, with G the gradient of what is asked about. The same G
serves every adapter, layer pair, converter and strength, so a candidate costs a product. Held-out R2 of the converter
does not rank pastes; this does (figures: `docs/demo.md`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from .adapters.adapter import Adapter, LowRank
from .convert import ConverterFits
from .errors import UserError
from .layer_matching import best_matching, match_layers
from .progress import progress
from .sensitivity import Gradients
from .sites import Site

if TYPE_CHECKING:
    import pandas as pd


RIDGES = tuple(("ridge", alpha) for alpha in (0.01, 0.03, 0.1, 0.3, 1.0))


@dataclass(frozen=True)
class Candidate:
    """One way to paste: the pair of sites of each donor part, the converter, and (where given) the strength."""

    pairs: tuple[tuple[Site, Site], ...]
    method: str
    alpha: float

    def label(self) -> str:
        pairs = " ".join(f"{d.layer}>{r.layer}" for d, r in self.pairs)
        return f"{pairs} {self.method}" + (f" {self.alpha:g}" if self.method == "ridge" else "")

    def as_dict(self) -> dict[str, Any]:
        """As metrics.json has it."""
        return {"pairs": [[str(d), str(r)] for d, r in self.pairs], "method": self.method, "alpha": self.alpha}


@dataclass(frozen=True)
class Forecast:
    """What a candidate will do at `strength`.

    on: change of the log-odds of the behaviour, in nats, with its standard error over prompts; off: the same on each
    other set of prompts; off_rate: the mean absolute change of a probability there; kl: expected KL of the next token
    on neutral text, in nats; sigma: mean Mahalanobis length of the delta in the recipient's profile (of several sites,
    the longest). All to first order in the delta, `kl` to second.
    """

    candidate: Candidate
    strength: float
    on: float
    on_se: float
    off: Mapping[str, float]
    off_rate: Mapping[str, float]
    kl: float
    sigma: float

    def worst_off_rate(self) -> float:
        return max(self.off_rate.values(), default=0.0)

    def at(self, strength: float) -> Forecast:
        """The same forecast at another strength."""
        ratio = strength / self.strength
        off, off_rate = ({k: v * ratio for k, v in d.items()} for d in (self.off, self.off_rate))
        return replace(self, strength=strength, on=self.on * ratio, on_se=self.on_se * ratio, off=off, off_rate=off_rate,
                       kl=self.kl * ratio**2, sigma=self.sigma * ratio)  # fmt: skip


def fold_candidate(adapter: Adapter, fits: ConverterFits, candidate: Candidate) -> dict[Site, list[LowRank]]:
    """The recipient's parts of a candidate, by recipient site (several donor layers may meet at one)."""
    folded: dict[Site, list[LowRank]] = {}
    for donor, recipient in candidate.pairs:
        part = fits.fold(adapter.parts[donor], donor, recipient, candidate.method, candidate.alpha)
        folded.setdefault(recipient, []).append(part * adapter.strength)
    return folded


def paste_candidate(
    adapter: Adapter, fits: ConverterFits, candidate: Candidate, strength: int | float = 1.0, *, name: str = ""
) -> Adapter:
    """The paste of `adapter` that a candidate stands for: an ordinary adapter of the recipient, at `strength`.

    What several donor layers bring to one recipient site is summed. It belongs to the model of the recipient's profile
    and acts at the positions of `adapter`, whose own strength is folded in.
    """
    folded = fold_candidate(adapter, fits, candidate)
    pairs = [[str(d), str(r), candidate.method] for d, r in candidate.pairs]
    return Adapter(
        {site: functools.reduce(LowRank.__add__, listed) for site, listed in folded.items()},
        positions=adapter.positions,
        strength=strength,
        name=name or f"{adapter.name} paste".strip(),
        base=fits.recipient.fingerprint,
        meta={"kind": "paste", "donor": dict(adapter.base), "pairs": pairs, "alpha": candidate.alpha},
    )


def forecast_pastes(
    adapter: Adapter,
    fits: ConverterFits,
    candidates: Sequence[Candidate],
    on: Gradients,
    off: Mapping[str, Gradients] | None = None,
    neutral: Sequence[Gradients] = (),
    *,
    target: float,
    strength: float | None = None,
    max_sigma: float = 4.0,
    strengths: tuple[float, float] = (0.25, 1.5),
) -> list[Forecast]:
    """The forecast of every candidate paste of `adapter`, in the order given.

    on: gradients of the behaviour on neutral prompts of the behaviour; off: of what must not change, by name; neutral:
    `fisher` gradients. target: the effect that is wanted, in nats (the donor's own). Unless `strength` is given, each
    candidate gets the one that should reach the target, within `strengths` and within `max_sigma` standard deviations
    of the recipient's profile. The effects of several layers are summed: to first order they do not see each other.
    """
    made = []
    for candidate in progress(candidates, desc="forecasting", unit="paste"):
        folded = fold_candidate(adapter, fits, candidate)
        parts = [(site, part) for site, listed in folded.items() for part in listed]
        deltas = {
            site: torch.stack([p.delta(on.states[site]) for p in listed]).sum(0) for site, listed in folded.items()
        }
        sigma = max(fits.length(site, delta) for site, delta in deltas.items())
        effect = _effect(on, parts)
        s = _strength(float(effect.mean()), sigma, target, max_sigma, strengths) if strength is None else strength
        away = {name: (g.value, s * _effect(g, parts)) for name, g in (off or {}).items()}
        kl = [float((s * _effect(g, parts)).square().mean()) / 2 for g in neutral]
        made.append(
            Forecast(
                candidate,
                s,
                on=s * float(effect.mean()),
                on_se=s * float(effect.std(correction=0)) / len(effect) ** 0.5,
                off={name: float(e.mean()) for name, (_, e) in away.items()},
                off_rate={name: float(((z + e).sigmoid() - z.sigmoid()).abs().mean()) for name, (z, e) in away.items()},
                kl=sum(kl) / max(len(kl), 1),
                sigma=s * sigma,
            )
        )
    return made


def _effect(g: Gradients, parts: Sequence[tuple[Site, LowRank]]) -> Float[Tensor, " n"]:
    return torch.stack([g.effect(site, part) for site, part in parts]).sum(0)


def _strength(on: float, sigma: float, target: float, max_sigma: float, strengths: tuple[float, float]) -> float:
    wanted = target / on if on * target > 0 else 0.0
    return min(max(wanted, strengths[0]), strengths[1], max_sigma / max(sigma, 1e-9))


def candidates_of(
    adapter: Adapter,
    n_recipient: int,
    methods: Sequence[tuple[str, float]] = RIDGES,
    layers: Sequence[int] | None = None,
) -> list[Candidate]:
    """Every pair of one donor layer of the adapter with one recipient layer, under every converter (method, alpha)."""
    targets = range(n_recipient) if layers is None else layers
    return [
        Candidate(((site, Site(r, site.point)),), method, alpha)
        for site in adapter.parts
        for r in targets
        for method, alpha in methods
    ]


def matched_candidates(
    adapter: Adapter,
    fits: ConverterFits,
    on: Gradients,
    target: float,
    n_donor: int,
    methods: Sequence[tuple[str, float]] = RIDGES,
) -> list[Candidate]:
    """Candidates that paste every layer of an adapter of several: under each converter, the layers matched by depth
    (nearest, floor) and by forecast, which is the monotone matching with the largest summed effect towards `target`."""
    targets = sorted({site.layer for site in on.grads})
    found: dict[Candidate, None] = {}
    for method, alpha in progress(methods, desc="matching layers", unit="converter"):
        effects = {
            (d.layer, r): float(on.effect(Site(r, d.point), fits.fold(part, d, Site(r, d.point), method, alpha)).mean())
            for d, part in adapter.parts.items()
            for r in targets
        }
        sign = 1.0 if target >= 0 else -1.0
        by_forecast = best_matching({pair: sign * effect for pair, effect in effects.items()})
        by_depth = [match_layers(adapter.layers, n_donor, len(targets), policy) for policy in ("nearest", "floor")]
        for matched in (by_forecast, *by_depth):
            pairs = tuple((d, Site(matched[d.layer], d.point)) for d in adapter.parts)
            found[Candidate(pairs, method, alpha)] = None
    return list(found)


def forecast_frame(forecasts: Sequence[Forecast], measured: Sequence[float] | None = None) -> pd.DataFrame:
    """One line per forecast, in the order given: the candidate, its strength, and what it will do (see `Forecast`).

    measured: what was found in place of `on`, where it was measured; shown beside it.
    """
    import pandas as pd

    rows = [
        {"paste": f.candidate.label(), "strength": f.strength, "on": f.on, "on_se": f.on_se,
         **{f"off: {name}": value for name, value in f.off.items()},
         "worst off rate": f.worst_off_rate(), "kl": f.kl, "sigma": f.sigma}
        for f in forecasts
    ]  # fmt: skip
    frame = pd.DataFrame(rows)
    if measured is not None:
        frame.insert(3, "measured on", [float(m) for m in measured])
    return frame


OFF_WEIGHT = 2.0  # a rate that moves by 5 points off target costs a tenth of the target


def rank(forecasts: Sequence[Forecast], target: float) -> list[Forecast]:
    """The forecasts in order of preference.

    The merit of a candidate is the share of the target that it reaches (at most all of it), less twice the largest
    change of a rate off target, less the KL on neutral text; where two are within 1 % of the target, the shorter delta
    goes first.
    """
    if not forecasts:
        raise UserError("there is no candidate to choose from; give layers and converters that exist")

    def merit(f: Forecast) -> tuple[float, float]:
        share = min(f.on / target, 1.0) if target else 0.0
        return round(share - OFF_WEIGHT * f.worst_off_rate() - f.kl, 2), -f.sigma

    return sorted(forecasts, key=merit, reverse=True)
