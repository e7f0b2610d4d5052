"""Which positions of a prompt to keep: by place, by turn, by characters, or by a predicate of one's own."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import partial
from types import CodeType
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .turns import Span, content_text, find_turns, missing_turn, roles_of

if TYPE_CHECKING:
    from .prompts import Prompt
    from .rendering import Encoded

WITH_SPECIAL = "+special"
POLICIES = ("last", "all", "first:n", "last:n", "every:n", "response", "assistant", "user", "spans", "spans:KEY")
TURNS = ("response", "assistant", "user")


@dataclass(frozen=True)
class Token:
    """A token as a predicate sees it.

    text: the characters that it completes; "" where it completes none (a piece of a character, an added BOS).
    start, end: those characters in the rendered text. position: its place in the prompt, from 0.
    role, turn: the message that it belongs to and its number; None in the template's own text and in plain text.
    special: whether it stands for no text; special tokens are shown only to a `Predicate` that asks for them.
    """

    text: str
    id: int
    position: int
    start: int
    end: int
    role: str | None
    turn: int | None
    prompt: Prompt
    special: bool = False


@dataclass(frozen=True)
class Predicate:
    """A predicate that is asked of special tokens too; a plain function is asked of all others.

    >>> keep_ends = Predicate(lambda token: token.special or token.text.endswith("."), special=True)
    """

    keep: Callable[[Token], Any]
    special: bool = True

    def __call__(self, token: Token) -> bool:
        return bool(self.keep(token))


Policy = str | Callable[[Token], Any]


def check_tokens(policy: Policy) -> Policy:
    """Returns `policy`, or raises UserError naming those that are allowed."""
    if callable(policy):
        return policy
    name = str(policy).removesuffix(WITH_SPECIAL)
    kind, colon, argument = name.partition(":")
    counted = kind in ("first", "last", "every") and argument.isascii() and argument.isdigit() and int(argument) > 0
    keyed = kind == "spans" and bool(argument) == bool(colon)
    if not (counted or keyed or name in ("last", "all", *TURNS)):
        raise UserError(f"unknown tokens {policy!r}; allowed: {', '.join(POLICIES)}, each with {WITH_SPECIAL} to keep "
                        "special tokens too; or a function of a Token")  # fmt: skip
    return policy


def policy_name(policy: Policy) -> str:
    """What a manifest records: the policy itself; of a function its name and a hash of its source.

    Plain values that the function closes over or has as defaults are part of the hash, other objects are not.

    >>> policy_name("first:3"), policy_name(str.isupper)
    ('first:3', 'builtins.str.isupper')
    """
    if isinstance(policy, str):
        return policy
    if isinstance(policy, Predicate):
        return policy_name(policy.keep) + (WITH_SPECIAL if policy.special else "")
    values: list[Any] = []
    while isinstance(policy, partial):
        values += [*policy.args, *sorted(policy.keywords.items())]
        policy = policy.func
    named: Any = policy if hasattr(policy, "__qualname__") else type(policy)
    name, source = f"{getattr(named, '__module__', None) or 'builtins'}.{named.__qualname__}", _source(named)
    values += getattr(named, "__defaults__", None) or ()
    values += [cell.cell_contents for cell in getattr(named, "__closure__", None) or ()]
    plain = [repr(v) for v in values if isinstance(v, (str, int, float, bool, tuple, type(None)))]
    return f"{name}#{hashlib.sha256(repr([source, plain]).encode()).hexdigest()[:12]}" if source else name


def _source(function: Any) -> str:
    """The source of a function or class; where there is none (a console), its code; "" of built-in ones."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        return _code(code) if code is not None else ""


def _code(code: CodeType) -> str:
    constants = [_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return repr([code.co_code.hex(), constants, code.co_names])


def choose(policy: Policy, encoded: Encoded, prompt: Prompt, text: str, special: Set[int]) -> list[int]:
    """The positions that a policy keeps of one prompt, in order.

    policy: `last` the last token, whatever it is; `all`; `first:n` and `last:n`; `every:n` the 1st, n+1st, 2n+1st.
        `response`: the content of the assistant's turn that ends the chat; `assistant`, `user`: of every such turn
        (`user` of a plain text: all of it). `spans`, `spans:KEY`: the characters that the prompt's meta names under
        `spans`, or KEY: a list of [start, end), of the plain text or of the content of the last user's turn, or of
        [message, start, end), of the content of the message of that number (-1 the last), as they were given, before
        any template. A token belongs to characters if it covers one of them, in part or whole. Or a function of a
        `Token` that says whether to keep it.
        All but `last` pass over special tokens, unless `+special` is appended (for a function: see `Predicate`).
    encoded: the prompt as `encode_spans` gives it. text: the rendered prompt. special: the ids of special tokens.
    Raises UserError for another policy, for `response` of a chat that the assistant's turn does not end, for a turn
    that the template rewrites, for spans that are missing or not within their text, and where turns or characters are
    asked of a tokenizer that gives no offsets.
    """
    check_tokens(policy)
    name = policy if isinstance(policy, str) else ""
    if name.removesuffix(WITH_SPECIAL) == "last":
        return [len(encoded.ids) - 1] if encoded.ids else []
    keep_special = getattr(policy, "special", False) is True if callable(policy) else name.endswith(WITH_SPECIAL)
    kept = [i for i, token in enumerate(encoded.ids) if keep_special or token not in special]
    if callable(policy):
        tokens = _tokens(kept, encoded, prompt, text, special)
        return [token.position for token in tokens if policy(token)]
    kind, _, argument = name.removesuffix(WITH_SPECIAL).partition(":")
    if kind in TURNS:
        return _within(kept, encoded, _wanted_turns(kind, encoded, prompt, text), prompt)
    if kind == "spans":
        return _within(kept, encoded, _meta_spans(argument or "spans", encoded, prompt, text), prompt)
    if kind == "first":
        return kept[: int(argument)]
    if kind == "last":
        return kept[-int(argument) :]
    return kept[:: int(argument)] if kind == "every" else kept


def _within(kept: Sequence[int], encoded: Encoded, wanted: Sequence[Span], prompt: Prompt) -> list[int]:
    """Of the positions `kept`, those whose token covers a character of `wanted`, or is a piece of one."""
    if any(end < 0 for _, end in encoded.spans):
        raise UserError(f"prompt {prompt.id!r}: its tokenizer gives no offsets, so that characters and turns cannot be "
                        "told; choose tokens last, all, first:n, last:n or every:n")  # fmt: skip
    found = []
    for i in kept:
        start, end = encoded.spans[i]
        if any(start < b and a < end if end > start else a <= start < b for a, b in wanted if a < b):
            found.append(i)
    return found


def _wanted_turns(kind: str, encoded: Encoded, prompt: Prompt, text: str) -> list[Span]:
    roles = roles_of(prompt)
    if prompt.messages is None and kind == "user":
        return [(0, len(text))]
    if kind == "response" and roles[-1:] != ("assistant",):
        what = f"a chat that ends with the {roles[-1]}'s turn" if roles else "a plain text"
        raise UserError(f"prompt {prompt.id!r} is {what}; tokens='response' keeps the assistant's turn at the end: add "
                        "the answers to the chats, or choose other tokens")  # fmt: skip
    numbers = [len(roles) - 1] if kind == "response" else [i for i, role in enumerate(roles) if role == kind]
    turns = find_turns(prompt, text, encoded.frame)
    wanted = []
    for number in numbers:
        turn = turns[number]
        if turn is None:
            raise missing_turn(prompt, number)
        wanted.append(turn)
    return wanted


def _meta_spans(key: str, encoded: Encoded, prompt: Prompt, text: str) -> list[Span]:
    given = prompt.meta.get(key)
    form = "a list of [start, end] or [message, start, end] in characters"
    if not isinstance(given, (list, tuple)):
        what = (
            f"is {given!r:.60}" if key in prompt.meta else f"is missing (it has {', '.join(prompt.meta) or 'nothing'})"
        )
        raise UserError(f"prompt {prompt.id!r}: tokens 'spans' reads meta[{key!r}], which {what}; give {form}")
    wanted = []
    for span in given:
        whole = isinstance(span, (list, tuple)) and all(type(value) is int for value in span)
        if not whole or len(span) not in (2, 3) or (len(span) == 3 and prompt.messages is None):
            raise UserError(f"prompt {prompt.id!r}: span {span!r:.60} of meta[{key!r}] is not understood; give {form}")
        wanted.append(_place(list(span), encoded, prompt, text))
    return wanted


def _place(span: list[int], encoded: Encoded, prompt: Prompt, text: str) -> Span:
    """The characters of the rendered text that a span of a content means."""
    start, end = span[-2:]
    content, (at, stop), lead = text, (0, len(text)), 0
    if prompt.messages is not None:
        users = [i for i, role in enumerate(roles_of(prompt)) if role == "user"]
        number = span[0] if len(span) == 3 else users[-1]
        if not -len(prompt.messages) <= number < len(prompt.messages):
            raise UserError(f"prompt {prompt.id!r}: span {span} names message {number} of {len(prompt.messages)}")
        number %= len(prompt.messages)
        content, turn = content_text(prompt.messages[number]), find_turns(prompt, text, encoded.frame)[number]
        if turn is None:
            raise missing_turn(prompt, number)
        (at, stop), lead = turn, max(content.find(text[turn[0] : turn[1]]), 0)
    if not 0 <= start <= end <= len(content):
        raise UserError(f"prompt {prompt.id!r}: span {span} is not within its text of {len(content)} characters")
    return max(at + start - lead, at), min(at + end - lead, stop)


def _tokens(kept: Sequence[int], encoded: Encoded, prompt: Prompt, text: str, special: Set[int]) -> list[Token]:
    turns = find_turns(prompt, text, encoded.frame)
    owner = {i: n for n, turn in enumerate(turns) if turn is not None and encoded.spans[-1][1] >= 0
             for i in _within(kept, encoded, [turn], prompt)}  # fmt: skip
    roles = roles_of(prompt)
    found = []
    for i in kept:
        (start, end), turn = encoded.spans[i], owner.get(i)
        role = None if turn is None else roles[turn]
        covered = text[start:end] if end > start >= 0 else ""
        found.append(Token(covered, encoded.ids[i], i, start, end, role, turn, prompt, encoded.ids[i] in special))
    return found
