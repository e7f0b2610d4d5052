"""The texts that a fold is calibrated and scored on: what a language model reads and says, not its users' turns alone."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..evaluate.scoring import Sequences
from ..prompts import Prompt, PromptSet, response_ids

if TYPE_CHECKING:
    from ..models import Model

ANSWER = 48
"""tokens of the answers that chats are completed with"""


def completed(model: Model, prompts: Any, *, answers: int = ANSWER, max_length: int | None = None) -> Sequences:
    """Encoded prompts, chats with an answer, of which alone the loss is: a model that was trained on answers is not meant to
    predict its users.

    The answer is a chat's own last turn, or its column `response`; else the model's own greedy one. Every token of a plain
    text is predicted (and of a chat, where the tokenizer has no template).

    Args:
        answers: tokens of the model's own answers; 0 takes all prompts as they stand, every token predicted.
        max_length: what is cut off; the model's context unless given.
    """
    if answers < 0:
        raise UserError(f"answers={answers}: the tokens of an answer are 0 (prompts as they stand) or more")
    read = PromptSet.load(prompts)
    plain = Sequences.of(model, read, max_length)
    if not answers or not getattr(model.tokenizer, "chat_template", None):
        return plain
    chats = [i for i, (_, prompt, _) in enumerate(plain.origin) if prompt.messages is not None]
    asked = {i: _asked(plain.origin[i][1]) for i in chats}
    silent = [i for i, (_, said) in asked.items() if said is None]
    if silent:
        made = model.generate(PromptSet(tuple(asked[i][0] for i in silent), read.name), max_new_tokens=answers,
                              desc="the model's own answers")  # fmt: skip
        asked |= {i: (asked[i][0], answer.strip()) for i, answer in zip(silent, made, strict=True)}
    limit = min(max_length or model.max_length, model.max_length)
    ids, starts, kept = list(plain.ids), list(plain.starts), []
    for i in range(len(plain)):
        if i in asked:
            prompt, said = asked[i]
            # where its own answer was cut nobody can tell, so that its end is left out
            before, after = response_ids(prompt, said or "", model.tokenizer, end=i not in silent)
            ids[i], starts[i] = tuple([*before, *after][:limit]), len(before)
        if starts[i] < len(ids[i]):
            kept.append(i)
    if not kept:
        raise UserError(f"{read.name}: no answer is left within {limit} tokens; give shorter prompts")
    return Sequences(tuple(ids[i] for i in kept), plain.left_out + len(plain) - len(kept), tuple(starts[i] for i in kept),
                     tuple(plain.origin[i] for i in kept))  # fmt: skip


def part_of(sequences: Sequences, among: list[int]) -> Sequences:
    """Some of the sequences, in the order given."""
    origin = tuple(sequences.origin[i] for i in among) if sequences.origin else ()
    return Sequences(tuple(sequences.ids[i] for i in among), 0, tuple(sequences.starts[i] for i in among), origin)


def _asked(prompt: Prompt) -> tuple[Prompt, str | None]:
    """A chat without its answer, and the answer, if it has one."""
    messages = prompt.messages or ()
    if len(messages) > 1 and messages[-1]["role"] == "assistant" and isinstance(messages[-1]["content"], str):
        return replace(prompt, messages=messages[:-1]), messages[-1]["content"]
    said = prompt.meta.get("response")
    return prompt, said if isinstance(said, str) else None
