"""Which row is paired with which: the token that a transport starts from, for each token that it ends at."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int
from numpy.typing import NDArray

from ..errors import UserError

ATTENTION = "attention"
POSITIONS = ("same", "previous", "random", "shuffled", ATTENTION)
Index = NDArray[np.int64]


def check_positions(positions: str) -> str:
    """The name of a policy, or UserError with those that there are."""
    if positions not in POSITIONS:
        raise UserError(f"unknown positions {positions!r}; allowed: {', '.join(POSITIONS)}")
    return positions


def paired_rows(
    positions: str,
    prompt: Int[np.ndarray, " n"],
    position: Int[np.ndarray, " n"],
    rng: np.random.Generator,
) -> tuple[Index, Index]:
    """(source, target): indices of the rows that belong together, [m] each, targets ascending.

    same       the token itself
    previous   the token before it, where its row is there too
    random     an earlier token of the same prompt, drawn evenly; the first row of a prompt has none
    shuffled   a token of another prompt: see `shuffled_rows`, and `control.Control`, which does it batch by batch
    attention  of no use here: its pairing is another for each pair of sites, and comes from a model; see below

    With `attention` the source of token t, between two sites, is the token j <= t of the same prompt with the largest
    mean over heads h and over the layers l between the sites of A[l, h, t, j], the softmax weights of the attention.
    Those layers are the ones whose attention is computed after the source site and up to the target site: between
    resid_post.2 and resid_post.5, layers 3, 4 and 5. Chosen from are the tokens that have a row (so none that is special),
    the token itself among them; but not position 0, on which heads that find nothing rest (the attention sink), but in the
    comparison with BOS. Of equal ones the first is taken; a token that gives no weight to any has no source. It is one
    token and not the weighted mean of all, so that a source is a row like any other, and `same` and `previous` are cases
    of it.

    Source: arXiv:2508.17540 defines transport from (l, i) to (l + k, j) for a policy of positions, and fits i = j alone;
    neither it nor its code has a rule by attention. That averages over heads and layers say where is ours.

    Args:
        prompt, position: of each row; rows of a prompt lie together, positions ascend.

    >>> source, target = paired_rows("previous", np.array([0, 0, 0, 1]), np.array([1, 2, 4, 1]), np.random.default_rng(0))
    >>> source.tolist(), target.tolist()
    ([0], [1])
    """
    check_positions(positions)
    assert positions != ATTENTION, "sources by attention come with the rows of a model"
    every = np.arange(len(prompt), dtype=np.int64)
    if positions == "same":
        return every, every
    if positions == "shuffled":
        return shuffled_rows(prompt, rng), every
    start = np.searchsorted(prompt, prompt, side="left")
    if positions == "previous":
        target = every[1:][(prompt[1:] == prompt[:-1]) & (position[1:] == position[:-1] + 1)]
        return target - 1, target
    target = every[every > start]
    return start[target] + rng.integers(0, target - start[target]), target


def shuffled_rows(prompt: Int[np.ndarray, " n"], rng: np.random.Generator) -> Index:
    """For each row another row, each taken once, of another prompt: the control in which nothing can be carried.

    Where one prompt has more than half of the rows some keep their own prompt.
    """
    n = len(prompt)
    if not n:
        return np.empty(0, dtype=np.int64)
    names, number, counts = np.unique(prompt, return_inverse=True, return_counts=True)
    if 2 * counts.max() > n:
        return rng.permutation(n).astype(np.int64)
    # prompts in random order, their rows in random order, and each row gets what lies one longest prompt further on
    order = np.lexsort((rng.random(n), rng.permutation(len(names))[number]))
    found = np.empty(n, dtype=np.int64)
    found[order] = np.roll(order, -int(counts.max()))
    return found


def is_first(position: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Rows at position 0: the BOS where there is one, and where models without one keep the same massive activations."""
    return position == 0
