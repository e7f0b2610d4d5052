"""Arms side by side, and one arm over its strengths: the tables and curves that a reader judges a paste by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..adapters.adapter import Adapter
from ..errors import UserError
from ..models import Model
from ..prompts import PromptSet
from .behaviour import Measured, kl_on_text, log_odds_each
from .statistics import mcnemar, mean_interval

if TYPE_CHECKING:
    import pandas as pd


def arms_frame(arms: Sequence[Measured]) -> pd.DataFrame:
    """One line per arm: its rate and log-odds with 95 % intervals, and the p-value against the first arm.

    The first arm is the base; all must be of the same prompts (exact McNemar, paired by prompt).
    """
    import pandas as pd

    if not arms:
        raise UserError("there are no arms to compare; measure at least one")
    rows = []
    for arm in arms:
        row: dict[str, Any] = {"arm": arm.name}
        for name, found in (("rate", arm.rate), ("log-odds", arm.mean_log_odds)):
            row |= {name: found.value, f"{name} low": found.low, f"{name} high": found.high}
        rows.append(row | {"p vs first": mcnemar(arms[0].passed, arm.passed)})
    return pd.DataFrame(rows).set_index("arm")


def dose_response(
    model: Model,
    prompts: Any,
    openers: Sequence[str],
    adapter: Adapter,
    factors: Iterable[float] = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0),
    *,
    texts: Any = None,
) -> list[dict[str, Any]]:
    """Log-odds of a behaviour over the strength of an adapter: what `plots.dose_curves` draws.

    factors: multiples of the adapter's own strength; 0, the plain model, comes first. texts: plain texts, where the KL
    that each strength costs there is wanted too. A point is {"strength", "log_odds": {"value", "low", "high"}, "kl"}.
    """
    prompts = PromptSet.load(prompts)
    doses = [
        replace(adapter, strength=adapter.strength * factor) if factor else None for factor in sorted({0.0, *factors})
    ]
    points = []
    for dosed, odds in zip(doses, log_odds_each(model, prompts, openers, doses), strict=True):
        point = {"strength": float(dosed.strength) if dosed else 0.0, "log_odds": mean_interval(odds).as_dict()}
        if texts is not None:
            point["kl"] = kl_on_text(model, texts, dosed).kl.value if dosed else 0.0
        points.append(point)
    return points
