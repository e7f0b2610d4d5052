"""What a paste is compared with: the same adapter through converters that know nothing, and the paste's constant part."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..adapters.adapter import Adapter, LowRank, vector
from ..convert import ConverterFits
from ..errors import UserError
from ..forecast import Candidate, paste_candidate
from ..sites import Site

States = Mapping[Site, Tensor]


def sigma_length(adapter: Adapter, fits: ConverterFits, states: States) -> float:
    """Mean Mahalanobis length of an adapter's delta, in standard deviations of the recipient's profile.

    states: the recipient's, [n, d] by site, on which the deltas are taken (`Gradients.states`). Of several sites, the
    longest counts.
    """
    return max(fits.length(site, adapter.delta(site, states[site])) for site in adapter.parts)


def delta_norm(adapter: Adapter, states: States) -> float:
    """Mean Euclidean length of an adapter's delta on `states`; of several sites, the longest counts."""
    return max(float(adapter.delta(site, states[site]).norm(dim=1).mean()) for site in adapter.parts)


def at_length(adapter: Adapter, length: float, fits: ConverterFits, states: States) -> Adapter:
    """`adapter` at the strength at which its `sigma_length` is `length`; UserError where its delta is zero."""
    own = sigma_length(adapter, fits, states)
    if own == 0:
        raise UserError(f"the delta of {adapter.name or 'this adapter'} is zero; no strength makes it longer")
    return adapter * (length / own)


def random_converter(adapter: Adapter, fits: ConverterFits, candidate: Candidate, seed: int) -> Adapter:
    """The paste of a donor's adapter through converters of normal entries that know nothing of which state is which.

    They know both profiles as such: the means correspond, and what is written lies along the recipient's profile as its
    own states do (covariance S^1/2 on the right). With independent entries a delta of the same length in standard
    deviations would lie where the profile hardly varies, seventeen times shorter than the paste: no control at all.
    """
    generator = torch.Generator().manual_seed(seed)
    folded: dict[Site, list[LowRank]] = {}
    for d, r in candidate.pairs:
        x, y, part = fits.states("recipient", r), fits.states("donor", d), adapter.parts[d].to(torch.float32)
        size = float(y.std() / x.std()) / x.shape[1] ** 0.5
        there = torch.randn(x.shape[1], y.shape[1], generator=generator) * size
        profile = fits.solver("recipient", r, True)
        root = (profile.s[:, None] * profile.q.T / profile.n**0.5).float()  # S^1/2 up to a rotation
        back = torch.randn(y.shape[1], len(root), generator=generator) @ root
        v = there @ part.V
        b = part.b + y.mean(0) @ part.V - x.mean(0) @ v
        folded.setdefault(r, []).append(LowRank(v, b, part.U @ back, part.act))
    parts = {site: functools.reduce(LowRank.__add__, listed) for site, listed in folded.items()}
    name = f"{adapter.name} random converter".strip()
    return Adapter(parts, adapter.positions, adapter.strength, name, fits.recipient.fingerprint)


def shuffled_pairs(adapter: Adapter, fits: ConverterFits, candidate: Candidate, seed: int) -> Adapter:
    """The paste through converters that were fitted, as ever, to donor states of other prompts."""
    shuffled = ConverterFits(fits.donor, fits.recipient, fits.holdout, seed, True, fits.pairing, fits.row_budget)
    return paste_candidate(adapter, shuffled, candidate, name=f"{adapter.name} shuffled pairs".strip())


def mean_delta(paste: Adapter, states: States) -> Adapter:
    """The mean of a paste's deltas on `states`, as a steering vector: how much of the paste is a constant."""
    parts: dict[Site, LowRank] = {}
    for site, part in paste.parts.items():
        mean: Float[Tensor, " d"] = part.delta(states[site]).mean(0)
        parts |= vector(site, mean).parts
    return replace(paste, parts=parts, name=f"{paste.name} mean delta".strip())
