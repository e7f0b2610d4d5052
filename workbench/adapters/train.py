"""Trains a residual adapter on a frozen model: NoDiReFT, LoReFT or a vector, at the last prompt token or elsewhere."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..backends import torch_hooks
from ..errors import UserError
from ..progress import progress
from ..prompts import PromptSet, pad, response_ids
from ..sites import Site
from .adapter import Adapter, LowRank

if TYPE_CHECKING:
    from ..backends.torch_hooks import Where
    from ..models import Model

KINDS = ("nodireft", "loreft", "vector")


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained adapter and how it came to be: the curve holds (step, loss, size of the delta in spreads)."""

    adapter: Adapter
    curve: tuple[tuple[int, float, float], ...]
    seconds: float
    flops: float
    steps: int


class _Part(nn.Module):
    """The parameters of one site; `low_rank` gives them in the one form that every adapter has."""

    def __init__(self, kind: str, width: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        q = torch.linalg.qr(torch.randn(width, rank, generator=generator)).Q
        self.kind = kind
        self.read = nn.Parameter(q.clone() if kind == "loreft" else q / width**0.5)
        self.bias = nn.Parameter(torch.zeros(rank))
        self.write = nn.Parameter(q.T.clone() if kind == "loreft" else torch.zeros(rank, width))

    def low_rank(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.kind == "loreft":  # delta = (h W' + b - h R) R', R with orthonormal columns
            rotation = torch.linalg.qr(self.write.T).Q
            return self.read - rotation, self.bias, rotation.T
        if self.kind == "vector":
            return torch.zeros_like(self.read), torch.ones_like(self.bias), self.write
        return self.read, self.bias, self.write

    def frozen(self) -> LowRank:
        v, b, u = (t.detach().cpu().clone().contiguous() for t in self.low_rank())
        return LowRank(v, b, u)

    def delta(self, h: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        v, b, u = self.low_rank()
        return ((h.float() @ v + b) @ u).to(h.dtype)


def spread(states: Float[Tensor, "n d"]) -> float:
    """The spread of a profile at a site: the root of the mean squared distance to its mean."""
    return float((states.float() - states.float().mean(0)).square().sum(1).mean().sqrt())


@contextmanager
def frozen(model: Model) -> Iterator[None]:
    """No parameter of the model asks for a gradient inside the block."""
    was = [(p, p.requires_grad) for p in model.module.parameters()]
    try:
        for p, _ in was:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in was:
            p.requires_grad_(flag)


def _encode(model: Model, demonstrations: PromptSet) -> list[tuple[list[int], list[int]]]:
    pairs = []
    for prompt in demonstrations:
        response = prompt.meta.get("response")
        if not response:
            raise UserError(f"demonstration {prompt.id!r} has no response; each line needs a 'response' to learn from")
        pairs.append(response_ids(prompt, str(response), model.tokenizer))
    return pairs


def _batches(
    pairs: list[tuple[list[int], list[int]]], size: int, seed: int
) -> Iterator[list[tuple[list[int], list[int]]]]:
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


def _loss(model: Model, batch: list[tuple[list[int], list[int]]]) -> Tensor:
    """Mean cross-entropy of the answers, in nats per token (right-padded: every prompt starts at 0)."""
    ids, mask = pad([p + a for p, a in batch], model.pad_id, "right")
    labels = torch.full_like(ids, -100)
    for row, (p, a) in enumerate(batch):
        labels[row, len(p) : len(p) + len(a)] = torch.tensor(a)
    logits = model.logits(ids, mask)[:, :-1].float()
    return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten().to(logits.device))


def train_adapter(
    model: Model,
    demonstrations: Any,
    sites: Sequence[Site | int | str] | Site | int | str,
    *,
    kind: str = "nodireft",
    rank: int = 4,
    positions: str = "last",
    steps: int = 150,
    batch_size: int = 32,
    learning_rate: float = 5e-3,
    spreads: Sequence[float] | None = None,
    max_size: float = 0.4,
    size_weight: float = 10.0,
    seed: int = 0,
    name: str = "",
) -> Trained:
    """Trains an adapter on demonstrations (prompts with a `response`), the model itself frozen.

    kind: `nodireft` (delta = (h V + b) U), `loreft` (arXiv:2404.03592, R orthonormal), `vector` (a constant).
    spreads: the spread of the profile at each site (see `spread`); with it, deltas longer than `max_size` spreads cost
    `size_weight` times the squared excess. An adapter trained without restraint writes far outside of what the profile
    saw, and its paste does anything but what it should. Raises UserError for unknown kinds and sites, and for
    demonstrations without a response. The result does not depend on anything but the arguments.
    """
    if kind not in KINDS:
        raise UserError(f"unknown adapter kind {kind!r}; allowed: {', '.join(KINDS)}")
    listed = [sites] if isinstance(sites, (Site, int, str)) else list(sites)
    where = [model.site(s) for s in listed]
    if spreads is not None and len(spreads) != len(where):
        raise UserError(f"{len(spreads)} spreads were given for {len(where)} sites; give one a site")
    if not 0 < rank <= model.width:
        raise UserError(f"rank {rank} is not between 1 and the width {model.width}")
    torch_hooks.check_policy(positions)
    pairs = _encode(model, PromptSet.load(demonstrations))
    if not pairs:
        raise UserError("there are no demonstrations to train on; give prompts with a 'response' each")
    generator = torch.Generator().manual_seed(seed)
    parts = {s: _Part(kind, model.width, 1 if kind == "vector" else rank, generator).to(model.device) for s in where}
    limits = dict(zip(where, spreads or [float("inf")] * len(where), strict=True))
    optimizer = torch.optim.Adam([p for part in parts.values() for p in part.parameters()], lr=learning_rate)
    warm = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warm, max(1e-3, 1 - i / steps)))
    sizes: list[Tensor] = []

    def edit(site: Site) -> torch_hooks.Edit:
        def run(h: Tensor, at: Where) -> Tensor:
            keep = at.mask(positions)
            delta = parts[site].delta(h) * keep[..., None]
            sizes.append((delta.float().square().sum(-1)[keep] + 1e-12).sqrt() / limits[site])
            return h + delta

        return run

    curve, tokens, start = [], 0, time.perf_counter()
    stream = _batches(pairs, batch_size, seed)
    with frozen(model):
        for step in progress(range(steps), desc=f"training {name or kind}", unit="step"):
            batch = next(stream)
            sizes.clear()
            # the lengths are given: a batch of prompts with answers is not a prompt to its end
            with torch_hooks.edit(model, {s: edit(s) for s in where}, prompt_lengths=[len(p) for p, _ in batch]):
                loss = _loss(model, batch)
            size = torch.cat([s.flatten() for s in sizes])
            excess = (size - max_size).clamp(min=0).square().mean()
            (loss + size_weight * excess).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            tokens += sum(len(p) + len(a) for p, a in batch)
            if step % 10 == 0 or step == steps - 1:
                curve.append((step, loss.item(), size.mean().item()))
    done = {s: part.frozen() for s, part in parts.items()}
    adapter = Adapter(done, positions=positions, name=name, base=model.fingerprint, meta={"kind": kind, "seed": seed})
    # forward 2 N and backward 2 N per token: gradients of activations only, the weights are frozen
    return Trained(adapter, tuple(curve), time.perf_counter() - start, 4.0 * model.parameters * tokens, steps)
