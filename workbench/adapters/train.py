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
    from ..store import Store

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
    """The parameters of one site, in units of the profile: states are centred and each coordinate is about 1.

    A learning rate then means the same on a residual stream of norm 1 and of norm 1,000. `low_rank` gives the
    parameters in the units of the model: delta(h) = (h @ V + b) @ U.
    """

    def __init__(self, kind: str, scale: Scale, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        width = len(scale.mean)
        q = torch.linalg.qr(torch.randn(width, rank, generator=generator)).Q
        self.kind, self.scale = kind, scale
        self.read = nn.Parameter(q.clone())
        self.bias = nn.Parameter(torch.zeros(rank))
        self.write = nn.Parameter(q.T.clone() if kind == "loreft" else torch.zeros(rank, width))
        self.register_buffer("mean", scale.mean)
        self.unit = scale.spread / width**0.5  # of one coordinate

    def low_rank(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.kind == "loreft":  # delta = (h W' + b - h R) R', R with orthonormal columns
            rotation = torch.linalg.qr(self.write.T).Q
            v, u = self.read - rotation, rotation.T
            return v, self.bias * self.unit - self.mean @ v, u
        if self.kind == "vector":
            return torch.zeros_like(self.read), torch.ones_like(self.bias), self.write * self.unit
        v = self.read / self.unit
        return v, self.bias - self.mean @ v, self.write * self.unit

    def frozen(self) -> LowRank:
        v, b, u = (t.detach().cpu().clone().contiguous() for t in self.low_rank())
        return LowRank(v, b, u)

    def delta(self, h: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        v, b, u = (t.to(h.device) for t in self.low_rank())  # a spread model's block may lie elsewhere
        return ((h.float() @ v + b) @ u).to(h.dtype)


@dataclass(frozen=True, eq=False)
class Scale:
    """The mean of a profile at a site [d], and its spread: the root of the mean squared distance to the mean."""

    mean: Float[Tensor, " d"]
    spread: float

    @classmethod
    def of(cls, states: Float[Tensor, "n d"]) -> Scale:
        """Raises UserError for fewer than two rows, or rows that are all the same."""
        mean = states.float().mean(0)
        found = float((states.float() - mean).square().sum(1).mean().sqrt())
        if not found > 0:
            raise UserError("the profile at a site does not vary; profile at least two prompts that differ")
        return cls(mean, found)


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
        ids, answer = response_ids(prompt, str(response), model.tokenizer)
        if len(ids) + len(answer) > model.max_length:
            raise UserError(f"demonstration {prompt.id!r} has {len(ids) + len(answer)} tokens and the model reads "
                            f"{model.max_length}; shorten it or leave it out")  # fmt: skip
        pairs.append((ids, answer))
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


def default_layer(model: Model) -> int:
    """Two thirds of the depth: late enough that what decides a behaviour is there, early enough to be acted on."""
    return 2 * model.n_layers // 3


def _scales(model: Model, prompts: PromptSet, sites: Sequence[Site], profile: Store | None) -> dict[Site, Scale]:
    from ..profile import profile_model

    if profile is not None and profile.fingerprint["weights"] != model.fingerprint["weights"]:
        raise UserError(f"the profile is of {profile.fingerprint['name']}, not of {model.name}; profile this model")
    store = profile or profile_model(model, prompts, sites=sites)
    return {s: Scale.of(store.read(s, dtype=torch.float32)) for s in sites}


def _flops(model: Model, sites: Sequence[Site]) -> float:
    """FLOPs per token: 2 a parameter forward, 2 a parameter above the first edited site backward (weights are frozen,
    so there are gradients of activations only). The LM head counts, the look-up of embeddings does not."""
    blocks = [sum(p.numel() for p in model.block(l).parameters()) for l in range(model.n_layers)]
    head = model.module.get_output_embeddings().weight.numel()
    first = min(s.layer + (s.point != "resid_pre") for s in sites)  # the first block that gradients pass through
    return 2.0 * (sum(blocks) + head) + 2.0 * (sum(blocks[first:]) + head)


def train_adapter(
    model: Model,
    demonstrations: Any,
    sites: Sequence[Site | int | str] | Site | int | str,
    *,
    kind: str = "nodireft",
    rank: int = 4,
    positions: str = "last",
    steps: int = 100,
    batch_size: int = 32,
    learning_rate: float = 1e-2,
    profile: Store | None = None,
    max_size: float = 0.4,
    size_weight: float = 10.0,
    seed: int = 0,
    name: str = "",
) -> Trained:
    """Trains an adapter on demonstrations (prompts with a `response`), the model itself frozen.

    kind: `nodireft` (delta = (h V + b) U), `loreft` (arXiv:2404.03592, R orthonormal), `vector` (a constant).
    profile: a profile of the model with these sites, the scale of everything; unless given, the demonstrations' own
    prompts are profiled. Deltas longer than `max_size` spreads of it cost `size_weight` times the squared excess: an
    adapter trained without restraint writes far outside of what the profile saw, and its paste does anything but what
    it should. Raises UserError for unknown kinds and sites, for a profile of another model, and for
    demonstrations without a response. The result does not depend on anything but the arguments.
    """
    if kind not in KINDS:
        raise UserError(f"unknown adapter kind {kind!r}; allowed: {', '.join(KINDS)}")
    listed = [sites] if isinstance(sites, (Site, int, str)) else list(sites)
    where = [model.site(s) for s in listed]
    if not 0 < rank <= model.width:
        raise UserError(f"rank {rank} is not between 1 and the width {model.width}")
    torch_hooks.check_policy(positions)
    pairs = _encode(model, PromptSet.load(demonstrations))
    if not pairs:
        raise UserError("there are no demonstrations to train on; give prompts with a 'response' each")
    scales = _scales(model, PromptSet.load(demonstrations), where, profile)
    generator = torch.Generator().manual_seed(seed)
    r = 1 if kind == "vector" else rank
    parts = {s: _Part(kind, scales[s], r, generator).to(model.device) for s in where}
    optimizer = torch.optim.Adam([p for part in parts.values() for p in part.parameters()], lr=learning_rate)
    warm = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warm, max(1e-3, 1 - i / steps)))
    sizes: list[Tensor] = []

    def edit(site: Site) -> torch_hooks.Edit:
        def run(h: Tensor, at: Where) -> Tensor:
            keep = at.mask(positions)
            delta = parts[site].delta(h) * keep[..., None]
            sizes.append((delta.float().square().sum(-1)[keep] + 1e-12).sqrt() / scales[site].spread)
            return h + delta

        return run

    curve, tokens, start = [], 0, time.perf_counter()
    stream = _batches(pairs, batch_size, seed)
    with frozen(model):
        for step in progress(range(steps), desc=f"training {name or kind}", unit="step"):
            batch = next(stream)
            sizes.clear()
            # the lengths are given: a batch of prompts with answers is not a prompt to its end
            with model.edit({s: edit(s) for s in where}, prompt_lengths=[len(p) for p, _ in batch]):
                loss = _loss(model, batch)
            size = torch.cat([s.to(loss.device) for s in sizes])
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
    return Trained(adapter, tuple(curve), time.perf_counter() - start, tokens * _flops(model, where), steps)
