"""A change of weights (a LoRA, a full finetune) as a residual adapter: a low-rank fit to what it does to activations.

At a site, delta(h) = h_with - h_without on the same tokens is regressed on h_without: ridge of reduced rank, about the
means, so that it is (h V + b) U and a constant. Of several sites at once each is fitted to what is not yet explained:
h_without is then the state with the parts at the earlier sites acting, so that each part also makes good what theirs
left over.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UserError
from ..prompts import PromptSet, encode, pad
from ..sites import Site
from .adapter import Adapter
from .demonstrations import check_lengths
from .low_rank import LowRank
from .peft_lora import Lora, is_lora
from .peft_lora import read as read_lora
from .site_fit import SiteFit, Split, fit_site

if TYPE_CHECKING:
    from ..models import Model
    from ..store import Store

log = logging.getLogger("workbench")
KEEP = ("best", "all")
LOW = 0.5
"""a share explained below which the adapter comes with a warning"""
BATCH = 64


@dataclass(frozen=True, eq=False)
class ResidualFit:
    """A change of weights as an adapter, and how much of it that is.

    fits: of every site that was tried. kl_before, kl_after: mean KL(p_with || p), in nats, of the next token after
    held-out prompts, p of the plain model and of the model with the adapter. `warnings`, one line each.
    """

    adapter: Adapter
    fits: tuple[SiteFit, ...]
    kl_before: float
    kl_after: float
    warnings: tuple[str, ...]


def residual_adapter(
    model: Model,
    change: Lora | Model | str | Path,
    prompts: Any,
    sites: Sequence[Site | int | str] | Site | int | str | None = None,
    *,
    keep: str = "best",
    rank: int | str = "cv",
    max_rank: int = 16,
    positions: str = "last",
    holdout: float = 0.2,
    seed: int = 0,
    batch_tokens: int = 8192,
    name: str = "",
) -> ResidualFit:
    """A residual adapter that does to `model` what a change of its weights does.

    change: a LoRA folder of PEFT or a checkpoint of the same architecture, read or still to be read.
    sites: where it may act; every resid_post unless given. keep: `best` fits each alone and keeps the one whose adapter
        leaves the next token nearest to the changed model's; `all` keeps every one, each fitted to what is not yet
        explained with the earlier ones acting.
    rank: of what the delta reads, a constant coming on top (0: the constant alone); `cv` takes the least one, up to
        `max_rank`, whose R2 over folds is within 0.01 of the best.
    positions: `last`, `prompt`, `all`, `first:n` or `last:n`: where it is fitted, and where it acts. A change of weights
        acts on all tokens, generated ones too: for `all` give chats that end with the answer.
    holdout: the share of the prompts that the figures are taken on; they are used for nothing else but `best`.

    Raises UserError for a change of another model, one that changes no activation at the sites, positions that cannot
    be fitted or that a prompt is too short for, and too few prompts.

    >>> made = residual_adapter(model, "my-lora", "bundled:profile", [3], rank=4)          # doctest: +SKIP
    >>> made.adapter.save("my-adapter"); made.fits[0].r2                                  # doctest: +SKIP
    """
    tokens = _tokens(positions)
    if keep not in KEEP:
        raise UserError(f"unknown keep {keep!r}; allowed: {', '.join(KEEP)}")
    listed = range(model.n_layers) if sites is None else [sites] if isinstance(sites, (Site, int, str)) else sites
    where = sorted({model.site(site) for site in listed}, key=_flow)
    read = PromptSet.load(prompts)
    check_lengths(read, [len(ids) for ids in encode(read, model.tokenizer, max_length=model.max_length)], positions)
    changed = open_change(model, change)
    split = Split.of(len(read), holdout, seed)
    held = read.subset(split.held)
    fits, parts = _fit(
        model, changed, read, where, split, keep == "all", (rank, max_rank), (positions, tokens), batch_tokens
    )
    if not parts:
        raise UserError(f"{_name(change)} changes no activation of {model.name} at {', '.join(map(str, where))}; choose "
                        "later sites, or look whether it is trained at all")  # fmt: skip
    adapters = [Adapter(parts, positions)] if keep == "all" else [Adapter({s: p}, positions) for s, p in parts.items()]
    before, *after = divergence(model, changed, held := read.subset(split.held), [None, *adapters])
    best = min(range(len(adapters)), key=after.__getitem__)
    kept = adapters[best]
    warnings = _warnings([f for f in fits if f.site in kept.sites], before, after[best])
    for said in warnings:
        log.warning("%s", said)
    meta: dict[str, Any] = {
        "kind": "weight_change", "change": "lora" if isinstance(changed, Lora) else "checkpoint", "source": _name(change),
        "fits": [{**asdict(f), "site": str(f.site)} for f in fits], "kl_before": before, "kl_after": after[best],
        "prompts": read.hash, "held_out": len(held), "keep": keep, "seed": seed, "warnings": warnings,
    }  # fmt: skip
    if keep == "best":
        meta["kl_by_site"] = {str(a.sites[0]): kl for a, kl in zip(adapters, after, strict=True)}
    made = replace(kept, name=name or Path(_name(change)).name, base=model.fingerprint, meta=meta)
    return ResidualFit(made, tuple(fits), before, after[best], tuple(warnings))


def _fit(
    model: Model,
    changed: Lora | Model,
    prompts: PromptSet,
    sites: Sequence[Site],
    split: Split,
    in_turn: bool,
    ranks: tuple[int | str, int],
    where: tuple[str, str],
    batch_tokens: int,
) -> tuple[list[SiteFit], dict[Site, LowRank]]:
    """The part of each site that changes; `in_turn`, to what the earlier ones leave. where: positions, as tokens too."""
    positions, tokens = where

    def profiled(of: Model, at: Sequence[Site]) -> Store:
        from ..profile import profile_model

        return profile_model(of, prompts, sites=at, tokens=tokens, batch_tokens=batch_tokens)

    with applied(model, changed) as other:
        after = profiled(other, sites)
    plain = profiled(model, sites)
    fits: list[SiteFit] = []
    parts: dict[Site, LowRank] = {}
    for site in sites:
        before = plain
        if parts and in_turn:
            with Adapter(parts, positions).on(model):
                before = profiled(model, [site])
        found = fit_site(site, before, after, plain, split, *ranks)
        if found is None:
            log.info("%s: the change does nothing there", site)
            continue
        fits.append(found[0])
        parts[site] = found[1]
    return fits, parts


def _tokens(positions: str) -> str:
    """The tokens of a profile that the positions of an adapter are; UserError for those that no profile has."""
    from ..backends.torch_hooks import check_policy

    check_policy(positions)
    if positions == "generated" or "+" in positions:
        raise UserError(f"a change of weights is not fitted at positions {positions!r}; allowed: last, prompt, all, first:n, "
                        "last:n")  # fmt: skip
    # special tokens too: the adapter acts on them
    return (
        "last" if positions == "last" else "all+special" if positions in ("prompt", "all") else f"{positions}+special"
    )


def _flow(site: Site) -> tuple[int, int]:
    """In the order in which the states come about."""
    from ..backends.torch_hooks import FLOW

    return site.layer, FLOW.index(site.point)


def _name(change: Lora | Model | str | Path) -> str:
    return str(change) if isinstance(change, (str, Path)) else change.name


def open_change(model: Model, change: Lora | Model | str | Path) -> Lora | Model:
    """Reads a LoRA folder, or loads a checkpoint beside `model`, with its tokenizer; UserError for one of another shape."""
    from ..models import load

    if isinstance(change, (str, Path)):
        if is_lora(Path(change).expanduser()):
            return read_lora(Path(change).expanduser())
        dtype = str(model.dtype).removeprefix("torch.")
        change = load(str(change), tokenizer=model.tokenizer, dtype=dtype, device=str(model.device), prove=False)
    if isinstance(change, Lora):
        return change
    shapes = [(m.family, m.n_layers, m.width) for m in (model, change)]
    if shapes[0] != shapes[1]:
        said = [f"{family}, {layers} layers of width {width}" for family, layers, width in shapes]
        raise UserError(f"{change.name} ({said[1]}) is no finetune of {model.name} ({said[0]}); give a checkpoint of the same "
                        "architecture, or a LoRA")  # fmt: skip
    if change.fingerprint["tokenizer"] != model.fingerprint["tokenizer"]:
        raise UserError(f"{change.name} has another tokenizer or template than {model.name}, so that their tokens are not the "
                        "same; load it with tokenizer=model.tokenizer")  # fmt: skip
    return change


@contextmanager
def applied(model: Model, change: Lora | Model) -> Iterator[Model]:
    """The changed model inside the block."""
    with change.on(model) if isinstance(change, Lora) else nullcontext():
        yield model if isinstance(change, Lora) else change


def divergence(
    model: Model, change: Lora | Model, prompts: PromptSet, adapters: Sequence[Adapter | None]
) -> list[float]:
    """Mean KL(p_with || p) of the token after each prompt, in nats: p_with of the changed model, p of `model` with each
    of the adapters (None: as it is)."""
    encoded = sorted(encode(prompts, model.tokenizer, max_length=model.max_length), key=len)
    total = torch.zeros(len(adapters), dtype=torch.float64)
    with torch.inference_mode():
        for start in range(0, len(encoded), BATCH):
            ids, mask = pad(encoded[start : start + BATCH], model.pad_id, "left")
            with applied(model, change) as other:
                p = _log_p(other, ids, mask)
            for i, adapter in enumerate(adapters):
                with adapter.on(model) if adapter is not None else nullcontext():
                    q = _log_p(model, ids, mask)
                total[i] += (p.exp() * (p - q)).sum().cpu()
    return (total / len(encoded)).tolist()


def _log_p(model: Model, ids: Tensor, mask: Tensor) -> Tensor:
    return model.logits(ids, mask, last_only=True)[:, -1].double().log_softmax(-1)


def _warnings(fits: Sequence[SiteFit], before: float, after: float) -> list[str]:
    low = [f"{f.site}: the adapter explains {f.explained:.0%} of the difference on held-out prompts, a constant "
           f"{f.explained_constant:.0%}" for f in fits if f.explained < LOW]  # fmt: skip
    if after > (1 - LOW) * before:
        low.append(f"with the adapter the next token is at a KL of {after:.3g} nats from the changed model's, without at "
                   f"{before:.3g}: much of the change is elsewhere than at {', '.join(str(f.site) for f in fits)}")  # fmt: skip
    return low
