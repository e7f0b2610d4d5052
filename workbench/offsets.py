"""Which characters of a text each token completes: a tokenizer's offsets, mended where they are not exact.

Offsets of real tokenizers say which characters a token touches. Several pieces of one emoji all have its offsets, a
token may end in the middle of a character, a dummy space in front counts as the first character, and leading spaces may
be trimmed away. Here a token that ends between two characters has the characters since the last such end, and any other
token has none, so that of every token of some width, `end` is a place at which the tokenization has a true boundary.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_left
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any

Span = tuple[int, int]
UNKNOWN: Span = (-1, -1)


class Offsets:
    """The spans of the tokens of one tokenizer, fast or slow.

    A token of a byte-level or SentencePiece vocabulary spells its bytes. Where the bytes of all tokens are the text,
    they say exactly where each ends; else (normalisers, WordPiece, unknown tokens) the tokenizer's own offsets are taken
    to mean what they touch. A slow tokenizer that gives no offsets and does not spell the text has UNKNOWN spans.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.added = {int(i): str(token.content) for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = repr(getattr(backend, "decoder", None))
        self.spelling = () if "WordPiece(" in decoder else (_byte_level, _sentencepiece)
        self._known: list[dict[int, bytes | None]] = [{} for _ in self.spelling]

    def spans(self, text: str, ids: Sequence[int], offsets: Sequence[Span] | None) -> list[Span]:
        """The characters [start, end) of `text` that each token completes; offsets: the tokenizer's own, if any."""
        if offsets is not None and _tiles(offsets, len(text)):
            return list(offsets)
        for number in range(len(self.spelling)):
            exact = self._spelled(text, ids, number)
            if exact is not None:
                return exact
        if offsets is not None:
            return completed(_with_marks(text, offsets))
        pieces = [self.tokenizer.decode([i]) for i in ids]
        if "".join(pieces) != text:
            return [UNKNOWN] * len(ids)
        ends = list(accumulate(map(len, pieces)))
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def _spelled(self, text: str, ids: Sequence[int], number: int) -> list[Span] | None:
        """The spans where the tokens spell the text, byte by byte; None where they do not."""
        raw = text.encode("utf-8")
        widths: list[int] = []
        at = first = 0
        while first < len(ids):  # a run of ordinary tokens and the added token behind it
            last = next((i for i in range(first, len(ids)) if ids[i] in self.added), len(ids))
            pieces = [self._bytes(i, number) for i in ids[first:last]]
            marker = self.added[ids[last]].encode("utf-8", "replace") if last < len(ids) else b""
            known = [p for p in pieces if p is not None]
            if len(known) < len(pieces):
                return None
            run = [len(p) for p in known]
            joined = b"".join(known)
            if not _stands(raw, at, joined + marker, last == len(ids)):
                if not joined.startswith(b" ") or not _stands(raw, at, joined[1:] + marker, last == len(ids)):
                    return None
                run[0] -= 1  # the dummy space that SentencePiece puts in front
            widths += [*run, len(marker)] if last < len(ids) else run
            at += sum(run) + len(marker)
            first = last + 1
        return _from_widths(text, widths) if at == len(raw) else None

    def _bytes(self, token: int, number: int) -> bytes | None:
        known = self._known[number]
        if token not in known:
            known[token] = self.spelling[number](str(self.tokenizer.convert_ids_to_tokens(token)))
        return known[token]


def _tiles(offsets: Sequence[Span], length: int) -> bool:
    at = 0
    for start, end in offsets:
        if start != at or end <= start:
            return False
        at = end
    return at == length


def _stands(raw: bytes, at: int, part: bytes, last: bool) -> bool:
    return raw.startswith(part, at) and (not last or at + len(part) == len(raw))


def _from_widths(text: str, widths: Sequence[int]) -> list[Span]:
    """The characters that tokens of these widths (in UTF-8 bytes) complete."""
    edges = [0, *accumulate(len(c.encode("utf-8")) for c in text)]  # where character i begins
    spans, start = [], 0
    for end in accumulate(widths):
        at = bisect_left(edges, end)
        if edges[at] != end or at == start:  # inside a character, or no byte of its own
            spans.append((start, start))
            continue
        spans.append((start, at))
        start = at
    return spans


def completed(offsets: Sequence[Span]) -> list[Span]:
    """The same offsets, of which a token that a later token reaches back into completes nothing.

    >>> completed([(0, 1), (0, 2), (1, 2), (2, 5)])
    [(0, 0), (0, 0), (0, 2), (2, 5)]
    """
    reach = [UNKNOWN[0]] * len(offsets)  # where the tokens behind begin
    first = 1 << 62
    for i in range(len(offsets) - 1, -1, -1):
        reach[i] = first
        if offsets[i][1] > offsets[i][0]:
            first = min(first, offsets[i][0])
    spans: list[Span] = []
    done, begin, far = 0, -1, 0  # begin: of the characters touched since the last boundary; far: how far they go
    for (start, end), behind in zip(offsets, reach, strict=True):
        if end <= start:
            spans.append((max(start, done), max(start, done)) if begin < 0 else (begin, begin))
            continue
        begin, far = (start if begin < 0 else min(begin, start)), max(far, end)
        begin = max(begin, done)
        if far > behind or far <= begin:
            spans.append((begin, begin))
            continue
        spans.append((begin, far))
        done, begin = far, -1
    return spans


def _with_marks(text: str, offsets: Sequence[Span]) -> list[Span]:
    """Offsets in which a combining mark that no token has belongs to the token before it: the normaliser took both."""
    starts = sorted({start for start, end in offsets if end > start})
    spans = []
    for start, end in offsets:
        if end > start:
            at = bisect_left(starts, end)
            limit = starts[at] if at < len(starts) else len(text)
            while end < limit and _joins(text[end]):
                end += 1
        spans.append((start, end))
    return spans


def _joins(char: str) -> bool:
    """Whether a normaliser may melt this character into the one before: marks, Hangul vowels and finals."""
    number = ord(char)
    hangul = 0x1160 <= number <= 0x11FF or 0xD7B0 <= number <= 0xD7FF
    return hangul or number in (0xFF9E, 0xFF9F) or unicodedata.category(char).startswith("M")


@cache
def _alphabet() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def _byte_level(token: str) -> bytes | None:
    table = _alphabet()
    return bytes(table[c] for c in token) if all(c in table for c in token) else None


def _sentencepiece(token: str) -> bytes | None:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode("utf-8", "replace")
