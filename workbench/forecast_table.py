"""All pastes of an adapter between two models, ranked by forecast, the first of them measured beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from .adapters.adapter import Adapter
from .convert import ConverterFits
from .errors import UserError
from .evaluate.behaviour import log_likelihood, log_odds
from .evaluate.statistics import Interval, mean_interval, spearman
from .forecast import (
    RIDGES,
    Forecast,
    candidates_of,
    forecast_frame,
    forecast_pastes,
    matched_candidates,
    paste_candidate,
    rank,
)
from .progress import progress
from .prompts import PromptSet
from .sensitivity import answer_gradients, fisher, gradients

if TYPE_CHECKING:
    import pandas as pd

    from .models import Model

SHOWN = 20


@dataclass(frozen=True, eq=False)
class RankedPastes:
    """What `rank_pastes` found: forecasts in order of preference, and what was measured of the first of them."""

    target: Interval
    """the donor's own effect, in nats, with its interval over prompts"""
    forecasts: tuple[Forecast, ...]
    measured: tuple[Interval, ...]
    """the effect of the first pastes on the same prompts, in nats"""
    unit: str
    """what the effects are of"""
    texts: bool
    """whether the KL on plain text was forecast; it is 0 where it was not"""
    seconds: float

    @property
    def spearman(self) -> float | None:
        """Of forecast against measured effects, over those that were measured; None where they are too few."""
        if not self.measured:
            return None
        return spearman([f.on for f in self.forecasts[: len(self.measured)]], [m.value for m in self.measured])

    def frame(self) -> pd.DataFrame:
        """`forecast_frame`, with the measured effect and its interval in columns of their own."""
        frame = forecast_frame(self.forecasts)
        for name in ("value", "low", "high"):
            values = [getattr(m, name) for m in self.measured]
            frame[f"measured {name}"] = values + [None] * (len(frame) - len(values))
        return frame

    def _repr_html_(self) -> str:
        said = f"{len(self.forecasts):,} pastes, the first {min(SHOWN, len(self.forecasts))}; effects in nats of {self.unit}; "
        aim = f"the donor's own {self.target.value:+.3f} [{self.target.low:+.3f}, {self.target.high:+.3f}]"
        return f"<p>{escape(said + aim)}</p>" + self.frame().head(SHOWN).to_html(
            index=False, float_format="{:.3f}".format
        )


def rank_pastes(
    adapter: Adapter,
    fits: ConverterFits,
    donor: Model,
    recipient: Model,
    prompts: Any,
    openers: Sequence[str] = (),
    *,
    off: Mapping[str, tuple[Any, Sequence[str]]] | None = None,
    texts: Any = None,
    methods: Sequence[tuple[str, float]] = RIDGES,
    strength: float | None = None,
    max_sigma: float = 4.0,
    measured: int = 0,
    seed: int = 0,
) -> RankedPastes:
    """Forecasts every paste of `adapter` (converter, layers, strength) and puts them in order, best first (see `rank`).

    Args:
        fits: of the profiles of the two models, on the same prompts.
        prompts: neutral prompts for the log-odds that an answer begins with one of `openers`; without openers, prompts
            with a `response` each, for the log-probability of whole answers.
        off: what must not change: prompts and openers, by name. texts: plain text, for the KL there.
        methods: converters as (kind, number), such as `converter_specs.method_pairs` reads them.
        strength: None: for each paste that which should reach the donor's own effect, at most `max_sigma` long.
        measured: how many of the first are pasted and measured on `prompts`, to check the forecast.

    Raises UserError for an adapter that acts at several sets of positions at once, or where no opener is moved by it.

    >>> rank_pastes(adapter, fits, donor, recipient, "validation.jsonl", ["sorry"], measured=5).frame()  # doctest: +SKIP
    """
    began = time.perf_counter()
    if len(adapter.split()) != 1:
        raise UserError("a forecast is of an adapter with one set of positions; forecast its terms one by one")
    if openers and adapter.positions == "generated":
        raise UserError("an adapter at generated tokens moves no first token of an answer; forecast it on whole answers: "
                        "prompts with a response, and no openers")  # fmt: skip
    asked, at = PromptSet.load(prompts), adapter.positions

    def value(model: Model, given: Adapter | None) -> Float[Tensor, " n"]:
        return log_odds(model, asked, openers, given) if openers else log_likelihood(model, asked, given)

    target = mean_interval(value(donor, adapter) - value(donor, None))
    on = (
        gradients(recipient, asked, openers, positions=at)
        if openers
        else answer_gradients(recipient, asked, positions=at)
    )
    away = {name: gradients(recipient, *pair, positions=at) for name, pair in (off or {}).items()}
    neutral = fisher(recipient, texts, seed=seed) if texts is not None else []
    if len(adapter.parts) == 1:
        candidates = candidates_of(adapter, recipient.n_layers, methods)
    else:
        candidates = matched_candidates(adapter, fits, on, target.value, donor.n_layers, methods)
    made = forecast_pastes(adapter, fits, candidates, on, away, neutral, target=target.value, strength=strength,
                           max_sigma=max_sigma)  # fmt: skip
    ranked = tuple(rank(made, target.value))
    found = _measured(adapter, fits, ranked[:measured], lambda given: value(recipient, given))
    unit = "log-odds of the openers" if openers else "log-probability of the answer"
    return RankedPastes(target, ranked, found, unit, bool(neutral), time.perf_counter() - began)


def _measured(
    adapter: Adapter, fits: ConverterFits, ranked: Sequence[Forecast], value: Callable[[Adapter | None], Tensor]
) -> tuple[Interval, ...]:
    if not ranked:
        return ()
    plain = value(None)
    pastes = (paste_candidate(adapter, fits, f.candidate, f.strength) for f in ranked)
    return tuple(
        mean_interval(value(paste) - plain) for paste in progress(pastes, total=len(ranked), desc="measuring pastes")
    )
