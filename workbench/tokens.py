"""Which positions of a prompt to keep, and which tokens of two tokenizers end at the same character."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import UserError

WITH_SPECIAL = "+special"
POLICIES = ("last", "all", "first:n", "last:n", "every:n")


def check_tokens(policy: str) -> str:
    """Returns `policy`, or raises UserError naming those that are allowed."""
    kind, _, count = policy.removesuffix(WITH_SPECIAL).partition(":")
    counted = count.isdigit() and int(count) > 0 and kind in ("first", "last", "every")
    if not counted and policy.removesuffix(WITH_SPECIAL) not in ("last", "all"):
        raise UserError(f"unknown tokens {policy!r}; allowed: {', '.join(POLICIES)}, each with {WITH_SPECIAL} to keep "
                        "special tokens too")  # fmt: skip
    return policy


def select(policy: str, ids: Sequence[int], mask_special: Sequence[bool]) -> list[int]:
    """The positions that a policy keeps of one prompt, in order.

    policy: `last` the last token, whatever it is; `all`; `first:n` and `last:n`; `every:n` the 1st, n+1st, 2n+1st.
        All but `last` pass over special tokens, unless `+special` is appended.
    ids: the token ids of the prompt, without padding. mask_special: True where a token is special.
    Raises UserError for another policy.

    >>> special = [True, False, False, True]
    >>> select("last", [1, 5, 6, 2], special), select("all", [1, 5, 6, 2], special)
    ([3], [1, 2])
    """
    kind, _, count = check_tokens(policy).removesuffix(WITH_SPECIAL).partition(":")
    if kind == "last" and not count:
        return [len(ids) - 1] if len(ids) else []
    keep_special = policy.endswith(WITH_SPECIAL)
    kept = [i for i in range(len(ids)) if keep_special or not mask_special[i]]
    if kind == "first":
        return kept[: int(count)]
    if kind == "last":
        return kept[-int(count) :]
    if kind == "every":
        return kept[:: int(count)]
    return kept


def shared_ends(a: Sequence[tuple[int, int]], b: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The pairs (i, j) of tokens of two tokenizations of one text that end at the same character.

    a, b: the characters (start, end) that each token covers, as in `encode_spans`. Tokens of no characters are passed
    over; where several end at one character (the bytes of an emoji), it is the last of them that completes it.

    >>> shared_ends([(0, 2), (2, 5)], [(0, 1), (1, 2), (2, 4), (4, 5)])
    [(0, 1), (1, 3)]
    """
    ends = [{end: i for i, (start, end) in enumerate(spans) if end > start >= 0} for spans in (a, b)]
    return [(ends[0][end], ends[1][end]) for end in sorted(ends[0].keys() & ends[1].keys())]
