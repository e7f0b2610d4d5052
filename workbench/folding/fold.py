"""fold_model: a language model with a share of each network's channels folded into one linear map."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..evaluate.scoring import Sequences, ratio_interval, score
from ..evaluate.statistics import Interval
from .architecture import fold_module, save_folded
from .calibration import Batch, Channels, calibrate, refit_maps, text_batches
from .ffn import FFN, find_ffns
from .plan import CATASTROPHE, METHODS, FoldPlan, Method, Theta, least, plan_fold, shares, swapped
from .texts import ANSWER, completed, part_of

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from ..models import Model

log = logging.getLogger("workbench")
TOLD = 64
"""prompts on which the harm of `identity` is measured"""


@dataclass(frozen=True, eq=False)
class Folded:
    """A folded model beside what it was made of."""

    model: Model
    plan: FoldPlan
    channels: tuple[Channels, ...] = field(repr=False)
    r2: tuple[float | None, ...] = ()
    """of each network's refit, on batches that it was not fitted on; None where there was none"""
    rise: Interval | None = None
    """of the loss, in nats per token; measured for `identity` alone, to warn of it"""

    def frame(self) -> pd.DataFrame:
        """One line a layer: idle channels, their share of the scores, and how well the refit predicts their sum."""
        import pandas as pd

        lines = []
        for layer, (found, idle) in enumerate(zip(self.channels, self.plan.idle, strict=True)):
            total = float(found.score.sum())
            lines.append({
                "layer": layer, "channels": len(found.score), "idle": len(idle), "theta": self.plan.theta[layer],
                "score_share": float(found.score[idle].sum()) / total if total else 0.0, "r2": self.r2[layer],
            })  # fmt: skip
        return pd.DataFrame(lines)

    def _repr_html_(self) -> str:
        return str(self.frame().to_html(index=False, float_format="{:.4g}".format, na_rep="–"))

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Writes the model as a folder that `workbench.load` opens; see `architecture.save_folded`."""
        save_folded(self.model, folder, overwrite=overwrite, name=self.model.name, ratio=self.plan.ratio)


def ffns_of(model: Model) -> list[FFN]:
    """The feed-forward networks of a language model; UserError where they cannot be folded, and why."""
    if model.backend.name != "hooks":
        raise UserError(f"folding rewrites a plain model; this one was loaded with backend={model.backend.name!r}: load it "
                        "with backend='hooks'")  # fmt: skip
    import torch

    from ..anatomy.anatomy import probe_ids

    ids = probe_ids(model.module)
    blocks = [model.block(layer) for layer in range(model.n_layers)]
    return find_ffns(model.module, blocks, lambda: model.run(ids, torch.ones_like(ids)), model.name)


def fold_model(
    model: Model,
    prompts: Any,
    *,
    theta: Theta = 0.5,
    method: Method = "refit",
    alpha: Any = "cv",
    answers: int = ANSWER,
    max_length: int | None = None,
) -> Folded:
    """Folds the least nonlinear channels of each feed-forward network of a model into one d x d map.

    The norm before a network and the shortcut around it stay: what each token is divided by cannot go into a matrix.

    Args:
        prompts: what `PromptSet.load` reads, or `Sequences`; the channels and the refit are calibrated on them.
        theta: share of channels that are idle, from 0 to less than 1; one number or one for each layer.
        method: what takes the place of idle channels; `refit` (a ridge map from the network's input to what they add),
            `affine`, `mean`, or `identity`, which ruins a trained model and says so. Gated networks: refit, mean.
        alpha: of the ridge: cv, gcv, or a number in mean diagonals of X'X.
        answers: tokens of the model's own answers that chats are completed with; see `completed`.

    Raises:
        UserError: theta outside of [0, 1), a mixture of experts, a method that a gated network does not have.

    >>> folded = fold_model(load("bundled:recipient"), "bundled:profile", theta=0.5)   # doctest: +SKIP
    >>> folded.save("runs/folded"); workbench.load("runs/folded").generate(["What is 2 + 2?"])   # doctest: +SKIP
    """
    from ..models import Model

    share = shares(theta, model.n_layers)
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}; allowed: {', '.join(METHODS)}")
    ffns = ffns_of(model)
    given = isinstance(prompts, Sequences)
    sequences = prompts if given else completed(model, prompts, answers=answers, max_length=max_length)
    batches = text_batches(model, sequences.ids)
    channels = calibrate(model.module, ffns, batches)
    plan, r2 = planned(model.module, ffns, channels, share, method, batches, alpha)
    rise = None
    if method == "identity":
        rise = _rise(model, plan, sequences)
        log.warning("%s: loss %+.2f nats per token [%.2f, %.2f]", CATASTROPHE, rise.value, rise.low, rise.high)
    folded = Model(fold_module(model.module, plan), model.tokenizer, model.name, blocks=model.blocks_path)
    return Folded(folded, plan, channels, r2, rise)


def planned(
    module: nn.Module, ffns: list[FFN], channels: tuple[Channels, ...], theta: Theta, method: Method,
    batches: list[Batch], alpha: Any = "cv",
) -> tuple[FoldPlan, tuple[float | None, ...]]:  # fmt: skip
    """The plan of one method for the least channels, and the held-out R2 of each refit; of any model whose batches run."""
    idle = least(channels, theta)
    if method != "refit":
        return plan_fold(module, ffns, channels, idle, method), (None,) * len(ffns)
    fits = refit_maps(module, ffns, {"least": idle}, batches, alpha=alpha)["least"]
    r2 = tuple(max(score for _, score in fit.cv) if fit and fit.cv else None for fit in fits)
    return plan_fold(module, ffns, channels, idle, method, fits), r2


def _rise(model: Model, plan: FoldPlan, sequences: Sequences) -> Interval:
    """What a plan adds to the loss on the first prompts."""
    part = part_of(sequences, list(range(min(TOLD, len(sequences)))))
    modules = plan.modules(model.module)
    found = score(model, part, {"folded": lambda *_: swapped(model.module, modules)})
    return ratio_interval(found["folded"].loss - found["untouched"].loss, part.predicted)
