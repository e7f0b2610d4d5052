"""What a transport operator is worth to the model itself: its prediction put in the place of the true state.

In one forward pass the state at the source is captured and, at chosen positions, what a map makes of it is written at the
target; the loss, KL and agreement of the next-token predictions say how much was lost. Source: arXiv:2508.17540; there
`ablation` is the operator's bias, here that arm is called `bias` and the mean of the targets has an arm of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .. import tokens
from ..errors import UserError
from ..maps.linear_map import LinearMap
from ..models import Model
from ..rendering import special_ids
from ..sites import Site, depth
from ..tokens import WITH_SPECIAL, check_tokens
from .scoring import Run, Scores, Sequences, ratio_interval, score
from .statistics import Interval

if TYPE_CHECKING:
    import pandas as pd

UNTOUCHED = "untouched"
EVERYWHERE = "all" + WITH_SPECIAL
Arm = Callable[[Float[Tensor, "m d_in"], Float[Tensor, "m d"]], Float[Tensor, "m d"]]
"""What is written: from the rows at the source and those at the target, new rows for the target."""


@dataclass(frozen=True, eq=False)
class Effect:
    """One arm, over the predicted tokens of all sequences, with 95 % intervals over sequences."""

    log_perplexity: Interval
    delta: Interval
    """log-perplexity less that of the untouched model on the same sequences (paired)"""
    kl: Interval
    """KL(untouched || arm) per token, in nats"""
    agreement: Interval
    """share of tokens where the most likely next token is the untouched model's"""


@dataclass(frozen=True, eq=False)
class CausalResult:
    """Every arm on the same sequences; `scores` holds the sums of each sequence."""

    source: Site
    target: Site
    positions: str
    """the positions that were replaced; special tokens (BOS among them) only where it ends in +special or lists them"""
    n_sequences: int
    n_tokens: int
    """predicted tokens"""
    n_replaced: int
    """rows that an arm wrote"""
    left_out: int
    """sequences of fewer than two tokens"""
    predicted: Float[Tensor, " n"] = field(repr=False)
    scores: Mapping[str, Scores] = field(repr=False)

    @property
    def arms(self) -> dict[str, Effect]:
        """The effect of each arm by name, `untouched` first."""
        plain, n = self.scores[UNTOUCHED], self.predicted
        return {
            name: Effect(*(ratio_interval(sums, n) for sums in (s.loss, s.loss - plain.loss, s.kl, s.agree)))
            for name, s in self.scores.items()
        }

    def difference(self, a: str, b: str) -> Interval:
        """Log-perplexity of arm a less that of arm b, paired over sequences."""
        for name in (a, b):
            if name not in self.scores:
                raise UserError(f"there is no arm {name!r}; allowed: {', '.join(self.scores)}")
        return ratio_interval(self.scores[a].loss - self.scores[b].loss, self.predicted)

    def frame(self) -> pd.DataFrame:
        """One line per arm: each figure with its interval."""
        import pandas as pd

        lines = []
        for name, effect in self.arms.items():
            line: dict[str, Any] = {"arm": name}
            for key in ("log_perplexity", "delta", "kl", "agreement"):
                found: Interval = getattr(effect, key)
                line |= {key: found.value, f"{key}_low": found.low, f"{key}_high": found.high}
            lines.append(line)
        return pd.DataFrame(lines).set_index("arm")


def causal_effects(
    model: Model,
    prompts: Any,
    source: Site | str | int,
    target: Site | str | int,
    operators: LinearMap | Mapping[str, LinearMap],
    *,
    mean: Float[Tensor, " d"] | None = None,
    direction: Float[Tensor, " d"] | None = None,
    positions: str | Sequence[int] = "all",
    arms: Mapping[str, Arm] | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
) -> CausalResult:
    """Writes each arm's rows at `target` and measures what the model then predicts.

    Arms: `untouched`; `transported`, or the operators by their names; `identity` (the source's own state; where widths
    agree); `mean`, where the mean of the target over training rows is given; `bias` (the first operator at the zero
    vector) and `zero`; with `direction`, `feature`: the first operator's prediction in that one direction of the target,
    the rest of the state left as it is. `arms` adds others, functions of (rows at source, rows at target).

    Args:
        prompts: a PromptSet or what it loads; every token but the first of each sequence is predicted.
        positions: `all`, `last`, `first:n`, `last:n`, `every:n` (see `tokens.choose`: special tokens are left out of all
            but `last`, and so is position 0, unless `+special` is appended, as in "all+special"), or a list of positions,
            each taken whatever its token.
        batch_size: sequences in one pass; the result depends on it by float noise only.

    Raises UserError for sites, widths or positions that do not fit, and for a source that comes after its target, within a
    block too.
    """
    source, target = model.site(source), model.site(target)
    if depth(source) > depth(target):
        raise UserError(f"{source} is not before {target}; the source of a transport comes first")
    named = {"transported": operators} if isinstance(operators, LinearMap) else dict(operators)
    every = _arms(model, source, target, named, mean, direction)
    clash = sorted(set(arms or {}) & set(every))
    if clash:
        raise UserError(f"there is an arm called {clash[0]!r} already; give yours another name")
    every |= arms or {}
    sequences = Sequences.of(model, prompts, max_length)
    chosen = choose(model, sequences, positions)
    count = sum(map(len, chosen))
    if not count:
        raise UserError(f"positions {positions!r} name no token of these sequences (longest: "
                        f"{max(map(len, sequences.ids))} tokens); choose others")  # fmt: skip
    runs = {name: run_arm(model, source, target, arm, chosen) for name, arm in every.items()}
    scores = score(model, sequences, runs, batch_size=batch_size)
    said = positions if isinstance(positions, str) else ",".join(map(str, positions))
    total = int(sequences.predicted.sum())
    return CausalResult(
        source, target, said, len(sequences), total, count, sequences.left_out, sequences.predicted, scores
    )


def _arms(
    model: Model, source: Site, target: Site, operators: Mapping[str, LinearMap], mean: Tensor | None,
    direction: Tensor | None,
) -> dict[str, Arm]:  # fmt: skip
    d_in, d_out = model.width_of(source), model.width_of(target)
    if not operators:
        raise UserError("no operator given; give one, or several by name")
    for name, operator in operators.items():
        if (operator.d_in, operator.d_out) != (d_in, d_out):
            raise UserError(f"operator {name!r} maps width {operator.d_in} to {operator.d_out}; from {source} to {target} "
                            f"of {model.name} it must map {d_in} to {d_out}")  # fmt: skip
    for name, vector in (("mean", mean), ("direction", direction)):
        if vector is not None and tuple(vector.shape) != (d_out,):
            raise UserError(f"{name} must be a vector of width {d_out}; got shape {list(vector.shape)}")
    first = next(iter(operators.values()))
    made: dict[str, Arm] = {name: transport(operator, model) for name, operator in operators.items()}
    if d_in == d_out:
        made["identity"] = lambda x, h: x.to(h)
    if mean is not None:
        made["mean"] = constant(mean)
    made |= {"bias": constant(first.bias), "zero": constant(torch.zeros(d_out))}
    if direction is not None:
        made["feature"] = along(transport(first, model), direction)
    return made


def transport(operator: LinearMap, model: Model) -> Arm:
    """An operator as an arm: moved to the model's device and dtype once."""
    moved = operator.to(model.device, model.dtype)
    return lambda x, h: moved(x).to(h)


def constant(vector: Float[Tensor, " d"]) -> Arm:
    """The same row everywhere."""
    return lambda x, h: vector.to(h).expand_as(h)


def along(arm: Arm, direction: Float[Tensor, " d"]) -> Arm:
    """An arm in one direction alone: h + ((arm(x, h) - h) . u) u, u the direction at length 1.

    >>> arm = along(constant(torch.tensor([5.0, 5.0])), torch.tensor([2.0, 0.0]))
    >>> arm(torch.zeros(1, 2), torch.tensor([[1.0, 1.0]])).tolist()
    [[5.0, 1.0]]
    """
    length = float(direction.double().norm())
    if not length > 0:
        raise UserError("a direction needs a length above 0; this one is zero or not a number")
    unit = direction / length

    def edit(x: Tensor, h: Tensor) -> Tensor:
        u = unit.to(h)
        return h + ((arm(x, h) - h) @ u)[:, None] * u

    return edit


def choose(model: Model, sequences: Sequences, positions: str | Sequence[int]) -> list[list[int]]:
    """The positions of each sequence that are replaced; see `causal_effects`."""
    if isinstance(positions, str):
        check_tokens(positions)
        special = special_ids(model.tokenizer)
        first = 0 if positions.endswith("+special") else 1  # where a model without a BOS keeps its massive activation
        found = [tokens.choose(positions, *origin, special) for origin in sequences.origin]
        return [[p for p in kept if first <= p < len(row)] for kept, row in zip(found, sequences.ids, strict=True)]
    wanted = sorted(set(positions))
    if not wanted or wanted[0] < 0:
        raise UserError(f"positions must be token positions from 0 on; got {list(positions)}")
    return [[p for p in wanted if p < len(row)] for row in sequences.ids]


def run_arm(model: Model, source: Site, target: Site, arm: Arm, chosen: Sequence[Sequence[int]]) -> Run:
    def run(ids: Tensor, _mask: Tensor, rows: list[int]) -> Any:
        keep = torch.zeros(ids.shape, dtype=torch.bool)
        for line, i in enumerate(rows):
            keep[line, list(chosen[i])] = True
        return replaced(model, source, target, arm, keep)

    return run


@contextmanager
def replaced(model: Model, source: Site, target: Site, arm: Arm, keep: Bool[Tensor, "b t"]) -> Iterator[None]:
    """Inside the block, each forward pass of a [b, t] batch has its rows at `target` replaced where `keep` is true."""
    one_place = depth(source) == depth(target)  # what goes into a block is what came out of the one before it
    held: dict[str, Tensor] = {}
    masks: dict[torch.device, Tensor] = {}

    def mask_on(device: torch.device) -> Tensor:
        if device not in masks:
            masks[device] = keep.to(device)
        return masks[device]

    def capture(h: Tensor, _: Any) -> Tensor:
        held["x"] = h[mask_on(h.device)]
        return h

    def write(h: Tensor, _: Any) -> Tensor:
        at = mask_on(h.device)
        if not bool(keep.any()):
            return h
        rows = h[at]
        x = rows if one_place else held.pop("x").to(h.device)
        out = h.clone()
        out[at] = arm(x, rows).to(h)
        return out

    edits = {target: write} if one_place else {source: capture, target: write}
    with model.edit(edits):
        yield
