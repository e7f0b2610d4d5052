"""The states at a lens's sites over many prompts, a batch at a time: what lenses are fitted on and scored with."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import UserError
from workbench.evaluate.scoring import Sequences
from workbench.hashes import json_hash
from workbench.models import Model
from workbench.prompts import PromptSet
from workbench.rendering import pad
from workbench.sites import Site

BATCH_TOKENS = 2048
POOL = 512
"""prompts among which those of a batch are drawn"""


@dataclass(frozen=True, eq=False)
class Rows:
    """The states of n tokens: {site: [n, d]}, on the model's device in its dtype, and which prompt each is of."""

    states: dict[Site, Float[Tensor, "n _d"]]
    prompt: Int[Tensor, " n"]


def iter_rows(
    model: Model, sequences: Sequences, sites: Sequence[Site], batches: Iterable[Sequence[int]]
) -> Iterator[Rows]:
    """Runs the model over batches of prompts; a BOS at the front is left out: its state is like no other's."""
    bos = model.tokenizer.bos_token_id
    for batch in batches:
        ids, mask = pad([sequences.ids[i] for i in batch], model.pad_id, "right")
        kept = mask.bool()
        kept[:, 0] &= ids[:, 0] != (-1 if bos is None else bos)
        with torch.no_grad(), model.read(sites, lambda _, h, kept=kept: h[kept.to(h.device)]) as found:
            model.run(ids, mask)
        yield Rows(dict(found), torch.tensor(batch)[:, None].expand(kept.shape)[kept])


def batches_of(
    sequences: Sequences, among: Sequence[int], tokens: int = BATCH_TOKENS, *, draw: random.Random | None = None
) -> list[list[int]]:
    """Prompts of like length in batches of at most so many tokens, padding included (one prompt may be longer).

    draw: draws which prompts meet, among a few hundred at a time, and the order of the batches.
    """
    order = list(among)
    if draw is not None:
        draw.shuffle(order)
    found: list[list[int]] = []
    for start in range(0, len(order), POOL) if draw is not None else (0,):
        pool = sorted(order[start : start + POOL] if draw is not None else order, key=lambda i: len(sequences.ids[i]))
        batch: list[int] = []
        for i in pool:
            if batch and len(sequences.ids[i]) * (len(batch) + 1) > tokens:
                found.append(batch)
                batch = []
            batch.append(i)
        found.append(batch)
    if draw is not None:
        draw.shuffle(found)
    return [batch for batch in found if batch]


def split_prompts(prompts: PromptSet, sequences: Sequences, shares: Sequence[float], seed: int) -> list[list[int]]:
    """Deals the prompts of `sequences` into parts of these shares; what says the same never lies in two of them.

    Raises UserError where a part would have fewer than two different prompts.
    """
    groups: dict[str, list[int]] = {}
    for i, (_, prompt, _) in enumerate(sequences.origin):
        groups.setdefault(json_hash(prompt.content), []).append(i)
    keys = sorted(groups)
    random.Random(seed).shuffle(keys)
    ends = [round(len(keys) * sum(shares[: k + 1])) for k in range(len(shares))]
    parts = [keys[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    if min(map(len, parts)) < 2:
        said = ", ".join(f"{share:g}" for share in shares)
        raise UserError(
            f"{prompts.name}: {len(keys)} different prompts do not make parts of {said} with two each; give more"
        )
    return [sorted(i for key in part for i in groups[key]) for part in parts]
