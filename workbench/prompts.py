"""Prompts: read from anywhere, put through the chat template once, given one BOS, and hashed."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, overload

from .errors import UserError
from .hashes import json_hash, json_list_hash
from .prompt_files import Rows, read_rows
from .rendering import encode, encode_spans, opener_ids, pad, partial_openers, render, response_ids

__all__ = [
    "Prompt", "PromptSet", "encode", "encode_spans", "opener_ids", "pad", "partial_openers", "render", "response_ids",
]  # fmt: skip

log = logging.getLogger("workbench")
MESSAGES = ("messages", "conversations", "conversation")
TEXTS = ("prompt", "text", "question", "instruction")
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "tool": "tool",
    "developer": "developer",
}  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """A chat (`messages`, put through the template) or a plain `text` (read as it stands).

    `label` names its class or behaviour; `meta` holds everything else that its source said (a gold answer, say).
    """

    messages: tuple[dict[str, Any], ...] | None
    text: str | None
    id: str
    label: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def content(self) -> Any:
        """What a model reads of it, as JSON."""
        return self.text if self.messages is None else list(self.messages)

    @property
    def user(self) -> str:
        """The text, or the last user turn."""
        if self.messages is None:
            return self.text or ""
        turns = [m["content"] for m in self.messages if m["role"] == "user"]
        return str(turns[-1]) if turns else ""


@dataclass(frozen=True)
class PromptSet(Sequence[Prompt]):
    """An ordered set of prompts. Equal `hash`: the same contents in the same order, whatever their ids and labels.

    >>> prompts = PromptSet.load(["What is 2 + 2?", "Name a colour."])
    >>> len(prompts), prompts[0].user, prompts.hash[:8]
    (2, 'What is 2 + 2?', '663e5fb2')
    """

    prompts: tuple[Prompt, ...]
    name: str = "prompts"

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> PromptSet: ...
    def __getitem__(self, index: int | slice) -> Prompt | PromptSet:
        return PromptSet(self.prompts[index], self.name) if isinstance(index, slice) else self.prompts[index]

    def __add__(self, other: PromptSet) -> PromptSet:
        return PromptSet(self.prompts + other.prompts, f"{self.name}+{other.name}")

    def __repr__(self) -> str:
        return f"PromptSet({self.name!r}, {len(self)} prompts, {self.hash[:12]})"

    @property
    def hash(self) -> str:
        """sha256 over the contents: what two stores must share to be paired."""
        return json_list_hash(p.content for p in self.prompts)

    @property
    def full_hash(self) -> str:
        """sha256 over contents, ids, labels and meta: what an evaluation depends on."""
        return json_hash([[p.content, p.id, p.label, p.meta] for p in self.prompts])

    def subset(self, index: Sequence[int]) -> PromptSet:
        """The prompts at these indices, in the order given."""
        return PromptSet(tuple(self.prompts[int(i)] for i in index), self.name)

    def labelled(self, label: str) -> PromptSet:
        """The prompts of one label; UserError with the labels there are where none has it."""
        found = tuple(p for p in self.prompts if p.label == label)
        if not found:
            known = sorted({p.label for p in self.prompts if p.label is not None})
            raise UserError(f"{self.name}: no prompt is labelled {label!r}; labels: {', '.join(known) or 'none'}")
        return PromptSet(found, f"{self.name}[{label}]")

    def with_system(self, system: str) -> PromptSet:
        """The same chats with this system prompt (in place of any that they had); plain texts stay as they are.

        How many these are is told in a warning. Raises UserError where no prompt is a chat.
        """
        plain = sum(p.messages is None for p in self.prompts)
        if plain == len(self):
            raise UserError(f"{self.name}: no prompt is a chat, and plain texts keep no system prompt; leave it out, or make "
                            "them user's turns with chat=True (--chat)")  # fmt: skip
        if plain:
            log.warning("%s: %d of %d are plain texts and keep no system prompt", self.name, plain, len(self))
        head: dict[str, Any] = {"role": "system", "content": system}
        changed = [
            p if p.messages is None
            else Prompt((head, *(m for m in p.messages if m["role"] != "system")), None, p.id, p.label, p.meta)
            for p in self.prompts
        ]  # fmt: skip
        return PromptSet(tuple(changed), self.name)

    @classmethod
    def load(
        cls,
        source: str | Path | Iterable[Any] | PromptSet,
        *,
        column: str | None = None,
        limit: int | None = None,
        seed: int | None = None,
        chat: bool | None = None,
    ) -> PromptSet:
        """Reads prompts from a file, a dataset or Python values.

        source: see `prompt_files.read_rows`; or strings, dicts, chats (lists of messages) or Prompts, in a list, a
            `datasets.Dataset` or any other iterable. A row is a chat where it has `messages` (or `conversations`; in a
            CSV as JSON), else a string of its column `prompt`, `text`, `question` or `instruction`. Its `id` and
            `label` are kept, its other columns become `meta`.
        column: the column to read instead.
        limit: only so many; the first (no more of the source is read), or with `seed` a random sample in the order of
            the source.
        chat: True makes every string a user's turn, False a plain text that no template touches. Unless given, strings
            are user's turns, but for a column that is named `text`.
        Of a list of strings (turns without roles) the first is read, as the user's; how many are cut so is logged.
        Raises UserError for a source that cannot be read, an empty set, and (naming its row) an empty prompt, a chat
            with an unknown role or without a user's turn, or any chat where `chat` is False.
        """
        if limit is not None and limit < 1:
            raise UserError(f"limit={limit}: the number of prompts to read must be at least 1")
        rows, name = _rows_of(source)
        cut: list[int] = []
        if limit is not None and seed is not None:
            total = len(rows) if isinstance(rows, Sized) else sum(1 for _ in rows)
            kept = set(random.Random(seed).sample(range(total), limit)) if limit < total else range(total)
            found = [_prompt(row, i, column, chat, name, cut) for i, row in enumerate(rows) if i in kept]
        else:
            found = [_prompt(row, i, column, chat, name, cut) for i, row in enumerate(islice(rows, limit))]
        if not found:
            raise UserError(f"{name}: no prompts in it; give at least one")
        if cut:
            log.info("%s: %d of %d prompts are lists of strings, of which only the first is read, as the user's turn",
                     name, len(cut), len(found))  # fmt: skip
        return cls(tuple(found), name)


def _rows_of(source: Any) -> tuple[Iterable[Any], str]:
    """The rows of a source, which can be gone through twice, and its name."""
    if isinstance(source, PromptSet):
        return source.prompts, source.name
    if isinstance(source, (str, Path)):
        rows: Rows = read_rows(source)
        return rows, rows.name
    if hasattr(source, "keys"):
        kind = type(source).__name__
        raise UserError(f"prompts: a {kind} with {', '.join(map(str, source.keys())) or 'nothing'} is not a list of rows; "
                        "give one split of a DatasetDict, the records of a table, or a list")  # fmt: skip
    return (list(source) if isinstance(source, Iterator) else source), "prompts"


def _prompt(row: Any, index: int, column: str | None, chat: bool | None, name: str, cut: list[int]) -> Prompt:
    """The prompt of a row, whose index is added to `cut` where turns of it are left out."""
    where = f"{name}, prompt {index}"
    if isinstance(row, Prompt):
        return row
    if not isinstance(row, Mapping):
        key, value, rest = "prompt", row, {}
    else:
        key = column or next((k for k in (*MESSAGES, *TEXTS) if row.get(k) is not None), "")
        if row.get(key) is None:
            null = [k for k in ([column] if column else (*MESSAGES, *TEXTS)) if k in row]
            if null:
                raise UserError(f"{where}: its column {null[0]!r} is empty (null); fill it in or leave the row out")
            wanted = f"no column {column!r}" if column else f"none of the columns {', '.join((*MESSAGES, *TEXTS))}"
            raise UserError(f"{where}: {wanted}; it has {', '.join(map(str, row))}; choose one with column=")
        value, rest = row[key], {k: v for k, v in row.items() if k not in (key, "id", "label")}
    if key in MESSAGES and isinstance(value, str):
        value = _chat_of(value, f"{where}, column {key!r}")
    if chat is False and not isinstance(value, str):
        raise UserError(f"{where}: its {key} is no text but {_kind_of(value)}, and chat=False (--plain) reads texts; leave "
                        "that out, or choose a column of texts with column=")  # fmt: skip
    if _is_turns(value) and len(value) > 1:
        cut.append(index)
    messages, text = _content(value, key == "text" if chat is None else not chat, where)
    record = row if isinstance(row, Mapping) else {}
    identity, label = record.get("id"), record.get("label")
    identity = str(index if identity is None else identity)
    return Prompt(messages, text, identity, None if label is None else str(label), _plain(rest, where))


def _chat_of(value: str, where: str) -> Any:
    """The chat in a cell of a CSV: JSON, where it begins like a list; else the user's turn."""
    if not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as err:
        raise UserError(f"{where}: begins like a list of messages and is not JSON; write it as JSON") from err


def _content(value: Any, plain: bool, where: str) -> tuple[tuple[dict[str, Any], ...] | None, str | None]:
    if isinstance(value, str):
        if not value.strip():
            raise UserError(f"{where}: is empty; give it a text or leave it out")
        _check_unicode(value, where)
        return (None, value) if plain else (({"role": "user", "content": value},), None)
    if isinstance(value, Mapping) or not isinstance(value, Sequence) or not value:
        raise UserError(f"{where}: is {_kind_of(value)}; a prompt is a string or a list of messages")
    if _is_turns(value):  # LIMA and its kin: turns without roles; the first is the user's
        return _content(value[0], False, where)
    messages = tuple(_message(turn, where) for turn in value)
    if not any(message["role"] == "user" for message in messages):
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        raise UserError(f"{where}: the chat has no user's turn, only {roles}; give it one or leave the prompt out")
    return messages, None


def _is_turns(value: Any) -> bool:
    """Whether a prompt is a list of strings."""
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(turn, str) for turn in value)


def _kind_of(value: Any) -> str:
    name = type(value).__name__
    empty = "empty " if isinstance(value, Sequence) and not value else ""
    return f"{'an' if (empty or name)[0] in 'aeiou' else 'a'} {empty}{name}"


def _message(turn: Any, where: str) -> dict[str, Any]:
    role = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
    content = turn.get("content", turn.get("value")) if isinstance(turn, Mapping) else None
    if role is None or content is None:
        raise UserError(f'{where}: a message must be {{"role": "user", "content": "..."}}; got {turn!r:.80}')
    if str(role) not in ROLES:
        raise UserError(f"{where}: unknown role {role!r:.80}; allowed: {', '.join(ROLES)}")
    if role in ("user", "human") and isinstance(content, str) and not content.strip():
        raise UserError(f"{where}: the user's message is empty; give it a text or leave the prompt out")
    _check_unicode(str(content), where)
    extra = {k: v for k, v in turn.items() if k not in ("role", "from", "content", "value") and v is not None}
    message = {"role": ROLES[str(role)], "content": content, **_plain(extra, where)}
    try:
        json.dumps(message, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as err:
        raise UserError(f"{where}: a message holds what is no JSON value ({str(err)[:80]}); write it as text") from err
    return message


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as err:
        raise UserError(f"{where}: character {err.start} is half a surrogate pair, which no tokenizer reads") from err


def _plain(values: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """The same as JSON values: what JSON does not know becomes its string, what is missing is left out."""
    kept = {str(k): v for k, v in values.items() if v is not None and not (isinstance(v, float) and v != v)}
    try:
        return json.loads(json.dumps(kept, default=str, ensure_ascii=False))
    except RecursionError as err:
        raise UserError(f"{where}: its columns {', '.join(kept)} are nested too deep; leave them out") from err
