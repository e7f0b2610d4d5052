"""One batch at a time: what a model, or a replica of it, does of an evaluation; and the results of all batches in their places.

A batch that does not fit the memory is done in halves, by whoever runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.blend import Blend
from ..adapters.demonstrations import answer_log_probs
from ..errors import UserError
from ..memory import parts_that_fit
from ..models import Model
from ..progress import progress
from ..prompts import pad
from ..replicas import run_batches


def gathered(
    model: Model, task: str, items: Sequence[Any], batches: Sequence[list[int]],
    adapters: Sequence[Adapter | Blend | None], desc: str, **common: Any,
) -> Tensor:  # fmt: skip
    """The results [b, ...] of a task of this module on every batch of items under each adapter, [k, n, ...], float64."""
    pieces = [(k, [items[i] for i in rows]) for k in range(len(adapters)) for rows in batches]
    found: NDArray[np.float64] | None = None
    with progress(total=len(items) * len(adapters), desc=desc, unit="prompt") as bar:
        for number, result in run_batches(model, f"{__name__}:{task}", pieces, adapters, **common):
            if found is None:
                found = np.empty((len(adapters), len(items), *result.shape[1:]))
            rows = batches[number % len(batches)]
            found[number // len(batches), rows] = result
            bar.update(len(rows))
    return torch.from_numpy(np.empty((len(adapters), len(items))) if found is None else found)


def log_odds_batch(
    model: Model, batch: list[list[int]], adapter: Adapter | Blend | None, tokens: Sequence[int]
) -> Float[np.ndarray, " b"]:
    """The log-odds of one batch of encoded prompts."""

    def run(part: Sequence[list[int]]) -> Tensor:
        ids, mask = pad(list(part), model.pad_id, "left")
        with torch.inference_mode(), adapter.on(model) if adapter is not None else nullcontext():
            return set_log_odds(model.logits(ids, mask, last_only=True)[:, -1], tokens).cpu()

    return torch.cat(parts_that_fit(batch, run)).numpy()


def log_likelihood_batch(
    model: Model, batch: list[tuple[list[int], list[int]]], adapter: Adapter | Blend | None
) -> Float[np.ndarray, " b"]:
    """The log-likelihoods of one batch of (prompt, answer)."""

    def run(part: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        lengths = torch.tensor([len(p) for p, _ in part])
        with (
            torch.inference_mode(),
            adapter.on(model, prompt_lengths=lengths) if adapter is not None else nullcontext(),
        ):
            return answer_log_probs(model, list(part)).double().cpu()

    return torch.cat(parts_that_fit(batch, run)).numpy()


def shift_batch(
    model: Model, batch: list[tuple[list[int], int]], adapter: Adapter | Blend | None
) -> Float[np.ndarray, "b 4"]:
    """Sums over the continuation of each text: KL, loss of the plain and of the edited model, and how many tokens.

    batch: the ids of each text, and how many of them come before its continuation.
    """
    return torch.cat(parts_that_fit(batch, lambda part: _shift_part(model, part, adapter), "texts")).numpy()


@torch.inference_mode()
def _shift_part(
    model: Model, batch: Sequence[tuple[list[int], int]], adapter: Adapter | Blend | None
) -> Float[Tensor, "b 4"]:
    ids, mask = pad([row for row, _ in batch], model.pad_id, "right")
    plain = model.logits(ids, mask)
    edited = plain
    if adapter is not None:
        with adapter.on(model, prompt_lengths=torch.tensor([cut for _, cut in batch])):
            edited = model.logits(ids, mask)
    parts = zip(plain, edited, batch, strict=True)
    return torch.stack([_shift(p, q, torch.tensor(row), cut) for p, q, (row, cut) in parts])


def _shift(
    plain: Float[Tensor, "t v"], edited: Float[Tensor, "t v"], ids: Int[Tensor, " n"], cut: int
) -> Float[Tensor, " 4"]:
    """One text's sums. Logits at i predict token i + 1: those at cut - 1 to n - 2 predict the continuation."""
    at = slice(cut - 1, len(ids) - 1)
    p, q = plain[at].float().log_softmax(-1), edited[at].float().log_softmax(-1)
    target = ids[cut:, None].to(p.device)
    # the sum over the vocabulary in float64: where p and q are close, float32 would leave rounding of either sign
    kl = (p.double().exp() * (p.double() - q.double())).sum()
    losses = [-x.gather(1, target).double().sum() for x in (p, q)]
    return torch.stack([kl, *losses, kl.new_tensor(len(target))]).cpu()


def set_log_odds(logits: Float[Tensor, "b v"], tokens: Sequence[int]) -> Float[Tensor, " b"]:
    """log p(S) - log(1 - p(S)) of a set of token ids S, float64.

    >>> set_log_odds(torch.zeros(1, 4), [0]).exp().item()  # 1/4 against 3/4
    0.3333333333333333
    """
    inside = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    inside[list(tokens)] = True
    n, size = int(inside.sum()), len(inside)
    if not 0 < n < size:
        raise UserError(f"log-odds need some but not all tokens of the vocabulary; got {n} of {size}")
    logits = logits.double()
    return logits[:, inside].logsumexp(-1) - logits[:, ~inside].logsumexp(-1)
