"""`plan_profile` and `plan_transport`: their cost from a configuration and a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoints import folder_of, open_config, open_tokenizer
from ..errors import UserError
from ..prompts import PromptSet
from ..sites import Site
from ..tokens import Policy
from ..work import Lengths, ModelShape
from ..work.rates import Rates, measured
from ..work.shape import ITEMSIZE
from .plan import Plan
from .steps import moments_step, store_step, transport_steps
from .texts import Counted, check_tokens, count_prompts

FEWER = "fewer sites or layers, fewer folds, fewer pairs (pairs=[]), or batches of fewer tokens (batch_tokens)"
SMALLER = 'fewer sites, store_dtype="bfloat16", tokens="last", or moments in place of a store'
Sites = Sequence[Site | str | int]


def open_planned(source: str | Path | ModelShape, revision: str | None = None) -> tuple[ModelShape, Any]:
    """The shape of a model and its tokenizer, none of its weights; of a shape that is given, no tokenizer."""
    if isinstance(source, ModelShape):
        return source, None
    folder = folder_of(str(source), revision, weights=False)
    return ModelShape.of_config(open_config(source, folder), str(source)), open_tokenizer(source, folder)


def plan_profile(
    model: str | Path | ModelShape,
    prompts: Any = None,
    *,
    sites: Sites | None = None,
    policy: Policy = "last",
    tokens: float | None = None,
    length: int = 512,
    moments: bool = False,
    folds: int = 1,
    pairs: Sequence[tuple[Site | str | int, Site | str | int]] | None = None,
    store_dtype: str = "float32",
    dtype: str = "auto",
    batch_tokens: int = 8192,
    rates: Rates | None = None,
    gpus: int = 1,
) -> Plan:
    """What `profile_model` or, with `moments`, `profile_moments` would cost; no weights are loaded.

    Args:
        model: a hub id, a folder, a bundled name, or a `ModelShape`, which has no tokenizer.
        prompts: a prompt set, which is counted; None with `tokens` alone: texts of `length` tokens each.
        policy: which tokens are kept, `tokens` of `profile_model`; last or all where no prompts are given.
        tokens: how many tokens in all, in place of those that the prompts have.
        rates: the machine, `preset("H100")` say; this one, measured, unless given. gpus: how many of it, each with a replica.

    Raises UserError for what `profile_model` refuses of these, and for a number of tokens below 1.

    >>> print(plan_profile("meta-llama/Llama-3.1-8B", tokens=1e8, policy="all", rates=preset("H100")))  # doctest: +SKIP
    """
    shape, tokenizer = open_planned(model)
    counted = _counted(shape, tokenizer, prompts, policy, tokens, length)
    rates = rates or measured()
    used, chosen = run_dtype(shape, dtype, rates), shape.layers(sites)
    if store_dtype == "auto":
        store_dtype = used
    if store_dtype not in ITEMSIZE:
        raise UserError(f"unknown store dtype {store_dtype!r}; allowed: auto, {', '.join(ITEMSIZE)}")
    if moments:
        wanted = None if pairs is None else [(_site(shape, a, chosen), _site(shape, b, chosen)) for a, b in pairs]
        step = moments_step("moments", shape, counted, chosen, dtype=used, pairs=wanted, folds=folds,
                            batch_tokens=batch_tokens, device=rates.device)  # fmt: skip
    else:
        step = store_step("profile", shape, counted, chosen, dtype=used, store_dtype=store_dtype,
                          batch_tokens=batch_tokens)  # fmt: skip
    return Plan(f"Profile of {shape.name} in {used}", (step,), rates, _gpus(gpus), fixes=(FEWER, SMALLER))


def plan_transport(
    model: str | Path | ModelShape,
    prompts: Any = None,
    *,
    sites: Sites | None = None,
    policy: Policy = "all",
    tokens: float | None = None,
    length: int = 512,
    folds: int = 5,
    shards: int = 10,
    alpha: str = "cv",
    dtype: str = "auto",
    batch_tokens: int = 8192,
    rates: Rates | None = None,
    gpus: int = 1,
) -> Plan:
    """What the grid of `workbench transport` would cost; arguments as of `plan_profile` and `transport_grid`.

    Causal figures, shortcuts and features, which come after the grid, are left out. Raises UserError as `plan_profile`, and
    for fewer than two sites.
    """
    shape, tokenizer = open_planned(model)
    counted = _counted(shape, tokenizer, prompts, policy, tokens, length)
    rates = rates or measured()
    used, count = run_dtype(shape, dtype, rates), _gpus(gpus)
    steps, said = transport_steps(
        shape, counted, shape.layers(sites), dtype=used, memory=rates.capacity, folds=folds, shards=shards, alpha=alpha,
        batch_tokens=batch_tokens, device=rates.device,
    )  # fmt: skip
    return Plan(f"Transport of {shape.name} in {used}", tuple(steps), rates, count, tuple(said), (FEWER, SMALLER))


def run_dtype(shape: ModelShape, dtype: str, rates: Rates) -> str:
    """What a model runs in, as `load` decides it: a float16 checkpoint runs in float32 on a CPU.

    Raises UserError for a dtype that no model runs in.
    """
    if dtype != "auto" and dtype not in ITEMSIZE:
        raise UserError(f"unknown dtype {dtype!r}; allowed: auto, {', '.join(ITEMSIZE)}")
    if dtype == "auto" and shape.dtype == "float16" and rates.device == "cpu":
        return "float32"
    return shape.dtype if dtype == "auto" else dtype


def _counted(
    shape: ModelShape, tokenizer: Any, prompts: Any, policy: Policy, tokens: float | None, length: int
) -> Counted:
    if prompts is not None and tokenizer is not None:
        return count_prompts(PromptSet.load(prompts), tokenizer, policy, max_length=shape.context, tokens=tokens)
    if tokens is None:
        raise UserError("nothing says how much is read; give prompts, or how many tokens (--tokens 1e8)")
    if policy not in ("last", "all"):
        raise UserError(f"without prompts tokens={policy!r} cannot be counted; plan with last or all")
    check_tokens(tokens)
    texts = Lengths.even(tokens, min(length, shape.context))
    return Counted(texts, texts.tokens if policy == "all" else texts.sequences)


def _site(shape: ModelShape, site: Site | str | int, chosen: Sequence[Site]) -> Site:
    parsed = Site.parse(site, shape.n_layers)
    if parsed not in chosen:
        raise UserError(f"the pair names {parsed}, which is not profiled; sites: {', '.join(map(str, chosen))}")
    return parsed


def _gpus(gpus: int) -> int:
    if gpus < 1:
        raise UserError(f"gpus {gpus} is out of range; give at least 1")
    return gpus
