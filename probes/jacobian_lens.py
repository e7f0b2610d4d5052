"""The Jacobian lens: the mean derivative of the final state by the state at a layer, from vector-Jacobian products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import UserError
from workbench.evaluate.scoring import Sequences
from workbench.maps.linear_map import LinearMap
from workbench.models import Model
from workbench.progress import progress
from workbench.prompts import PromptSet
from workbench.rendering import pad
from workbench.sites import Site

from .lens import Lens, translated_sites
from .lens_rows import BATCH_TOKENS, batches_of


@dataclass(frozen=True, eq=False)
class JacobianLensFit:
    """A Jacobian lens, and how well its Jacobians are known."""

    lens: Lens
    error: dict[Site, Float[Tensor, "d d"]]
    """the standard error of each entry of the mean Jacobian, over prompts; rows are inputs, columns outputs"""
    relative_error: dict[Site, float]
    """||error|| / ||J||, Frobenius"""
    prompts: int
    tokens: int

    def __repr__(self) -> str:
        worst = max(self.relative_error.values())
        return f"JacobianLensFit({self.lens!r}, {self.prompts} prompts, relative error at most {worst:.2g})"


def fit_jacobian_lens(
    model: Model,
    prompts: Any,
    *,
    limit: int = 64,
    sites: Sequence[Site | str | int] | None = None,
    seed: int = 0,
    max_length: int | None = 128,
    batch_tokens: int = BATCH_TOKENS,
) -> JacobianLensFit:
    """J = E[d y_t / d x_t] of the last block's output y by the state x at each site, the same token on both sides.

    One backward pass per output dimension gives a row of J at all sites and tokens at once: each token's output is given
    a random sign, so that what earlier tokens do to later ones cancels in expectation, and is part of the error that is
    given. The lens is the first-order expansion about the mean state, y = mean(y) + (x - mean(x)) J.

    Args:
        prompts: anything that `PromptSet.load` reads.
        limit: so many of the prompts, drawn with `seed`. The cost is width x their backward pass.
        sites: all but the last block's output, unless given.
        max_length: tokens of each prompt that are read.

    Raises:
        UserError: fewer than two prompts, over which there is no error, or a model that cannot be differentiated.

    >>> fit_jacobian_lens(load("bundled:recipient"), "bundled:profile").relative_error    # doctest: +SKIP

    Source: the mean Jacobian of arXiv:2308.09124, eq. 4, there of one relation's subjects and objects; here of all tokens
    of a text, at all layers.
    """
    if limit < 2:
        raise UserError(f"limit={limit}: the error of a mean Jacobian needs at least 2 prompts")
    read = PromptSet.load(prompts)
    picked = torch.randperm(len(read), generator=torch.Generator().manual_seed(seed))[:limit]
    sequences = Sequences.of(model, read.subset(sorted(picked.tolist())), max_length)
    chosen = translated_sites(model, sites)
    sums = _Sums(chosen, model.width)
    batches = batches_of(sequences, range(len(sequences)), batch_tokens)
    noise = torch.Generator().manual_seed(seed)
    with progress(total=len(batches) * model.width, desc=f"Jacobians of {model.name}", unit="pass") as bar:
        for batch in batches:
            _add(model, sequences, batch, sums, noise, bar)
    if sums.prompts < 2:
        raise UserError(f"{read.name}: fewer than 2 prompts have a token besides BOS; give more")
    translators, errors = {}, {}
    for site in chosen:
        mean, errors[site] = sums.jacobian(site)
        bias = (sums.y - sums.x[site] @ mean) / sums.prompts
        eye = torch.eye(model.width, dtype=torch.float64)
        translators[site] = LinearMap((mean - eye).float(), bias.float(), {"method": "jacobian"})
    relative = {site: float(errors[site].norm() / sums.jacobian(site)[0].norm()) for site in chosen}
    about = {"prompts": read.name, "prompts_hash": read.hash, "limit": limit, "seed": seed, "used": sums.prompts,
             "relative_error": {str(site): float(f"{value:.6g}") for site, value in relative.items()}}  # fmt: skip
    lens = Lens("jacobian", translators, dict(model.fingerprint), about)
    return JacobianLensFit(lens, errors, relative, sums.prompts, sums.tokens)


class _Sums:
    """Sums over prompts of the mean Jacobian of each and its square, and of its mean states: each prompt counts the same."""

    def __init__(self, sites: Sequence[Site], width: int) -> None:
        self.prompts = self.tokens = 0
        self.first, self.second = ({site: torch.zeros(width, width) for site in sites} for _ in range(2))
        self.x = {site: torch.zeros(width, dtype=torch.float64) for site in sites}
        self.y = torch.zeros(width, dtype=torch.float64)

    def jacobian(self, site: Site) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d d"]]:
        """The mean over prompts and its standard error, [in, out]."""
        n, first, second = self.prompts, self.first[site].double(), self.second[site].double()
        mean = first / n
        return mean, ((second / n - mean.square()).clamp_min(0) / (n - 1)).sqrt()


def _add(
    model: Model, sequences: Sequences, batch: Sequence[int], sums: _Sums, noise: torch.Generator, bar: Any
) -> None:
    ids, mask = pad([sequences.ids[i] for i in batch], model.pad_id, "right")
    bos, end = model.tokenizer.bos_token_id, Site(model.n_layers - 1)
    kept = mask.bool()
    kept[:, 0] &= ids[:, 0] != (-1 if bos is None else bos)
    sites = list(sums.x)

    def live(_: Site, h: Tensor) -> Tensor:
        if not h.requires_grad:
            h.requires_grad_()
        return h

    with torch.enable_grad(), model.read([*sites, end], live) as found:
        model.run(ids, mask)
    states, y = [found[site] for site in sites], found[end]
    counts = kept.sum(1)
    use = (counts > 0).nonzero().flatten()
    sums.prompts, sums.tokens = sums.prompts + len(use), sums.tokens + int(counts.sum())
    share = (kept.double() / counts.clamp_min(1)[:, None]).to(y.device)  # of each token in its prompt's mean
    for total, x in zip([*(sums.x[site] for site in sites), sums.y], [*states, y], strict=True):
        total += torch.einsum("bt,btd->d", share.to(x.device), x.detach().double()).cpu()
    share = share.float()
    for column in range(y.shape[-1]):
        signs = (torch.randint(0, 2, kept.shape, generator=noise) * 2 - 1).to(share) * (share > 0)
        cotangent = torch.zeros_like(y)
        cotangent[..., column] = signs.to(y.dtype)
        grads = torch.autograd.grad(y, states, cotangent, retain_graph=column + 1 < y.shape[-1])
        for site, grad in zip(sites, grads, strict=True):
            rows = torch.einsum("bt,btd->bd", (signs * share).to(grad.device), grad.float()).cpu()[use]
            sums.first[site][:, column] += rows.sum(0)
            sums.second[site][:, column] += rows.square().sum(0)
        bar.update(1)
