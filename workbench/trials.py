"""Pastes tried on validation prompts: how much of the behaviour each brings out, and what else it moves.

The forecast is first order: it ranks layers and converters, and misleads where a delta is long. A trial is a forward pass
with the paste on, at any length; nothing is generated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from .adapters.adapter import Adapter
from .convert import ConverterFits
from .evaluate.batch_tasks import set_log_odds
from .forecast import Candidate, Forecast, paste_candidate
from .memory import batches_that_fit
from .progress import progress
from .prompts import PromptSet, encode, opener_ids, pad

if TYPE_CHECKING:
    from .models import Model

PROMPTS = 24  # of each set, and
TRIED = 4  # candidates, the first by forecast, at
STRENGTHS = (0.5, 1.0, 2.0, 4.0)  # each: twice as many of any choose no better on the bundled pair
MAX_SIGMA = 12.0


@dataclass(frozen=True)
class Trial:
    """What a candidate did at `strength`.

    on: change of the mean log-odds of the behaviour, in nats; gain: change of its mean probability; off_rate: mean
    absolute change of a probability on each other set of prompts; kl: mean KL(plain || pasted) of the next token of
    neutral texts, in nats.
    """

    candidate: Candidate
    strength: float
    on: float
    gain: float
    off_rate: Mapping[str, float]
    kl: float

    @property
    def damage(self) -> float:
        """The largest change of a probability off target. On neutral text no set of next tokens moves by more than
        sqrt(KL / 2) (Pinsker), so that one unit serves for all."""
        return max(*self.off_rate.values(), (max(self.kl, 0.0) / 2) ** 0.5, 0.0)

    def merit(self, target: float = 1.0) -> float:
        """Gain minus damage; where `target` is negative, the behaviour is to become rarer."""
        return (self.gain if target >= 0 else -self.gain) - self.damage

    def as_dict(self) -> dict[str, Any]:
        """As metrics.json has it."""
        figures = {name: getattr(self, name) for name in ("strength", "on", "gain", "off_rate", "kl", "damage")}
        return {**self.candidate.as_dict(), **figures}


@dataclass(frozen=True, eq=False)
class TrialSets:
    """What pastes are tried on: validation prompts, since choices are made by them; of each set the first `limit`.

    on: prompts of the behaviour and its openers; off: the same of what must not change, by name; texts: plain texts,
    which are cut after half of their tokens, as `kl_on_text` cuts them.
    """

    model: Model
    on: tuple[PromptSet, Sequence[str]]
    off: Mapping[str, tuple[PromptSet, Sequence[str]]] = field(default_factory=dict)
    texts: PromptSet | None = None
    limit: int = PROMPTS

    @cached_property
    def _encoded(self) -> list[list[int]]:
        found = [ids for prompts, _ in (self.on, *self.off.values()) for ids in self._ids(prompts)]
        texts = self._ids(self.texts) if self.texts else []
        return found + [ids[: max(1, round(len(ids) / 2))] for ids in texts]

    def _ids(self, prompts: PromptSet) -> list[list[int]]:
        return encode(prompts[: self.limit], self.model.tokenizer, max_length=self.model.max_length)

    @cached_property
    def _plain(self) -> Float[Tensor, "n v"]:
        return self._logits(None)

    def _logits(self, adapter: Adapter | None, batch_size: int = 128) -> Float[Tensor, "n v"]:
        """Of the token that follows each prompt and each half of a text."""
        made = []
        with torch.inference_mode(), nullcontext() if adapter is None else adapter.on(self.model):
            every = range(len(self._encoded))
            for batch in batches_that_fit(every[start : start + batch_size] for start in every[::batch_size]):
                with batch as rows:
                    ids, mask = pad([self._encoded[i] for i in rows], self.model.pad_id, "left")
                    made.append(self.model.logits(ids, mask, last_only=True)[:, -1].float().cpu())
        return torch.cat(made)

    def _odds(self, logits: Float[Tensor, "n v"]) -> Iterator[Float[Tensor, " m"]]:
        """Log-odds of each set, the behaviour's first."""
        at = 0
        for prompts, openers in (self.on, *self.off.values()):
            rows = logits[at : (at := at + len(prompts[: self.limit]))]
            yield set_log_odds(rows, opener_ids(openers, self.model.tokenizer, prompts[0]))

    def trial(self, candidate: Candidate, paste: Adapter) -> Trial:
        """What `paste`, which is `candidate` at its strength, does."""
        logits = self._logits(paste)
        (before, *plain), (after, *edited) = list(self._odds(self._plain)), list(self._odds(logits))
        away = [float((z.sigmoid() - z0.sigmoid()).abs().mean()) for z0, z in zip(plain, edited, strict=True)]
        n = len(before) + sum(map(len, plain))
        p, q = (x[n:].double().log_softmax(1) for x in (self._plain, logits))
        kl = (p.exp() * (p - q)).sum(1)
        gain = (after.sigmoid() - before.sigmoid()).mean()
        return Trial(candidate, paste.strength, float((after - before).mean()), float(gain),
                     dict(zip(self.off, away, strict=True)), float(kl.mean()) if len(kl) else 0.0)  # fmt: skip


def try_pastes(
    sets: TrialSets,
    adapter: Adapter,
    fits: ConverterFits,
    forecasts: Sequence[Forecast],
    *,
    target: float,
    strengths: Sequence[float] = STRENGTHS,
    max_sigma: float = MAX_SIGMA,
) -> list[Trial]:
    """Trials of every forecast's candidate at every strength, the one with the most gain less damage first.

    Args:
        forecasts: of `adapter` through `fits`, such as the first of `rank`.
        target: the donor's own effect, of which the sign counts.
        strengths: each is cut to that at which the delta is `max_sigma` standard deviations of the recipient's profile
            long.

    >>> try_pastes(TrialSets(model, (prompts, ["sorry"])), adapter, fits, ranked[:4], target=2.0)[0].strength  # doctest: +SKIP
    2.0
    """
    made = []
    for forecast in progress(forecasts, desc="trying pastes", unit="paste"):
        most = max_sigma * forecast.strength / max(forecast.sigma, 1e-9)
        for strength in sorted({min(s, most) for s in strengths}):
            paste = paste_candidate(adapter, fits, forecast.candidate, strength)
            made.append(sets.trial(forecast.candidate, paste))
    return sorted(made, key=lambda trial: trial.merit(target), reverse=True)
