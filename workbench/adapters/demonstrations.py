"""What an adapter is trained on: prompts with the answers that they should get, as tokens, in batches."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..backends.torch_hooks import tokens_needed
from ..errors import UserError
from ..prompts import PromptSet, pad, response_ids

if TYPE_CHECKING:
    from ..models import Model
    from .adapter import Adapter
    from .blend import Blend

Sample = tuple[list[int], list[int]]
"""the ids of a prompt and of its answer"""


def encode_demonstrations(model: Model, demonstrations: PromptSet, positions: str = "all") -> list[Sample]:
    """Raises UserError for a demonstration without a response, one that is too long for the model, and one whose prompt
    has fewer tokens than `positions` name."""
    pairs = []
    for prompt in demonstrations:
        response = prompt.meta.get("response")
        if not response:
            raise UserError(f"demonstration {prompt.id!r} has no response; each line needs a 'response' to learn from")
        ids, answer = response_ids(prompt, str(response), model.tokenizer)
        if len(ids) + len(answer) > model.max_length:
            raise UserError(f"demonstration {prompt.id!r} has {len(ids) + len(answer)} tokens and the model reads "
                            f"{model.max_length}; shorten it or leave it out")  # fmt: skip
        pairs.append((ids, answer))
    check_lengths(demonstrations, [len(ids) for ids, _ in pairs], positions)
    return pairs


def check_lengths(prompts: PromptSet, lengths: Sequence[int], positions: str) -> None:
    """Raises UserError for a prompt that has fewer tokens than `positions` name, such as first:8."""
    needed = tokens_needed(positions)
    for prompt, length in zip(prompts, lengths, strict=True):
        if length < needed:
            raise UserError(f"prompt {prompt.id!r} has {length} tokens, too few for positions {positions!r}, which name "
                            f"{needed}; choose other positions or leave it out")  # fmt: skip


def check_positions(adapter: Adapter | Blend | None, prompts: PromptSet, encoded: Sequence[Sequence[int]]) -> None:
    """`check_lengths` for all that an adapter edits; encoded: the ids of each prompt."""
    acting = [] if adapter is None else [term.positions for term in adapter.split() if term.strength != 0]
    for positions in sorted(set(acting)):
        check_lengths(prompts, [len(ids) for ids in encoded], positions)


def held_out(demonstrations: PromptSet, validation: Any, seed: int) -> tuple[PromptSet, PromptSet | None]:
    """(demonstrations to learn from, those to validate on), of a set to validate on or the share that is to be held out.

    Raises UserError for a share that is not between 0 and 1, or that leaves nothing on one side.
    """
    if not isinstance(validation, (int, float)):
        return demonstrations, PromptSet.load(validation)
    if not 0 <= validation < 1:
        raise UserError(
            f"validation {validation} is no share of the demonstrations; give a number from 0 up to 1, or a set"
        )
    if not validation:
        return demonstrations, None
    n = len(demonstrations)
    count = max(1, round(validation * n))
    if count >= n:
        raise UserError(f"{n} demonstrations are too few to hold a share of {validation} out of them; give more")
    order = random.Random(seed).sample(range(n), n)
    return demonstrations.subset(sorted(order[count:])), demonstrations.subset(sorted(order[:count]))


def batches(pairs: list[Sample], size: int, seed: int) -> Iterator[list[Sample]]:
    """Endless batches; samples of like length go together, their order is drawn with the seed."""
    rng = random.Random(seed)
    while True:
        order = list(range(len(pairs)))
        rng.shuffle(order)
        for start in range(0, len(order), size * 8):
            pool = sorted(order[start : start + size * 8], key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
            groups = [pool[i : i + size] for i in range(0, len(pool), size)]
            rng.shuffle(groups)
            yield from ([pairs[i] for i in group] for group in groups)


def in_order(pairs: Sequence[Sample], size: int) -> list[list[Sample]]:
    """Every sample once, those of like length together."""
    ordered = sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def answer_loss(model: Model, batch: list[Sample]) -> Tensor:
    """Mean cross-entropy of the answers, in nats per token (right-padded: every prompt starts at 0)."""
    logits, labels = _answers(model, batch)
    return cross_entropy(logits.flatten(0, 1), labels.flatten())


def answer_log_probs(model: Model, batch: list[Sample]) -> Float[Tensor, " b"]:
    """log p(answer | prompt) of each sample, summed over the tokens of its answer, in nats."""
    logits, labels = _answers(model, batch)
    return -cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)


def _answers(model: Model, batch: list[Sample]) -> tuple[Tensor, Tensor]:
    """The logits [b, t, v] in float32 and the tokens [b, t] that they predict; -100 where that is none of an answer."""
    ids, mask = pad([p + a for p, a in batch], model.pad_id, "right")
    labels = torch.full_like(ids, -100)
    for row, (p, a) in enumerate(batch):
        labels[row, len(p) : len(p) + len(a)] = torch.tensor(a)
    logits = model.logits(ids, mask)[:, :-1].float()
    return logits, labels[:, 1:].to(logits.device)
