"""Several adapters at once: how far their deltas point the same way, and what they do together beside what each does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.blend import Blend
from ..errors import UserError
from ..prompts import PromptSet, encode, pad
from ..sites import Site
from .behaviour import log_odds_each
from .statistics import Interval, mean_interval

if TYPE_CHECKING:
    import pandas as pd

    from ..backends.torch_hooks import Where
    from ..models import Model


@dataclass(frozen=True, eq=False)
class Interference:
    """What k adapters do to one another on n prompts; effects are changes of a behaviour's log-odds, in nats."""

    names: tuple[str, ...]
    cosine: Mapping[Site, Float[Tensor, "k k"]]
    """by site, the mean cosine of the deltas of two adapters over the tokens that both change; NaN where there is none"""
    length: Mapping[Site, Float[Tensor, " k"]]
    """by site, the mean length of each adapter's delta over the tokens that it changes; NaN where it changes none"""
    single: tuple[Interval, ...]
    """the effect of each adapter alone"""
    joint: Interval
    """the effect of all at once, each delta of the state as no other has touched it"""
    excess: Interval
    """the joint effect less the sum of the single ones, paired by prompt: 0 where they do not interfere"""

    def __repr__(self) -> str:
        alone = ", ".join(f"{n} {e.value:+.3f}" for n, e in zip(self.names, self.single, strict=True))
        return f"Interference({alone}; together {self.joint.value:+.3f}, {self.excess.value:+.3f} beside their sum)"

    def frame(self) -> pd.DataFrame:
        """One line for each adapter, for all at once and for the excess: the effect with its 95 % interval."""
        import pandas as pd

        rows = [*zip(self.names, self.single, strict=True), ("joint", self.joint), ("excess", self.excess)]
        return pd.DataFrame([{"adapter": n, "effect": e.value, "low": e.low, "high": e.high} for n, e in rows])

    def cosines(self) -> pd.DataFrame:
        """One line for each site and pair of adapters that meet there: cosine of their deltas, and the lengths of both."""
        import pandas as pd

        rows = [
            {"site": str(site), "first": self.names[i], "second": self.names[j], "cosine": float(c[i, j]),
             "length first": float(self.length[site][i]), "length second": float(self.length[site][j])}
            for site, c in self.cosine.items() for i in range(len(c)) for j in range(i + 1, len(c))
            if not bool(c[i, j].isnan())
        ]  # fmt: skip
        return pd.DataFrame(rows, columns=["site", "first", "second", "cosine", "length first", "length second"])

    def _repr_html_(self) -> str:
        return self.frame().to_html(index=False, float_format="{:+.3f}".format) + self.cosines().to_html(
            index=False, float_format="{:.3f}".format
        )


def measure_interference(
    model: Model,
    adapters: Mapping[str, Adapter] | Sequence[Adapter],
    prompts: Any,
    openers: Sequence[str],
    *,
    batch_size: int = 32,
) -> Interference:
    """Measures how several adapters of one model get in one another's way on prompts of one behaviour.

    The deltas are taken on the states of the plain model, so that all are of the same states; the effects are those of
    each adapter alone and of all at once (`Blend`), on the log-odds of `openers` after the last prompt token.

    Args:
        adapters: two or more, with names; of a sequence, their own names or their numbers.
        prompts: whatever `PromptSet.load` reads.

    Raises:
        UserError: fewer than two adapters, or one that is not the model's.

    >>> pair = {"refusal": a, "style": b}                                                                    # doctest: +SKIP
    >>> found = measure_interference(model, pair, "bundled:validation_refusal", ["sorry"])                # doctest: +SKIP
    >>> found.cosines(), found.frame()                                                                    # doctest: +SKIP
    """
    named = dict(adapters) if isinstance(adapters, Mapping) else _named(adapters)
    if len(named) < 2:
        raise UserError(f"{len(named)} adapters cannot interfere; give two or more, each with a name of its own")
    for adapter in named.values():
        adapter.check(model)
    prompts = PromptSet.load(prompts)
    cosine, length = _deltas(model, list(named.values()), prompts, batch_size)
    asked = [None, Blend(list(named.values())), *named.values()]
    plain, *moved = log_odds_each(model, prompts, openers, asked, batch_size)
    joint, *single = (odds - plain for odds in moved)
    excess = joint - torch.stack(single).sum(0)
    return Interference(tuple(named), cosine, length, tuple(map(mean_interval, single)), mean_interval(joint),
                        mean_interval(excess))  # fmt: skip


def _named(adapters: Sequence[Adapter]) -> dict[str, Adapter]:
    names = [a.name or str(i) for i, a in enumerate(adapters)]
    return dict(zip(names if len(set(names)) == len(names) else map(str, range(len(names))), adapters, strict=True))


class _Sums:
    """Cosines and lengths at one site, summed over tokens."""

    def __init__(self, adapters: Sequence[Adapter], site: Site) -> None:
        self.site, k = site, len(adapters)
        self.terms = [[t for t in a.split() if site in t.parts] for a in adapters]
        self.cosine, self.shared = torch.zeros(k, k, dtype=torch.float64), torch.zeros(k, k, dtype=torch.float64)
        self.length, self.own = torch.zeros(k, dtype=torch.float64), torch.zeros(k, dtype=torch.float64)

    def add(self, h: Tensor, where: Where) -> Tensor:
        """Called with the states of a pass, which it leaves as they are."""
        masks = [[where.mask(term.positions) for term in terms] for terms in self.terms]
        seen = torch.stack([mask for listed in masks for mask in listed]).any(0)
        rows, deltas = h[seen], torch.zeros(len(self.terms), int(seen.sum()), h.shape[-1], device=h.device)
        for i, terms in enumerate(self.terms):
            for term, mask in zip(terms, masks[i], strict=True):
                own = mask[seen]
                deltas[i, own] += term.delta(self.site, rows[own]).float()
        norms = deltas.norm(dim=-1)  # [k, rows]
        acts = (norms > 0).double()
        unit = deltas / norms.clamp_min(torch.finfo(norms.dtype).tiny)[..., None]
        self.cosine += torch.einsum("ird,jrd->ij", unit, unit).double().cpu()
        self.shared += (acts @ acts.T).cpu()
        self.length += norms.double().sum(1).cpu()
        self.own += acts.sum(1).cpu()
        return h


def _deltas(
    model: Model, adapters: Sequence[Adapter], prompts: PromptSet, batch_size: int
) -> tuple[Mapping[Site, Tensor], Mapping[Site, Tensor]]:
    """Mean cosines [k, k] and lengths [k] of the deltas on the plain model's states, by site."""
    held = [a.to(model.device) for a in adapters]
    sums = {site: _Sums(held, site) for site in sorted({site for a in held for site in a.sites})}
    encoded = sorted(encode(prompts, model.tokenizer, max_length=model.max_length), key=len)
    with torch.inference_mode(), model.edit({site: one.add for site, one in sums.items()}):
        for start in range(0, len(encoded), batch_size):
            model.run(*pad(encoded[start : start + batch_size], model.pad_id, "right"), stop_after=max(sums).layer)
    cosine = {site: one.cosine / one.shared for site, one in sums.items()}
    return MappingProxyType(cosine), MappingProxyType({site: one.length / one.own for site, one in sums.items()})
