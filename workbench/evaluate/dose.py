"""One prompt over the strength of an adapter: how far the first token of the answer moves, and towards what."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from ..prompts import PromptSet, encode, opener_ids
from .batch_tasks import set_log_odds

if TYPE_CHECKING:
    import pandas as pd

    from ..adapters.adapter import Adapter
    from ..adapters.blend import Blend
    from ..models import Model

FACTORS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)


@dataclass(frozen=True, eq=False)
class PromptDose:
    """What `prompt_dose` measured: n strengths, the plain model (0) among them, ascending."""

    factors: tuple[float, ...]
    """multiples of the adapter's own strength"""
    kl: Float[Tensor, " n"]
    """KL(plain || at this strength) of the answer's first token, in nats, float64; exactly 0 at 0"""
    log_odds: Float[Tensor, " n"] | None
    """of the openers' first tokens, in nats; None without openers"""
    likeliest: tuple[str, ...]
    """the likeliest first token"""
    probability: Float[Tensor, " n"]
    """its probability"""

    def frame(self) -> pd.DataFrame:
        """One line for each strength."""
        import pandas as pd

        odds = [math.nan] * len(self.factors) if self.log_odds is None else self.log_odds.tolist()
        return pd.DataFrame({"factor": self.factors, "kl": self.kl.tolist(), "log_odds": odds,
                             "likeliest": self.likeliest, "probability": self.probability.tolist()})  # fmt: skip

    def _repr_html_(self) -> str:
        table = self.frame().to_html(index=False, escape=True, float_format="{:.4g}".format)
        return f"<p>{escape('The first token of the answer, over multiples of the adapter')}</p>{table}"


def prompt_dose(
    model: Model,
    prompt: Any,
    adapter: Adapter | Blend,
    factors: Iterable[float] = FACTORS,
    openers: Sequence[str] = (),
) -> PromptDose:
    """The distribution of an answer's first token at several strengths of an adapter, against that of the plain model.

    Args:
        prompt: what `PromptSet.load` reads as one prompt.
        factors: multiples of the adapter's own strength; 0 is added.
        openers: how an answer that shows the behaviour begins, for the log-odds of `evaluate.behaviour.log_odds`.

    It is one prompt: there is no interval; `evaluate.comparison.dose_response` gives one over many. An adapter for
    generated tokens alone has not acted yet where an answer begins. Raises UserError for a prompt that is empty or too
    long, factors that are not finite, and an adapter of another model.
    """
    wanted = sorted({0.0, *map(float, factors)})
    if not all(map(math.isfinite, wanted)):
        raise UserError(f"strengths must be finite numbers; got {', '.join(map(str, wanted))}")
    loaded = PromptSet.load([prompt])
    ids = torch.tensor(encode(loaded, model.tokenizer))
    if ids.shape[1] > model.max_length:
        raise UserError(f"this prompt takes {ids.shape[1]} tokens and {model.name} reads {model.max_length}; give a "
                        "shorter one")  # fmt: skip
    chosen = opener_ids(list(openers), model.tokenizer, loaded[0]) if openers else []
    rows = []
    with torch.inference_mode():
        for factor in wanted:
            with (adapter * factor).on(model) if factor else nullcontext():
                rows.append(model.logits(ids, torch.ones_like(ids), last_only=True)[0, -1].double())
    logits = torch.stack(rows)
    p = logits.log_softmax(-1)
    plain = p[wanted.index(0.0)]
    kl = torch.where(plain > -torch.inf, plain.exp() * (plain - p), 0.0).sum(-1).clamp(min=0)
    best = p.max(-1)
    names = model.tokenizer.batch_decode([[i] for i in best.indices.tolist()])
    odds = set_log_odds(logits, chosen).cpu() if chosen else None
    return PromptDose(tuple(wanted), kl.cpu(), odds, tuple(names), best.values.exp().cpu())
