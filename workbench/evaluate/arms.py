"""What arrived: every arm of a transfer on the same evaluation prompts, its side effects and its cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..adapters.adapter import Adapter
from ..atomic import write_text
from ..models import Model
from ..prompts import PromptSet
from .behaviour import Behaviour, Measured, kl_on_text, log_odds_each, measure_each
from .comparison import dose_response
from .plugins import origin
from .statistics import Interval, gain_share, mcnemar, mean_interval, rate, wilson

if TYPE_CHECKING:
    from ..behaviour_transfer import BehaviourTransfer, Choice

EXAMPLES = 8


@dataclass(frozen=True, eq=False)
class Arm:
    """One arm on the evaluation prompts; a random control is several draws, graded the first few of them."""

    graded: list[Measured]
    log_odds: Float[Tensor, "draw n"]

    @property
    def passed(self) -> list[bool]:
        """The verdicts of the first draw: of an arm without draws, its verdicts."""
        return list(self.graded[0].passed)

    @property
    def rates(self) -> list[float]:
        """The share of prompts that passed, by graded draw."""
        return [float(np.mean(m.passed)) for m in self.graded]

    def rate(self) -> Interval:
        """Wilson's interval over prompts; of a control of several draws, Student's over the draws where that is wider."""
        if len(self.graded) == 1:
            return rate(self.passed)
        draws, n = mean_interval(self.rates), len(self.passed)
        prompts = wilson(round(draws.value * n), n)
        return Interval(draws.value, max(min(draws.low, prompts.low), 0.0), min(max(draws.high, prompts.high), 1.0))

    def row(self, base: Arm, sigma: float | None, norm: float | None) -> dict[str, Any]:
        """Rate and log-odds with intervals; the intervals of a control of several draws are over its draws."""
        draws, n = self.log_odds.shape
        paired = self is not base and draws == 1
        return {
            "rate": self.rate().as_dict() if self.graded else None,
            "log_odds": mean_interval(self.log_odds.mean(1) if draws > 1 else self.log_odds[0]).as_dict(),
            "n": n,
            "draws": draws,
            "graded_draws": len(self.graded),
            "mcnemar_vs_base": mcnemar(base.passed, self.passed) if paired else None,
            "sigma_length": sigma,
            "norm": norm,
        }

    def share(self, base: Arm, native: Arm) -> dict[str, Any]:
        """The share of native's gain over base that this arm reached, by verdict and by log-odds; over draws, if any."""
        if len(self.log_odds) == 1:
            shares = {
                "rate": gain_share(base.passed, self.passed, native.passed),
                "log_odds": gain_share(base.log_odds[0], self.log_odds[0], native.log_odds[0]),
            }
        else:
            odds = [float(a.log_odds.mean()) for a in (base, native)]
            shares = {
                "rate": _share_over_draws(self.rates, base.rates[0], native.rates[0]),
                "log_odds": _share_over_draws(self.log_odds.mean(1).tolist(), *odds),
            }
        return {k: None if v is None else v.as_dict() for k, v in shares.items()}


def _share_over_draws(values: Sequence[float], base: float, native: float) -> Interval | None:
    """Interval over draws of (value - base) / (native - base); None where native gained nothing or nothing was drawn."""
    if native <= base or not values:
        return None
    return mean_interval([(v - base) / (native - base) for v in values])


def _arms(
    b: BehaviourTransfer, model: Model, prompts: PromptSet, drawn: Mapping[str, Sequence[Adapter | None]]
) -> dict[str, Arm]:
    """Answers and log-odds of each arm, under each of its adapters; of several draws only the first few answer.

    All arms of a model go at once, so that replicas of it share the batches of all of them.
    """
    table, evaluate = b.table, b.shared.job.evaluate
    behaviour = Behaviour(table.name, tuple(table.openers), table.grader, table.grader_args, table.score_name)
    answering = {
        name: adapters[: evaluate.rate_draws] if len(adapters) > 1 else adapters for name, adapters in drawn.items()
    }
    graded = measure_each(model, behaviour, prompts, [(n, a) for n, some in answering.items() for a in some],
                          max_new_tokens=evaluate.max_new_tokens, batch_size=evaluate.batch_size)  # fmt: skip
    rest = [(n, a) for n, adapters in drawn.items() for a in adapters[len(answering[n]) :]]
    odds = log_odds_each(model, prompts, table.openers, [a for _, a in rest])
    made: dict[str, Arm] = {}
    for name in drawn:
        own = [m for m in graded if m.name == name]
        more = [row for (n, _), row in zip(rest, odds, strict=True) if n == name]
        made[name] = Arm(own, torch.stack([*(m.log_odds for m in own), *more]))
    return made


def _shown(answers: list[str], openers: list[str]) -> list[bool]:
    return [any(a.strip().lower().startswith(o.strip().lower()) for o in openers) for a in answers]


def _side_effects(b: BehaviourTransfer, arms: Mapping[str, Adapter | None]) -> dict[str, Any]:
    """KL and perplexity on neutral text, over-triggering, and the log-odds of the other behaviours."""
    t, table, evaluate = b.shared, b.table, b.shared.job.evaluate
    found: dict[str, Any] = {"kl_neutral_text": {}, "perplexity": {}, "over_trigger": {}, "log_odds_elsewhere": {}}
    if evaluate.neutral_text:
        texts = t.prompts(evaluate.neutral_text)[: evaluate.limit]
        for name, adapter in arms.items():
            if adapter is not None:
                result = kl_on_text(t.recipient, texts, adapter)
                found["kl_neutral_text"][name] = result.kl.as_dict()
                found["perplexity"][name] = result.perplexity_edited
                found["perplexity"]["base"] = result.perplexity_base
    if table.evaluation_not:
        away = t.prompts(table.evaluation_not)[: evaluate.limit]
        longest = max(len(t.recipient.tokenizer(o, add_special_tokens=False)["input_ids"]) for o in table.openers)
        made = t.recipient.generate_each(away, list(arms.values()), max_new_tokens=longest + 4,
                                         batch_size=evaluate.batch_size, desc=f"{b.name} where not wanted")  # fmt: skip
        for name, answers in zip(arms, made, strict=True):
            found["over_trigger"][name] = rate(_shown(answers, table.openers)).as_dict()
    for other in t.job.behaviours:
        if other.name == b.name:
            continue
        prompts = t.prompts(other.evaluation)[: evaluate.limit]
        acting = {name: adapter for name, adapter in arms.items() if adapter is not None}
        plain, *odds = log_odds_each(t.recipient, prompts, other.openers, [None, *acting.values()])
        found["log_odds_elsewhere"][other.name] = {
            name: mean_interval(row - plain).as_dict() for name, row in zip(acting, odds, strict=True)
        }
    return found


def measure_arms(b: BehaviourTransfer, chosen: Choice, forecast: Mapping[str, Any], pasted: Mapping[str, Any],
            native: Mapping[str, Any] | None) -> dict[str, Any]:  # fmt: skip
    """The metrics of one behaviour (the layout is described in docs/jobs.md)."""
    t, table = b.shared, b.table
    sets = (table.validation, table.evaluation_not, t.job.evaluate.neutral_text)
    hashes = [[t.hash_of(s) for s in sets], {o.name: [o.openers, t.hash_of(o.evaluation)] for o in t.job.behaviours}]
    own = {
        arm: b.adapter(arm).hash for arm in ("donor", "paste", "pinv", "mean_delta", *(["native"] if native else []))
    }
    plugged = origin(table.grader)  # the code of a grader that is not ours decides its verdicts too
    inputs = [hashes, own, t.job.evaluate.model_dump(), table.model_dump(), *([plugged] if plugged else [])]
    name = f"answers/{b.name}.jsonl"

    def make() -> dict[str, Any]:
        return _measure(b, chosen, native is not None, name)

    measured = t.run.step(f"evaluate-{b.name}", t.key(inputs), make, (name,))
    return {**measured, "forecast": forecast, "converter": pasted["converters"][0], "converters": pasted["converters"],
            "cost": _cost(forecast, pasted, native)}  # fmt: skip


def _cost(forecast: Mapping[str, Any], pasted: Mapping[str, Any], native: Mapping[str, Any] | None) -> dict[str, Any]:
    """Seconds and FLOPs. The paste is fit and fold; choosing it costs the forecast and the gradients that it needs,
    which are the recipient's own and serve every adapter. Profiles are counted with the run, not here."""
    seconds = pasted["fit"] + pasted["fold"]
    choosing = forecast["seconds"] + forecast["gradients_seconds"]
    parts = {
        "fit": pasted["fit"],
        "fold": pasted["fold"],
        "forecast": forecast["seconds"],
        "gradients": forecast["gradients_seconds"],
    }
    cost = {"paste_seconds": seconds, "paste_flops": pasted["flops"], "paste_parts": parts}
    if native is None:
        return cost
    return {
        **cost,
        "native_seconds": native["seconds"],
        "native_flops": native["flops"],
        "ratio_seconds": _ratio(native["seconds"], seconds),
        "ratio_flops": native["flops"] / pasted["flops"],
        "ratio_seconds_with_forecast": _ratio(native["seconds"], seconds + choosing),
    }


def _ratio(a: float, b: float) -> float | None:
    """None where no time had passed by the clock, which may be too coarse for a paste."""
    return a / b if b > 0 else None


def _measure(b: BehaviourTransfer, chosen: Choice, with_native: bool, answers_file: str) -> dict[str, Any]:
    t, table = b.shared, b.table
    prompts = t.prompts(table.evaluation)[: t.job.evaluate.limit]
    donors: dict[str, Adapter | None] = {"donor_base": None, "donor_adapter": b.adapter("donor")}
    single: dict[str, Adapter | None] = {
        "base": None, **({"native": b.adapter("native")} if with_native else {}),
        **{name: b.adapter(name) for name in ("paste", "pinv", "mean_delta")},
    }  # fmt: skip
    drawn = b.controls(chosen) if t.job.evaluate.draws else {}
    arms = _arms(b, t.donor, prompts, {name: [adapter] for name, adapter in donors.items()})
    arms |= _arms(b, t.recipient, prompts, {**{name: [adapter] for name, adapter in single.items()}, **drawn})
    ours = {name: [adapter] for name, adapter in single.items() if adapter is not None} | drawn
    lengths = {n: [float(np.mean([f(a) for a in adapters])) for f in (b.sigma, b.norm)] for n, adapters in ours.items()}
    rows = {}
    for name, arm in arms.items():
        base = arms["donor_base" if name.startswith("donor") else "base"]
        rows[name] = arm.row(base, *lengths.get(name, [None, None]))
    result: dict[str, Any] = {"n": len(prompts), "score_name": table.score_name, "arms": rows}
    if with_native:
        result["gain_share"] = arms["paste"].share(arms["base"], arms["native"])
        others = [n for n in arms if n in ("pinv", "mean_delta", *drawn)]
        result["control_share"] = {n: arms[n].share(arms["base"], arms["native"]) for n in others}
    result["side_effects"] = _side_effects(b, single)
    # on the evaluation prompts: nothing is chosen by it
    result["dose"] = dose_response(t.recipient, prompts, table.openers, b.adapter("paste"), (1.0, *t.job.evaluate.dose))
    result["examples"] = _answers(b, prompts, arms, answers_file)
    return result


def _answers(b: BehaviourTransfer, prompts: PromptSet, arms: Mapping[str, Arm], file: str) -> list[dict[str, Any]]:
    """Writes every answer of every arm as JSON lines; returns the first few for the report."""
    rows = []
    for i, prompt in enumerate(prompts):
        row: dict[str, Any] = {"id": prompt.id, "prompt": prompt.user, "gold": prompt.meta.get("gold", "")}
        row |= {name: arm.graded[0].answers[i] for name, arm in arms.items() if arm.graded}
        rows.append(row)
    write_text(b.shared.run.folder / file, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    keep = ("prompt", "gold", "donor_adapter", "base", "native", "paste")
    return [{k: r[k] for k in keep if k in r} for r in rows[:EXAMPLES]]
