"""Which tokens of two tokenizations, by two templates, end at the same character of the same content."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from .errors import UserError
from .prompts import Prompt
from .store.checks import TABLES
from .turns import Frame, Frames, content_text, find_turns

if TYPE_CHECKING:
    from .rendering import Encoded
    from .store import Store

PROMPTS = 4096  # read at a time
ROWS = 1 << 18
COLUMNS = ["id", "text", "content", "n_tokens"]  # of a prompt, to be aligned


def shared_ends(a: Sequence[tuple[int, int]], b: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The pairs (i, j) of tokens of two tokenizations of one text that end at the same character.

    a, b: the characters (start, end) that each token covers, as in `Encoded.spans`. Tokens of no characters are passed
    over, and so are those that a later token reaches back into (a piece of an emoji): they do not end there.

    >>> shared_ends([(0, 2), (2, 5)], [(0, 1), (1, 2), (2, 4), (4, 5)])
    [(0, 1), (1, 3)]
    """
    ends = [_ends(spans) for spans in (a, b)]
    return [(ends[0][end], ends[1][end]) for end in sorted(ends[0].keys() & ends[1].keys())]


def _ends(spans: Sequence[tuple[int, int]]) -> dict[int, int]:
    ends, first = {}, 1 << 62
    for i in range(len(spans) - 1, -1, -1):
        start, end = spans[i]
        if 0 <= start < end:
            if end <= first:
                ends[end] = i
            first = min(first, start)
    return ends


def align(prompt: Prompt, text_a: str, encoded_a: Encoded, text_b: str, encoded_b: Encoded) -> list[tuple[int, int]]:
    """The pairs (i, j) of positions of one prompt in two models that end at the same character of the same content.

    text_a, text_b: the prompt as rendered for each; encoded_a, encoded_b: as `encode_spans` gives them, cut or whole.
    Where both read the same text, characters are those of the text. Else each message's content is compared with
    itself, whatever the templates write around it or strip off it; tokens that end in the template's own text have no
    partner. The last tokens of a chat (mostly the ends of the two assistant headers) are always a pair.
    Pairs ascend in i, and in j too where both templates write the messages in the same order.
    Raises UserError where a tokenizer gives no offsets.
    """
    for one in (encoded_a, encoded_b):
        if any(end < 0 for _, end in one.spans):
            raise UserError(f"prompt {prompt.id!r}: a tokenizer gives no offsets, so its tokens cannot be aligned; load "
                            "the fast tokenizer, or use the last tokens only")  # fmt: skip
    if text_a == text_b or prompt.messages is None:
        pairs = shared_ends(encoded_a.spans, encoded_b.spans)
    else:
        contents = [content_text(m) for m in prompt.messages]
        ends = [_content_ends(prompt, contents, text, one.spans, one.frame)
                for text, one in ((text_a, encoded_a), (text_b, encoded_b))]  # fmt: skip
        pairs = sorted((ends[0][key], ends[1][key]) for key in ends[0].keys() & ends[1].keys())
    if prompt.messages is None:
        return pairs
    last = (len(encoded_a.ids) - 1, len(encoded_b.ids) - 1)
    return [*(pair for pair in pairs if pair[0] != last[0] and pair[1] != last[1]), last]


def _content_ends(
    prompt: Prompt, contents: list[str], text: str, spans: Sequence[tuple[int, int]], frame: Frame | None
) -> dict[tuple[int, int], int]:
    """(message, character of its content) -> the token that ends there."""
    places = {}
    for number, (content, turn) in enumerate(zip(contents, find_turns(prompt, text, frame), strict=True)):
        if turn is not None:
            lead = _lead(content, text, turn)
            places.update({at: (number, at - turn[0] + lead) for at in range(turn[0] + 1, turn[1] + 1)})
    return {places[end]: i for end, i in _ends(spans).items() if end in places}


def _lead(content: str, text: str, turn: tuple[int, int]) -> int:
    """How many characters the template left off the front of a content."""
    return max(content.find(text[turn[0] : turn[1]]), 0)


def pair_rows(a: Store, b: Store, prompts: Sequence[int] | None = None) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """The rows of two stores over the same prompts whose tokens are pairs, as `align` has them: a[rows_a], b[rows_b].

    The stores may be of models with other tokenizers and templates, and may keep other positions of each prompt: a pair
    needs both. Prompts are read a few thousand at a time. Where the texts of a prompt differ, the frame of each template
    is learned from the prompts themselves.
    prompts: the indices of some, whose rows alone are read and paired; all unless given.
    Raises UserError for stores of other prompts, for a prompt that is not there, for a store whose tokenizer gave no
    offsets, and where there is no pair.

    >>> rows_a, rows_b = pair_rows(donor, recipient)  # doctest: +SKIP
    >>> x, y = donor.read(site, rows_a), recipient.read(other, rows_b)  # doctest: +SKIP
    """
    if a.prompt_hash != b.prompt_hash:
        names = [f"{s.manifest['prompts']['name']}, {s.prompt_hash[:12]}" for s in (a, b)]
        raise UserError(f"stores {a.path} and {b.path} hold different prompts ({names[0]} and {names[1]}), so no row of one "
                        "answers to a row of the other; profile both models over the same prompts")  # fmt: skip
    frames = Frames(), Frames()
    rows_a, rows_b = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    index = None if prompts is None else np.unique(np.asarray(prompts, dtype=np.int64))
    parts = (_parts(store) if index is None else _chosen(store, index) for store in (a, b))
    for part_a, part_b in zip(*parts, strict=True):
        keys_a, keys_b = _keys(part_a, part_b, frames)
        _, at_a, at_b = np.intersect1d(keys_a, keys_b, return_indices=True)
        real = keys_a[at_a] >= 0
        order = np.argsort(at_a[real], kind="stable")
        rows_a.append(part_a.row[at_a[real][order]])
        rows_b.append(part_b.row[at_b[real][order]])
    found = np.concatenate(rows_a), np.concatenate(rows_b)
    if not len(found[0]):
        raise UserError(f"stores {a.path} (tokens {a.tokens}) and {b.path} (tokens {b.tokens}) hold no tokens that end at "
                        "the same character; profile both with tokens all")  # fmt: skip
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])


@dataclass(frozen=True)
class _Part:
    """Some thousand prompts of a store, one after another, and their rows; `prompt` counts from the part's first."""

    prompts: list[Prompt]
    texts: list[str]
    n_tokens: np.ndarray
    row: np.ndarray  # [n], and so are those below
    prompt: np.ndarray
    position: np.ndarray
    start: np.ndarray
    end: np.ndarray


def _parts(store: Store) -> Iterator[_Part]:
    lines, rows = _lines(store, COLUMNS), _Rows(store)
    first = 0
    while taken := list(islice(lines, PROMPTS)):
        row, prompt, *places = rows.until(first + len(taken))
        yield _part(store, taken, row, prompt - first, places)
        first += len(taken)


def _chosen(store: Store, index: np.ndarray) -> Iterator[_Part]:
    """Some prompts, and their rows, in one part, if there are any; no other line of the tables is looked at."""
    _check_contents(store)
    if not len(index):
        return
    spans = [store.tables.rows_of(int(number)) for number in index]
    where = np.concatenate([np.arange(span.start, span.stop) for span in spans])
    row, prompt, *places = _arrays(store.path, store.tables.take(TABLES[0], where, _Rows.columns))
    lines = store.tables.take(TABLES[1], index, COLUMNS).to_pylist()
    yield _part(store, lines, row, np.searchsorted(index, prompt), places)


def _part(
    store: Store, lines: list[dict[str, Any]], row: np.ndarray, prompt: np.ndarray, places: list[np.ndarray]
) -> _Part:
    position, start, end = places
    if len(end) and int(end.min()) < 0:
        raise UserError(f"store {store.path}: the tokenizer of {store.name} gave no offsets, so its rows cannot be "
                        "aligned; load its fast tokenizer and profile again")  # fmt: skip
    n_tokens = np.array([line["n_tokens"] for line in lines])
    texts = [line["text"] for line in lines]
    return _Part([_prompt(line) for line in lines], texts, n_tokens, row, prompt, position, start, end)


def _lines(store: Store, columns: list[str]) -> Iterator[dict[str, Any]]:
    _check_contents(store)
    for batch in store.tables.batches(TABLES[1], columns, PROMPTS):
        yield from batch.to_pylist()


def _check_contents(store: Store) -> None:
    if "content" not in store.tables.columns(TABLES[1]):
        raise UserError(f"store {store.path} keeps no contents of its prompts: an earlier version wrote it; profile "
                        "again")  # fmt: skip


def _prompt(line: dict[str, Any]) -> Prompt:
    content = json.loads(line["content"])
    plain = isinstance(content, str)
    return Prompt(None if plain else tuple(content), content if plain else None, line["id"])


class _Rows:
    """The rows of a store in order, taken prompt by prompt."""

    columns = ("row", "prompt", "position", "char_start", "char_end")

    def __init__(self, store: Store) -> None:
        self._path = store.path
        self._batches = store.tables.batches(TABLES[0], self.columns, ROWS)
        self._left: list[np.ndarray] = [np.empty(0, np.int64) for _ in self.columns]

    def until(self, prompt: int) -> list[np.ndarray]:
        """The columns of the rows that come before this prompt and were not taken yet."""
        parts = [self._left]
        while not len(parts[-1][1]) or parts[-1][1][-1] < prompt:
            batch = next(self._batches, None)
            if batch is None:
                break
            parts.append(_arrays(self._path, batch))
        whole = [np.concatenate(column) for column in zip(*parts, strict=True)]
        at = int(np.searchsorted(whole[1], prompt))
        self._left = [column[at:] for column in whole]
        return [column[:at] for column in whole]


def _arrays(path: Path, table: Any) -> list[np.ndarray]:
    """The columns of `_Rows` of a pyarrow table."""
    if any(table.column(name).null_count for name in _Rows.columns):
        raise UserError(f"store {path}: an imported store does not say which characters its rows stand for, so they "
                        "cannot be aligned; profile the model again")  # fmt: skip
    return [table.column(name).to_numpy(zero_copy_only=False).astype(np.int64) for name in _Rows.columns]


def _keys(a: _Part, b: _Part, frames: tuple[Frames, Frames]) -> tuple[np.ndarray, np.ndarray]:
    """A number for each row of both parts, equal where two rows are a pair; below 0: no pair."""
    same = np.array([x == y or p.messages is None for p, x, y in zip(a.prompts, a.texts, b.texts, strict=True)])
    contents = [[content_text(m) for m in p.messages or ()] for p in a.prompts]
    room = [1 + max(len(x), len(y), sum(map(len, c))) for x, y, c in zip(a.texts, b.texts, contents, strict=True)]
    base = np.cumsum([0, *(r + 1 for r in room)])[:-1]  # of each prompt: its last token, then its characters
    chat = np.array([p.messages is not None for p in a.prompts])
    keys = []
    for part, known in ((a, frames[0]), (b, frames[1])):
        key = np.where(same[part.prompt], base[part.prompt] + 1 + part.end, -1)
        if not same.all():
            inside = _content_keys(part, known, same, contents, base)
            key = np.where(same[part.prompt], key, inside)
        key[~_completes(part)] = -1
        last = chat[part.prompt] & (part.position == part.n_tokens[part.prompt] - 1)
        key = np.where(last, base[part.prompt], key)
        keys.append(key)
    return keys[0], keys[1]


def _completes(part: _Part) -> np.ndarray:
    """Whether a row's token ends between two characters: it has some, and the next one kept does not reach back."""
    ends = part.end > part.start
    back = (part.prompt[1:] == part.prompt[:-1]) & (part.start[1:] < part.end[:-1]) & ends[1:]
    ends[:-1] &= ~back
    return ends


def _content_keys(
    part: _Part, known: Frames, same: np.ndarray, contents: list[list[str]], base: np.ndarray
) -> np.ndarray:
    """The key of each row by the character of the content at which it ends; -1 in the template's own text."""
    for prompt, text, equal in zip(part.prompts, part.texts, same, strict=True):
        if not equal:
            known.learn(prompt, text)
    places = np.cumsum([0, *(len(text) + 1 for text in part.texts)])  # of each prompt in all the texts in a row
    turns = []  # (start, end, key of the character at start)
    for i, (prompt, text) in enumerate(zip(part.prompts, part.texts, strict=True)):
        if same[i]:
            continue
        at = int(base[i]) + 1
        for content, turn in zip(contents[i], find_turns(prompt, text, known.get(prompt)), strict=True):
            if turn is not None:
                shift = int(places[i])
                turns.append((turn[0] + shift, turn[1] + shift, at + _lead(content, text, turn)))
            at += len(content)
    if not turns:
        return np.full(len(part.row), -1)
    start, end, first = np.array(sorted(turns)).T
    ends = places[part.prompt] + part.end
    turn = np.searchsorted(start, ends, side="left") - 1  # the last that begins before the row ends
    within = (turn >= 0) & (ends <= end[turn])
    return np.where(within, first[turn] + ends - start[turn], -1)
