"""Adapters that do nothing: told before they are pasted, since no converter can make up for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..adapters.adapter import Adapter
from ..errors import UserError
from ..prompts import PromptSet, response_ids
from .behaviour import log_odds, shift_of_answers
from .statistics import Interval, mean_interval

if TYPE_CHECKING:
    from ..models import Model

NEGLIGIBLE = 0.05  # nats: less is no effect of an adapter, whatever the interval
UNSEEN = 1e-3  # nats of KL at a token: less is no effect of an adapter
TRIED, TOKENS = 64, 8  # prompts that an adapter is tried on, and tokens of their answers


def ineffective(name: str, effect: Interval) -> str | None:
    """What to say of an adapter that does nothing, or the contrary, to its own donor; None where it does something.

    effect: the change of the donor's log-odds of the behaviour.
    """
    if effect.low > 0 and effect.value >= NEGLIGIBLE:
        return None
    done = "lowers it there" if effect.high < 0 and effect.value <= -NEGLIGIBLE else "does nothing to its own donor"
    return (f"the donor's adapter changes the log-odds of {name!r} by {effect.value:+.3f} nats [{effect.low:+.3f}, "
            f"{effect.high:+.3f}]: it {done}, so that no paste of it can be expected to bring the behaviour out; check that "
            "it is of this donor and of this behaviour")  # fmt: skip


def silent(adapter: Adapter) -> str | None:
    """What to say of an adapter whose delta is exactly zero on every state; None of any other.

    >>> import torch
    >>> from workbench.adapters import vector
    >>> from workbench.sites import Site
    >>> silent(vector(Site(1), torch.ones(2))), silent(vector(Site(1), torch.zeros(2)))[:50]
    (None, "this adapter's delta is exactly zero at resid_post")
    """
    parts = [(site, part) for term in adapter.split() for site, part in term.parts.items()]
    if adapter.strength == 0:
        return "this adapter has strength 0: it changes nothing, and neither does its paste; give it another strength"
    constants = [part.constant() for _, part in parts]
    if any(c is None or bool(c.any()) for c in constants):
        return None
    sites = ", ".join(str(site) for site in adapter.sites)
    return (f"this adapter's delta is exactly zero at {sites}, on every state: it changes nothing, and neither does its paste; "
            "train it, or give another")  # fmt: skip


def idle_on_donor(
    donor: Model | str | None,
    adapter: Adapter,
    prompts: Any,
    openers: Sequence[str] = (),
    *,
    allow_mismatch: bool = False,
) -> str | None:
    """Tries an adapter on its own donor: what to say where it does nothing there, else None.

    With `openers` by the log-odds of the behaviour after the first 64 prompts; without, or where it acts on generated
    tokens alone, by how far it moves the distributions of the first 8 tokens of the donor's own answers.

    Args:
        donor: the model, or its name.
        prompts: whatever `PromptSet.load` reads.

    Raises:
        UserError: no donor, one that cannot be loaded, or another model than the adapter's.
    """
    from ..models import load

    if donor is None:
        raise UserError("neither the adapter nor the converters say which model the donor is; give it (--donor)")
    model = load(donor) if isinstance(donor, str) else donor
    adapter.check(model, allow_mismatch)
    tried = PromptSet.load(prompts)[:TRIED]
    on_prompt = any(term.positions != "generated" for term in adapter.split())
    if openers and on_prompt:
        effect = log_odds(model, tried, openers, adapter) - log_odds(model, tried, openers)
        return ineffective(", ".join(openers), mean_interval(effect))
    answers = model.generate(tried, max_new_tokens=TOKENS, desc="the donor's answers")
    pairs = [response_ids(prompt, answer, model.tokenizer) for prompt, answer in zip(tried, answers, strict=True)]
    moved = mean_interval(shift_of_answers(model, pairs, adapter))
    if moved.high >= UNSEEN:
        return None
    return (f"the donor's adapter moves the first tokens of its donor's answers to {len(tried)} prompts by a mean KL of "
            f"{moved.value:.1e} nats, at most {moved.high:.1e}: it does nothing to its own donor, so that no paste of it can "
            "be expected to do anything; check that it is of this donor")  # fmt: skip
