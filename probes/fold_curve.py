"""What folding a model costs and gains: loss, KL and measured speed against the share of idle channels, beside controls."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from workbench.errors import UserError
from workbench.evaluate.scoring import Scores, Sequences, ratio_interval, score
from workbench.folding.calibration import Channels, calibrate, refit_maps, text_batches
from workbench.folding.fold import ffns_of
from workbench.folding.plan import CATASTROPHE, GATED, METHODS, FoldPlan, Method, drawn, least, plan_fold, swapped
from workbench.folding.texts import ANSWER, completed, part_of
from workbench.models import Model
from workbench.progress import progress
from workbench.prompts import PromptSet

from .lens_rows import split_prompts

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("workbench")
THETAS = (0.25, 0.5, 0.75)
SPEED_TOKENS = (8, 128)
"""texts and tokens of each of the batch that speed is measured on"""


@dataclass(frozen=True, eq=False)
class FoldCurve:
    """Arms on the same held-out prompts: (theta, method, channels) with `channels` least (by score) or random."""

    model: str
    gated: bool
    scores: Mapping[tuple[float, str, str], Scores] = field(repr=False)
    plain: Scores = field(repr=False)
    tokens: torch.Tensor = field(repr=False)
    """predicted tokens of each prompt"""
    ratios: Mapping[float, float]
    """weights of the folded networks over those before, by theta"""
    speeds: Mapping[float, float]
    """tokens per second by theta; 0 is the dense model; empty where not measured"""
    r2: Mapping[float, tuple[float | None, ...]]
    """of the refit of every layer, on batches that it was not fitted on"""
    calibration: Sequences = field(repr=False)
    """what it was calibrated on; `fold_model` of these makes the very model of an arm"""
    channels: tuple[Channels, ...] = field(repr=False)

    def __repr__(self) -> str:
        return f"FoldCurve({self.model!r}, {len(self.scores)} arms, {int(self.tokens.sum()):,} tokens)"

    def loss(self, theta: float, method: str, channels: str = "least") -> float:
        """Nats per token of one arm."""
        if (theta, method, channels) not in self.scores:
            known = ", ".join(f"{t:g} {m} {c}" for t, m, c in self.scores)
            raise UserError(f"no arm {theta:g} {method} {channels}; there are {known}")
        return ratio_interval(self.scores[theta, method, channels].loss, self.tokens).value

    @property
    def plain_loss(self) -> float:
        """Nats per token of the model as it is."""
        return ratio_interval(self.plain.loss, self.tokens).value

    def frame(self) -> pd.DataFrame:
        """One line an arm: loss, its rise over the plain model (paired), KL, agreement of the top token, each with its
        interval over prompts; the networks' share of weights left, tokens per second, and times the dense model's."""
        import pandas as pd

        arms = {(0.0, "dense", ""): self.plain, **self.scores}
        lines = []
        for (theta, method, channels), found in arms.items():
            line: dict[str, Any] = {"theta": theta, "method": method, "channels": channels}
            for name, sums in (("loss", found.loss), ("rise", found.loss - self.plain.loss), ("kl", found.kl),
                               ("agreement", found.agree)):  # fmt: skip
                value = ratio_interval(sums, self.tokens)
                line |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
            speed = self.speeds.get(theta)
            line |= {"weights": self.ratios.get(theta, 1.0), "tokens_per_s": speed,
                     "speedup": speed / self.speeds[0.0] if speed else None}  # fmt: skip
            lines.append(line)
        return pd.DataFrame(lines)

    def _repr_html_(self) -> str:
        return str(self.frame().to_html(index=False, float_format="{:.4g}".format, na_rep="–"))


def fold_curve(
    model: Model,
    prompts: Any,
    thetas: Sequence[float] = THETAS,
    *,
    methods: Sequence[Method] | None = None,
    holdout: float = 0.25,
    seed: int = 0,
    alpha: Any = "cv",
    answers: int = ANSWER,
    max_length: int | None = None,
    speed: bool = True,
    repeats: int = 5,
) -> FoldCurve:
    """Loss and speed of a model against the share of idle channels, for every method and for channels drawn at random.

    Calibrated on the prompts that are not held out; scored on those that are.

    Args:
        prompts: what `PromptSet.load` reads; chats are completed with an answer, of which the loss is (`completed`).
        thetas: shares of idle channels, from 0 to less than 1.
        methods: of identity, mean, affine, refit; all that the model has unless given. `mean` is always there.
        holdout: share of the prompts that the figures are of.
        answers: tokens of the model's own answers; 0 takes prompts as they stand.
        speed: measures tokens per second of the folded and the dense model, in turns, as medians of `repeats`.

    Raises:
        UserError: theta outside of [0, 1), a mixture of experts, a method that a gated network does not have.
    """
    ffns = ffns_of(model)
    gated = any(ffn.gated for ffn in ffns)
    wanted = tuple(dict.fromkeys(("mean", *(methods or (GATED if gated else METHODS)))))
    control: Method = "refit" if gated else "affine"
    read = PromptSet.load(prompts)
    sequences = completed(model, read, answers=answers, max_length=max_length)
    train, held = split_prompts(read, sequences, (1 - holdout, holdout), seed)
    calibration, part = part_of(sequences, train), part_of(sequences, held)
    batches = text_batches(model, calibration.ids)
    channels = calibrate(model.module, ffns, batches)
    sets = {(theta, kind): make(channels, theta) for theta in thetas
            for kind, make in (("least", least), ("random", partial(drawn, seed=seed)))}  # fmt: skip
    fits = refit_maps(
        model.module, ffns, {f"{t:g} {kind}": idle for (t, kind), idle in sets.items()}, batches, alpha=alpha
    )
    plain: Scores | None = None
    scores: dict[tuple[float, str, str], Scores] = {}
    ratios, speeds, r2 = dict[float, float](), dict[float, float](), dict[float, tuple[float | None, ...]]()
    for theta in progress(thetas, desc="folding"):
        plans: dict[tuple[str, str], FoldPlan] = {}
        for kind in ("least", "random"):
            kept = wanted if kind == "least" else tuple(m for m in (control, "refit") if m in wanted or m == control)
            for method in dict.fromkeys(kept):
                fit = fits[f"{theta:g} {kind}"]
                plans[method, kind] = plan_fold(model.module, ffns, channels, sets[theta, kind], method, fit)
        modules = {key: plan.modules(model.module) for key, plan in plans.items()}
        found = score(model, part, {" ".join(k): _arm(model.module, m) for k, m in modules.items()})
        plain = found["untouched"]
        scores |= {(theta, *key): found[" ".join(key)] for key in plans}
        ratios[theta] = next(iter(plans.values())).ratio
        r2[theta] = tuple(max(s for _, s in f.cv) if f and f.cv else None for f in fits[f"{theta:g} least"])
        if speed:
            dense, folded = forward_speed(model, modules["mean", "least"], repeats)
            speeds[theta] = folded
            speeds.setdefault(0.0, dense)
    if plain is None:
        raise UserError("no theta given; give such as 0.25,0.5,0.75")
    curve = FoldCurve(model.name, gated, scores, plain, part.predicted, ratios, speeds, r2, calibration, channels)
    if "identity" in wanted:
        rise = max(curve.loss(t, "identity") for t in thetas) - curve.plain_loss
        log.warning("%s: the loss moves by up to %+.2f nats per token", CATASTROPHE, rise)
    return curve


def _arm(module: nn.Module, modules: Mapping[str, nn.Module]) -> Callable[..., Any]:
    return lambda *_: swapped(module, modules)


def forward_speed(model: Model, modules: Mapping[str, nn.Module], repeats: int = 5) -> tuple[float, float]:
    """Tokens per second of a forward pass with its head, (dense, folded), in turns, as medians; after one of each."""
    rows, length = SPEED_TOKENS
    length = min(length, model.max_length)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.module.get_input_embeddings().weight.shape[0], (rows, length), generator=generator)
    mask, seconds = torch.ones_like(ids), ([], [])  # type: ignore[var-annotated]
    with torch.inference_mode():
        for turn in range(repeats + 1):
            for which, used in enumerate(({}, modules)):
                with swapped(model.module, used):
                    _wait(model)
                    start = time.perf_counter()
                    model.logits(ids, mask)
                    _wait(model)
                    if turn:
                        seconds[which].append(time.perf_counter() - start)
    dense, folded = (ids.numel() / statistics.median(s) for s in seconds)
    return dense, folded


def _wait(model: Model) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
