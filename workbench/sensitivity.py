"""Gradients of what a model will do with respect to its residual stream: what the forecast of a paste is made of."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .adapters.adapter import LowRank
from .adapters.demonstrations import answer_log_probs, check_lengths, encode_demonstrations
from .adapters.train import frozen
from .backends.torch_hooks import Where
from .errors import UserError
from .evaluate.batch_tasks import set_log_odds
from .memory import batches_that_fit
from .progress import progress
from .prompts import PromptSet, encode, opener_ids, pad
from .sites import POINTS, Site

if TYPE_CHECKING:
    from .models import Model


@dataclass(frozen=True, eq=False)
class Gradients:
    """Gradients of one number per prompt with respect to the residual stream where an adapter would act.

    value [n]: the number itself (log-odds, or a log-probability); states and grads: by site, [m, d], float32; seconds:
    what the passes took; owner [m]: the prompt of each row. Without it there is one row for each prompt: its last token.
    """

    value: Float[Tensor, " n"]
    states: Mapping[Site, Float[Tensor, "m d"]]
    grads: Mapping[Site, Float[Tensor, "m d"]]
    seconds: float = 0.0
    owner: Int[Tensor, " m"] | None = None

    def __repr__(self) -> str:
        sites = ", ".join(map(str, self.states))
        return f"Gradients({len(self.value)} prompts, mean value {float(self.value.mean()):.3f}, at {sites})"

    def effect(self, site: Site, part: LowRank) -> Float[Tensor, " n"]:
        """delta(h) . G for each prompt: the forecast change of `value` when the part acts at strength 1.

        Where a prompt has several rows they are summed: to first order positions do not see each other.
        """
        each = (part.delta(self.states[site]) * self.grads[site]).sum(1)
        return each if self.owner is None else each.new_zeros(len(self.value)).index_add_(0, self.owner, each)


def gradients(
    model: Model, prompts: Any, openers: Sequence[str], sites: Iterable[Site | int | str] | None = None,
    *, positions: str = "last", batch_size: int = 64,
) -> Gradients:  # fmt: skip
    """Gradients of the log-odds that an answer begins with one of `openers`, at every site of `sites` (default: all).

    positions: where the adapters to be forecast act, in their own words (`last`, `prompt`, `first:2`, ...).
    """
    prompts = PromptSet.load(prompts)
    encoded = _encoded(model, prompts)
    check_lengths(prompts, list(map(len, encoded)), positions)
    first = opener_ids(openers, model.tokenizer, prompts[0])
    return _next_token(model, encoded, _sites(model, sites), batch_size, lambda logits: set_log_odds(logits, first),
                       "gradients", positions)  # fmt: skip


def answer_gradients(
    model: Model, demonstrations: Any, sites: Iterable[Site | int | str] | None = None, *, positions: str = "last",
    batch_size: int = 8,
) -> Gradients:  # fmt: skip
    """Gradients of the log-probability of whole answers, at every site of `sites` (default: all): one backward pass.

    For behaviours that no first token shows. `value` is log p(answer | prompt), summed over the answer's tokens, in nats.

    Args:
        demonstrations: prompts with a `response` each: some that the donor gives with its adapter on, say.
        positions: where the adapters to be forecast act, in their own words (`last`, `prompt`, `generated`, `all`, ...);
            each is a row of `states` and `grads`, on the host, so that `all` of long answers takes much memory.

    Raises UserError for a demonstration without a response or too long for the model, and for unknown positions.
    """
    samples = encode_demonstrations(model, PromptSet.load(demonstrations), positions)
    if not samples:
        raise UserError("there are no answers to forecast on; give at least one")
    place = [(len(p), len(p) + len(a)) for p, a in samples]

    def scalar(rows: list[int]) -> Tensor:
        return answer_log_probs(model, [samples[i] for i in rows])

    def chosen(rows: list[int]) -> Bool[Tensor, "b t"]:
        return _where([place[i] for i in rows], left=False).mask(positions)

    sizes = [whole for _, whole in place]
    return _backward(model, sizes, _sites(model, sites), batch_size, scalar, chosen, "gradients of answers")


def fisher(
    model: Model, prompts: Any, sites: Iterable[Site | int | str] | None = None, *, samples: int = 4, seed: int = 0,
    batch_size: int = 64, split: float = 0.5,
) -> list[Gradients]:  # fmt: skip
    """Gradients of the log-probability of next tokens that the model itself samples: KL(base || edited) of the next
    token is E[(delta . g)^2] / 2 to second order, so `samples` backward passes forecast the damage to neutral text.

    Plain texts are cut after the share `split` of their tokens, as `kl_on_text` cuts them: after a whole text the next
    token is its end, of which the model is sure, and no delta seems to do harm.
    """
    prompts = PromptSet.load(prompts)
    encoded = [
        ids if prompt.text is None else ids[: max(1, round(split * len(ids)))]
        for prompt, ids in zip(prompts, _encoded(model, prompts), strict=True)
    ]
    made = []
    for k in range(samples):
        generator = torch.Generator().manual_seed(seed * 1000 + k)

        def scalar(logits: Tensor, generator: torch.Generator = generator) -> Tensor:
            logp = logits.log_softmax(1)
            drawn = torch.multinomial(logp.detach().exp().cpu(), 1, generator=generator).to(logp.device)
            return logp.gather(1, drawn)[:, 0]

        made.append(_next_token(model, encoded, _sites(model, sites), batch_size, scalar, "gradients on neutral text"))
    return made


def _encoded(model: Model, prompts: PromptSet) -> list[list[int]]:
    encoded = encode(prompts, model.tokenizer, max_length=model.max_length)
    if not encoded:
        raise UserError("there are no prompts to forecast on; give at least one")
    return encoded


def _sites(model: Model, sites: Iterable[Site | int | str] | None) -> list[Site]:
    """In the order in which they run."""
    found = [model.site(s) for s in (range(model.n_layers) if sites is None else sites)]
    return sorted(found, key=lambda site: (site.layer, POINTS.index(site.point)))


def _next_token(
    model: Model, encoded: Sequence[Sequence[int]], sites: Sequence[Site], batch_size: int,
    scalar: Callable[[Tensor], Tensor], desc: str, positions: str = "last",
) -> Gradients:  # fmt: skip
    """Of `scalar(logits [b, v]) -> [b]` of the token that follows each prompt."""

    def value(rows: list[int]) -> Tensor:
        ids, mask = pad([encoded[i] for i in rows], model.pad_id, "left")
        return scalar(model.logits(ids, mask, last_only=True)[:, -1].float())

    def chosen(rows: list[int]) -> Bool[Tensor, "b t"]:
        return _where([(len(encoded[i]), len(encoded[i])) for i in rows], left=True).mask(positions)

    return _backward(model, list(map(len, encoded)), sites, batch_size, value, chosen, desc)


def _where(lengths: Sequence[tuple[int, int]], *, left: bool) -> Where:
    """The positions of padded rows; lengths: the tokens of each prompt, and of it with its answer."""
    prompt, whole = (torch.tensor(n) for n in zip(*lengths, strict=True))
    place = torch.arange(int(whole.max())).expand(len(whole), -1)
    if left:
        place = place - (whole.max() - whole)[:, None]
    return Where(torch.where((place >= 0) & (place < whole[:, None]), place, -1), prompt)


def _backward(
    model: Model, sizes: Sequence[int], sites: Sequence[Site], batch_size: int, scalar: Callable[[list[int]], Tensor],
    chosen: Callable[[list[int]], Tensor], desc: str,
) -> Gradients:  # fmt: skip
    """Gradients of `scalar(prompts) -> [b]` at the positions `chosen(prompts) -> [b, t]`, all sites in one backward pass;
    prompts are taken by `sizes`, those of like length together."""
    began = time.perf_counter()
    order = sorted(range(len(sizes)), key=lambda i: sizes[i])
    value, owner = torch.empty(len(sizes)), []
    states: dict[Site, list[Tensor]] = {s: [] for s in sites}
    grads: dict[Site, list[Tensor]] = {s: [] for s in sites}
    leaf = {sites[0]: lambda h, _: h.detach().requires_grad_()}  # nothing before it is differentiated
    with frozen(model), torch.enable_grad(), progress(total=len(order), desc=desc, unit="prompt") as bar:
        for batch in batches_that_fit(order[start : start + batch_size] for start in range(0, len(order), batch_size)):
            with batch as rows:
                with model.edit(leaf), model.read(sites) as seen:
                    out = scalar(rows)
                slopes = torch.autograd.grad(out.sum(), [seen[s] for s in sites])
                which = chosen(rows)
                here = [which.to(g.device) for g in slopes]
                at = [seen[site].detach()[w].float().cpu() for site, w in zip(sites, here, strict=True)]
                slope = [g[w].float().cpu() for g, w in zip(slopes, here, strict=True)]
                value[rows] = out.detach().float().cpu()
                owner.append(torch.tensor(rows)[which.nonzero()[:, 0]])
                for site, h, g in zip(sites, at, slope, strict=True):
                    states[site].append(h)
                    grads[site].append(g)
                bar.update(len(rows))
    owners = torch.cat(owner)
    by_prompt = owners.argsort(stable=True)
    kept, found = ({s: torch.cat(listed)[by_prompt] for s, listed in each.items()} for each in (states, grads))
    one_each = torch.equal(owners[by_prompt], torch.arange(len(sizes)))
    return Gradients(value, kept, found, time.perf_counter() - began, None if one_each else owners[by_prompt])
