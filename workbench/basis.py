"""In which basis a store's rows are: a few of them are computed again by the model and compared.

Rows of resid_post are taken as blocks leave them (`raw`). Other programs keep other states under the same name:
TransformerLens's compatibility mode folds the norms and centres the stream; the last of Hugging Face's hidden states is after
the final norm, and its first is the embeddings, so that an index taken for a layer is one off; SAE trainers scale rows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import UserError
from .sites import Site

if TYPE_CHECKING:
    from .models import Model
    from .store import Store

log = logging.getLogger("workbench")
PROMPTS, ROWS = 8, 64
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 5e-2}
"""the largest relative difference of rows that are called equal; other kernels, batches and devices differ by less"""
RAW, CENTRED, NORMED, SCALED, EARLIER, LATER = (
    "raw", "centred", "after the final norm", "scaled", "of the layer before", "of the layer after",
)  # fmt: skip
OTHER = "none of these"


@dataclass(frozen=True)
class Basis:
    """What a site's stored rows turned out to be.

    found: raw, centred (each row less its mean), after the final norm, scaled (each row by some factor), of the layer
        before or after, or none of these. difference: ||x - y|| / ||y|| over all compared rows x and what they should be, y.
        rows: how many were compared.
    """

    site: Site
    found: str
    difference: float
    rows: int


def bases_of(store: Store, model: Model, sites: list[Site] | None = None) -> list[Basis]:
    """The basis of a store's rows at some sites (its first, middle and last resid_post), against `model`.

    The first few prompts are run again with the options that the store names. Raises UserError for a store that does not
    hold its prompts, or that was made with options that are not known, so that rows do not come out one for one.
    """
    from .profile import profile_model

    posts = [site for site in store.sites if site.point == "resid_post"]
    chosen = sites or [posts[i] for i in sorted({0, len(posts) // 2, len(posts) - 1})] if posts or sites else []
    if not chosen:
        raise UserError(f"store {store.path} has no resid_post to compare; it has {', '.join(map(str, store.sites))}")
    beside = {site.layer + k for site in chosen for k in (-1, 0, 1)} & set(range(model.n_layers))
    prompts = store.prompt_set()[:PROMPTS]
    options = store.manifest.get("options", {})
    known = {name: options[name] for name in ("max_length", "stride") if options.get(name) is not None}
    quiet = log.level
    log.setLevel(logging.ERROR)
    try:
        with profile_model(
            model, prompts, sites=[Site(l) for l in sorted(beside)], tokens=store.tokens, **known
        ) as again:
            n = min(ROWS, again.n_rows)
            held = [row for i in range(len(prompts)) for row in store.rows_of(i)]
            if len(held) != again.n_rows:
                raise UserError(f"store {store.path}: its first {len(prompts)} prompts have {len(held)} rows and give "
                                f"{again.n_rows} now; it was made with another template or other options")  # fmt: skip
            states = {site: again.read(site, slice(0, n)).double() for site in again.sites}
    finally:
        log.setLevel(quiet)
    tolerance = max(TOLERANCE.get(store.dtype, 5e-2), TOLERANCE.get(str(model.dtype).removeprefix("torch."), 5e-2))
    return [_basis(site, store.read(site, held[:n]).double(), states, model, tolerance) for site in chosen]


def _basis(site: Site, x: Tensor, states: dict[Site, Tensor], model: Model, tolerance: float) -> Basis:
    best = Basis(site, OTHER, float("inf"), len(x))
    for name, y in _candidates(site, x, states, model):
        difference = float((x - y).norm() / y.norm().clamp(min=1e-30))
        if difference <= tolerance:  # in this order: the plainest that fits
            return Basis(site, name, difference, len(x))
        if name == RAW:
            best = Basis(site, OTHER, difference, len(x))
    return best


def _candidates(
    site: Site, x: Float[Tensor, "n d"], states: dict[Site, Tensor], model: Model
) -> Iterator[tuple[str, Tensor]]:
    h = states[Site(site.layer)]
    yield RAW, h
    yield CENTRED, h - h.mean(-1, keepdim=True)
    norm = _final_norm(model)
    if norm is not None:
        with torch.inference_mode():
            weight = next(norm.parameters())
            normed = norm(h.to(weight.device, weight.dtype)).to(x)
        yield NORMED, normed
    for name, layer in ((EARLIER, site.layer - 1), (LATER, site.layer + 1)):
        if Site(layer) in states:
            yield name, states[Site(layer)]
    for scaled in (h, h - h.mean(-1, keepdim=True)):
        factor = (x * scaled).sum(-1, keepdim=True) / scaled.square().sum(-1, keepdim=True).clamp(min=1e-30)
        yield SCALED, factor * scaled


def _final_norm(model: Model) -> torch.nn.Module | None:
    """The norm of the decoder that stands outside its blocks; None where it has none."""
    norms = [child for child in model.decoder.children() if "norm" in type(child).__name__.lower()]
    return norms[-1] if norms and next(norms[-1].parameters(), None) is not None else None
