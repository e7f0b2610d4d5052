"""Lengths: how many sequences of which lengths a step reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import UserError


@dataclass(frozen=True)
class Lengths:
    """Sequences counted by their number of tokens; `counts` may hold fractions, of texts that were not counted one by one.

    >>> texts = Lengths.of([3, 3, 5])
    >>> texts.tokens, texts.sequences, texts.longest, Lengths.even(1000, 200).sequences
    (11.0, 3.0, 5, 5.0)
    """

    counts: Mapping[int, float]

    @classmethod
    def of(cls, lengths: Iterable[int]) -> Lengths:
        """Of sequences one by one."""
        return cls(dict(Counter(lengths)))

    @classmethod
    def even(cls, tokens: float, length: float) -> Lengths:
        """So many tokens in sequences of one length. Raises UserError for what is not above 0."""
        if not (tokens > 0 and length >= 1):
            raise UserError(f"{tokens:g} tokens in texts of {length:g} tokens are nothing to count; give more than 0")
        return cls({round(length): tokens / round(length)})

    @property
    def tokens(self) -> float:
        return float(sum(length * n for length, n in self.counts.items()))

    @property
    def sequences(self) -> float:
        return float(sum(self.counts.values()))

    @property
    def longest(self) -> int:
        return max(self.counts, default=0)

    @property
    def mean(self) -> float:
        return self.tokens / self.sequences if self.counts else 0.0

    def cut(self, longest: int) -> Lengths:
        """The same with what is longer than `longest` cut to it."""
        found: Counter[int] = Counter()
        for length, n in self.counts.items():
            found[min(length, longest)] += n  # type: ignore[assignment]
        return Lengths(dict(found))

    def first(self, n: float) -> Lengths:
        """As many sequences as `n`, of lengths like these; all where there are no more."""
        return self if n >= self.sequences else self.scaled(n / self.sequences)

    def scaled(self, times: float) -> Lengths:
        """So many times as many of each length."""
        return Lengths({length: n * times for length, n in self.counts.items()})

    def halved(self) -> Lengths:
        """Each cut after half of its tokens."""
        found: Counter[int] = Counter()
        for length, n in self.counts.items():
            found[max(1, round(length / 2))] += n  # type: ignore[assignment]
        return Lengths(dict(found))

    def longer(self, tokens: int) -> Lengths:
        """Each with so many tokens more."""
        return Lengths({length + tokens: n for length, n in self.counts.items()})
