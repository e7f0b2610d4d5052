"""Counted: how long the prompts of a set are in a model's tokens, and how many rows a profile keeps of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from ..prompts import Prompt, PromptSet, response_ids
from ..rendering import CHUNK, encode_spans, render, special_ids
from ..tokens import Policy, choose
from ..work import Lengths

SAMPLE = 1000
"""prompts that are counted where their number of tokens is given"""
MOST_TOKENS = 1e15
"""that can be planned: some ten times what any model was trained on"""


def check_tokens(tokens: float) -> None:
    """UserError for a number of tokens that nobody profiles."""
    if not 1 <= tokens <= MOST_TOKENS:
        raise UserError(f"{tokens:g} tokens are nothing to plan; give a number from 1 to {MOST_TOKENS:g}, such as "
                        "--tokens 1e8")  # fmt: skip


@dataclass(frozen=True)
class Counted:
    """Prompts by their length, and the rows that are kept of all of them together."""

    texts: Lengths
    rows: float

    def scaled(self, tokens: float) -> Counted:
        """As many texts like these as make so many tokens; UserError for a number that is not above 0."""
        check_tokens(tokens)
        times = tokens / self.texts.tokens
        return Counted(self.texts.scaled(times), self.rows * times)


def count_prompts(
    prompts: PromptSet,
    tokenizer: Any,
    policy: Policy = "last",
    *,
    max_length: int | None = None,
    tokens: float | None = None,
) -> Counted:
    """Encodes prompts as a profile does and counts what it would run and keep.

    tokens: so many in all instead; the lengths are then those of the first `SAMPLE` prompts. Raises UserError for a set
    without prompts, and what encoding and choosing raise.
    """
    if not len(prompts):
        raise UserError(f"{prompts.name}: no prompts to plan for; give at least one")
    special, lengths, rows = special_ids(tokenizer), list[int](), 0
    for start in range(0, len(prompts) if tokens is None else min(len(prompts), SAMPLE), CHUNK):
        part = prompts[start : min(start + CHUNK, len(prompts) if tokens is None else SAMPLE)]
        texts = render(part, tokenizer)
        found = encode_spans(part, tokenizer, max_length=max_length, rendered=texts)
        kept = [len(choose(policy, *of, special)) for of in zip(found, part, texts, strict=True)]
        lengths += [len(one.ids) for one, n in zip(found, kept, strict=True) if n]  # others are not run
        rows += sum(kept)
    if not rows:
        raise UserError(f"tokens={policy!r} keeps no token of any prompt in {prompts.name}; choose another policy")
    counted = Counted(Lengths.of(lengths), float(rows))
    return counted if tokens is None else counted.scaled(tokens)


def count_demonstrations(prompts: Sequence[Prompt], tokenizer: Any) -> Lengths:
    """Of prompts with a `response` each, both together; those without one count as they are."""
    both = [response_ids(p, str(p.meta.get("response") or ""), tokenizer) for p in prompts]
    return Lengths.of(len(ids) + len(answer) for ids, answer in both)
