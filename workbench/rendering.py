"""From prompts to token ids: one chat template, one BOS, and truncation that keeps the assistant header."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from .errors import UserError
from .offsets import Offsets
from .turns import Frame, find_turns, frame_of, roles_of, stand_ins, turn_spans

if TYPE_CHECKING:
    from .prompts import Prompt

__all__ = [
    "CHUNK", "Encoded", "Frame", "encode", "encode_spans", "leading_ids", "opener_ids", "pad", "partial_openers",
    "prompt_frame", "render", "response_ids", "special_ids", "turn_spans",
]  # fmt: skip

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_NOW = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
DATE = "26 Jul 2024"  # the date that Llama's own template falls back to; any fixed one would do
CHUNK = 1024  # prompts tokenised in one call


@dataclass(frozen=True)
class Encoded:
    """A prompt as token ids; `spans[i]` are the characters [start, end) of the rendered text that token i completes.

    spans: of some width only where the token ends between two characters, so that `end` is a true boundary of the
        tokenization; a piece of a character that a later token completes has none, nor has a token that is not in the
        text (an added BOS); (-1, -1) where the tokenizer cannot tell. They refer to the whole text, also where it was
        cut.
    cut: how many tokens the truncation removed.
    frame: what the template wrote around the contents, for `turn_spans`; None of a plain text.
    """

    ids: list[int]
    spans: list[tuple[int, int]]
    cut: int = 0
    frame: Frame | None = None


def render(prompts: Sequence[Prompt], tokenizer: Any, *, add_generation_prompt: bool = True) -> list[str]:
    """The text of each prompt as the model will read it: chats through the tokenizer's template, texts as they stand.

    A chat that ends with the assistant's turn gets no generation prompt: it is rendered as a finished conversation.
    A template that prints the date gets a fixed one, so that the result is the same tomorrow. A tokenizer without a
    template reads a chat of one user's turn as plain text; for other chats that is a UserError.
    """
    return [_render(p, tokenizer, add_generation_prompt) for p in prompts]


def _render(prompt: Prompt, tokenizer: Any, add_generation_prompt: bool) -> str:
    if prompt.messages is None:
        return prompt.text or ""
    if not getattr(tokenizer, "chat_template", None):
        if len(prompt.messages) == 1 and prompt.messages[0]["role"] == "user":
            return str(prompt.messages[0]["content"])
        raise UserError(f"prompt {prompt.id!r} is a chat of {len(prompt.messages)} messages and the tokenizer "
                        "has no chat template; give single user messages, plain text or another tokenizer")  # fmt: skip
    import jinja2

    finished = prompt.messages[-1]["role"] == "assistant"
    try:
        return str(
            tokenizer.apply_chat_template(
                list(prompt.messages),
                tokenize=False,
                add_generation_prompt=add_generation_prompt and not finished,
                chat_template=_undated(tokenizer.get_chat_template()),
                date_string=DATE,
                enable_thinking=False,  # Qwen3 and its kin: the empty thinking block is written once, in the prompt
            )
        )
    except (jinja2.TemplateError, TypeError) as err:
        raise UserError(f"prompt {prompt.id!r}: the chat template refused it ({str(err)[:120]}); check roles and their "
                        "order") from err  # fmt: skip


def prompt_frame(prompt: Prompt, tokenizer: Any, *, add_generation_prompt: bool = True) -> Frame | None:
    """What the template writes around the contents of a chat; None of a plain text, and where it depends on them."""
    if prompt.messages is None:
        return None
    example, words = stand_ins(prompt)
    try:
        return frame_of(_render(example, tokenizer, add_generation_prompt), words)
    except UserError:  # a template that wants certain contents
        return None


class _FrameOf:
    """The frames of prompts, one rendering for each sequence of roles."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.known = tokenizer, dict[Any, Frame | None]()

    def __call__(self, prompt: Prompt) -> Frame | None:
        if any(m.keys() - {"role", "content"} for m in prompt.messages or ()):
            return prompt_frame(prompt, self.tokenizer)  # calls of tools are in the frame
        key = (roles_of(prompt), *(isinstance(m["content"], str) for m in prompt.messages or ()))
        if key not in self.known:
            self.known[key] = prompt_frame(prompt, self.tokenizer)
        return self.known[key]


@cache
def _undated(template: str) -> str:
    """The template with each `strftime_now("...")` in it replaced by the fixed date in that form."""
    date = datetime.strptime(DATE, "%d %b %Y")
    return _NOW.sub(lambda match: json.dumps(date.strftime(match[2])), template)


def leading_ids(tokenizer: Any) -> list[int]:
    """The tokens that this tokenizer puts before a text of its own accord (a BOS, mostly)."""
    whole = list(tokenizer("a")["input_ids"])
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    if bare:
        starts = [i for i in range(len(whole)) if whole[i : i + len(bare)] == bare]
        return whole[: starts[0]] if starts else []
    return [i for i in whole[:1] if i == tokenizer.bos_token_id]


def encode(prompts: Sequence[Prompt], tokenizer: Any, *, max_length: int | None = None) -> list[list[int]]:
    """The token ids of each prompt, with one BOS where the tokenizer begins texts with one; see `encode_spans`."""
    return [e.ids for e in encode_spans(prompts, tokenizer, max_length=max_length)]


def encode_spans(
    prompts: Sequence[Prompt], tokenizer: Any, *, max_length: int | None = None, rendered: Sequence[str] | None = None
) -> list[Encoded]:
    """The token ids of each prompt with the characters that they complete; see `Encoded`.

    The special tokens of a rendered chat come from the template; the tokens that the tokenizer itself would put in
    front are added only where the template has not written them, and nothing is added at the end. A prompt of more than
    `max_length` tokens loses tokens from the left of its last user's turn (of the whole text, where that is not
    enough): what follows that turn, the assistant header, is always kept. Raises UserError for a prompt of no tokens,
    and for one of which nothing but its frame would be left.
    """
    texts = list(rendered) if rendered is not None else render(prompts, tokenizer)
    leading, bos = leading_ids(tokenizer), tokenizer.bos_token_id
    fast = bool(getattr(tokenizer, "is_fast", False))
    exact, frame = Offsets(tokenizer), _FrameOf(tokenizer)
    found: list[Encoded] = []
    for start in range(0, len(texts), CHUNK):
        part = texts[start : start + CHUNK]
        out = tokenizer(part, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
        for i, ids in enumerate(out["input_ids"]):
            prompt = prompts[start + i]
            spans = exact.spans(part[i], ids, out["offset_mapping"][i] if fast else None)
            one = _with_leading(Encoded(list(ids), spans, frame=frame(prompt)), leading, bos)
            if len(one.ids) <= len(leading):
                raise UserError(f"prompt {prompt.id!r} has no tokens; give it a text or leave it out")
            head = max(len(leading), int(one.ids[0] == bos))
            found.append(_truncate(one, prompt, part[i], head, max_length))
    return found


def _with_leading(one: Encoded, leading: list[int], bos: int | None) -> Encoded:
    ids, spans = one.ids, one.spans
    if leading and ids[: len(leading)] != leading:
        ids, spans = leading + ids, [(0, 0)] * len(leading) + spans
    while bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
        ids, spans = ids[1:], spans[1:]
    return replace(one, ids=ids, spans=spans)


def _truncate(one: Encoded, prompt: Prompt, text: str, head: int, max_length: int | None) -> Encoded:
    ids, spans, n = one.ids, one.spans, len(one.ids)
    if max_length is None or n <= max_length:
        return one
    first, last = _content_tokens(one, prompt, text, head) or (head, n)
    need = head + 1 + (n - last)
    if max_length < need:
        raise UserError(f"max_length={max_length} leaves nothing of prompt {prompt.id!r}: its frame alone takes "
                        f"{need - 1} tokens; give at least {need}")  # fmt: skip
    drop = n - max_length
    start = first if drop < last - first else head
    ids, spans = ids[:start] + ids[start + drop :], spans[:start] + spans[start + drop :]
    return replace(one, ids=ids, spans=spans, cut=drop)


def _content_tokens(one: Encoded, prompt: Prompt, text: str, head: int) -> tuple[int, int] | None:
    """The range of tokens that lie within the last user's turn; None for plain text."""
    users = [i for i, role in enumerate(roles_of(prompt)) if role == "user"]
    turn = find_turns(prompt, text, one.frame)[users[-1]] if users else None
    if turn is None or text == prompt.user or one.spans[-1][1] < 0:
        return None
    at, end = turn
    inside = [i for i, (a, b) in enumerate(one.spans) if i >= head and at <= a and (a < b <= end or a == b < end)]
    return (inside[0], inside[-1] + 1) if inside else None


def response_ids(prompt: Prompt, response: str, tokenizer: Any, *, end: bool = True) -> tuple[list[int], list[int]]:
    """(ids of the prompt, ids of the assistant's answer), as the template would write the answer after its header.

    The conversation is rendered with and without the answer; what it adds is tokenised with the prompt where that
    leaves the prompt's tokens as they are, else on its own. `end` keeps the end-of-turn token (the tokenizer's EOS
    where the template writes none). Without a template the answer is a space, the response, and the EOS.
    """
    text = _render(prompt, tokenizer, True)
    added = _added_text(prompt, response, text, tokenizer)
    prompt_ids = encode([prompt], tokenizer)[0]
    answer = _continuation(prompt_ids, text, added, tokenizer)
    at = added.rfind(response.strip())
    body = _continuation(prompt_ids, text, added if at < 0 else added[: at + len(response.strip())], tokenizer)
    if not end:
        return prompt_ids, body
    special = set(tokenizer.all_special_ids) | _special_added(tokenizer)
    stop = next((i for i in range(min(len(body), len(answer)), len(answer)) if answer[i] in special), None)
    if stop is not None:
        return prompt_ids, answer[: stop + 1]
    return prompt_ids, body + ([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])


def _added_text(prompt: Prompt, response: str, text: str, tokenizer: Any) -> str:
    if prompt.messages is None or not getattr(tokenizer, "chat_template", None):
        gap = "" if text[-1:].isspace() or response[:1].isspace() else " "
        return gap + response
    turn = {"role": "assistant", "content": response}
    whole = _render(replace(prompt, messages=(*prompt.messages, turn)), tokenizer, False)
    if whole.startswith(text):
        return whole[len(text) :]
    at = whole.rfind(response.strip())  # a template that changes earlier turns once an answer follows
    if at < 0:
        raise UserError(f"prompt {prompt.id!r}: the chat template does not write the assistant's answer as given")
    return whole[at:]


def _continuation(prompt_ids: list[int], text: str, added: str, tokenizer: Any) -> list[int]:
    leading, bos = leading_ids(tokenizer), tokenizer.bos_token_id
    joint = list(tokenizer(text + added, add_special_tokens=False, verbose=False)["input_ids"])
    joint = _with_leading(Encoded(joint, [(0, 0)] * len(joint)), leading, bos).ids
    if joint[: len(prompt_ids)] == prompt_ids:
        return joint[len(prompt_ids) :]
    return list(tokenizer(added, add_special_tokens=False, verbose=False)["input_ids"])


def _special_added(tokenizer: Any) -> set[int]:
    return {int(i) for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}


def special_ids(tokenizer: Any) -> set[int]:
    """Every token that stands for no text: BOS, EOS, padding, and the markers of the chat template.

    The bytes of a byte fallback (<0x41>) and the unknown token stand for text, also where a tokenizer calls them special.
    """
    found = {int(i) for i in tokenizer.all_special_ids} | _special_added(tokenizer)
    pieces = zip(sorted(found), tokenizer.convert_ids_to_tokens(sorted(found)), strict=True)
    text = {i for i, piece in pieces if _BYTE.fullmatch(str(piece))}
    frame = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    return found - text - ({tokenizer.unk_token_id} - frame)


def _check_plain_start(prompt: Prompt, opener: str, tokenizer: Any) -> None:
    """UserError where the template writes something of its own between the prompt and the answer's first word."""
    added = _added_text(prompt, opener, _render(prompt, tokenizer, True), tokenizer)
    before = added[: max(added.find(opener.strip()), 0)].strip()
    if before:
        raise UserError(f"the chat template writes {before[:40]!r} before an answer, so openers cannot be told apart by "
                        "their first token; give a template that puts it in the prompt")  # fmt: skip


def opener_ids(openers: Sequence[str], tokenizer: Any, prompt: Prompt) -> list[int]:
    """The first token of an answer to `prompt` that begins with each opener; each id once, in order."""
    found: list[int] = []
    for opener in openers:
        _check_plain_start(prompt, opener, tokenizer)
        answer = response_ids(prompt, opener, tokenizer, end=False)[1]
        if not answer:
            raise UserError(f"opener {opener!r} has no tokens")
        found.append(answer[0])
    return list(dict.fromkeys(found))


def partial_openers(openers: Sequence[str], tokenizer: Any, prompt: Prompt) -> dict[str, str]:
    """The openers of which the first token is only the beginning of a word, with that token's text: answers that begin
    with another word of the same beginning count as theirs in log-odds."""
    found = {}
    for opener in openers:
        first = tokenizer.decode(response_ids(prompt, opener, tokenizer, end=False)[1][:1]).strip()
        if first != opener.split()[0] and opener.split()[0].startswith(first):
            found[opener] = first
    return found


def pad(batch: Sequence[Sequence[int]], pad_id: int, side: str) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]:
    """(ids, mask) of a batch, padded on the `left` or the `right`.

    >>> ids, mask = pad([[5, 6, 7], [8]], 0, "right")
    >>> ids.tolist(), mask.tolist()
    ([[5, 6, 7], [8, 0, 0]], [[1, 1, 1], [1, 0, 0]])
    """
    if side not in ("left", "right"):
        raise UserError(f"side={side!r}: allowed are 'left' and 'right'")
    width = max(len(row) for row in batch)
    ids = torch.full((len(batch), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(batch), width), dtype=torch.int64)
    for i, row in enumerate(batch):
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, at] = torch.tensor(row, dtype=torch.int64)
        mask[i, at] = 1
    return ids, mask
