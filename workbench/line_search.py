"""A second look at the best forecasts: the effect at the edited point itself, and the strength that follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .adapters.adapter import Adapter
from .convert import ConverterFits
from .evaluate.behaviour import log_odds
from .forecast import Forecast, paste_candidate
from .progress import progress
from .prompts import PromptSet

if TYPE_CHECKING:
    from .models import Model


def line_search(
    model: Model,
    adapter: Adapter,
    fits: ConverterFits,
    forecasts: Sequence[Forecast],
    prompts: Any,
    openers: Sequence[str],
    *,
    target: float,
    steps: int = 1,
    max_sigma: float = 4.0,
    strengths: tuple[float, float] = (0.25, 1.5),
) -> list[Forecast]:
    """Forecasts whose `on`, and the strength that should reach `target`, come from forward passes of the pasted model.

    The effect at strength s is taken as a s + b s^2: a is the forecast's gradient at the plain model, b what the effect
    found at the forecast's own strength leaves over. Each step tries the strength that this curve sends to the target
    and fits b anew; nothing is generated. Effects of several layers on one another are in what is found. Figures off
    target, lengths and KL are scaled with the strength.

    Args:
        forecasts: as `forecast.forecast_pastes` makes them, of `adapter` through `fits`.
        prompts, openers: of the behaviour; validation prompts, since choices are made by them.
        steps: strengths tried after the first; each costs a forward pass.
        max_sigma, strengths: bounds of the strength, as in `forecast_pastes`.

    >>> line_search(model, adapter, fits, ranked[:3], validation, ["sorry"], target=2.0)  # doctest: +SKIP
    """
    given = PromptSet.load(prompts)
    plain = log_odds(model, given, openers).mean()
    made = []
    for forecast in progress(forecasts, desc="line search", unit="paste"):
        slope, at = forecast.on / forecast.strength, forecast.strength
        most = min(strengths[1], max_sigma / max(forecast.sigma / forecast.strength, 1e-9))

        def effect(strength: float, forecast: Forecast = forecast) -> float:
            pasted = paste_candidate(adapter, fits, forecast.candidate, strength)
            return float(log_odds(model, given, openers, pasted).mean() - plain)

        found = effect(at)
        for _ in range(steps):
            wanted = min(max(_reaching(target, slope, (found - slope * at) / at**2), strengths[0]), most)
            if abs(wanted - at) < 0.02 * at:
                break
            at, found = wanted, effect(wanted)
        made.append(replace(forecast.at(at), on=found))
    return made


def _reaching(target: float, slope: float, bend: float) -> float:
    """The smallest strength s > 0 with slope s + bend s^2 = target; where the curve turns first, its turning point."""
    if abs(bend) < 1e-9 * max(abs(slope), 1e-9):
        return target / slope if slope * target > 0 else 0.0
    inside = slope**2 + 4 * bend * target
    if inside < 0:
        return max(-slope / (2 * bend), 0.0)
    roots = [(-slope + sign * inside**0.5) / (2 * bend) for sign in (1, -1)]
    return min((s for s in roots if s > 0), default=0.0)
