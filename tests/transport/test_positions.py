"""Each policy pairs what it says: within prompts and folds, and never with its own prompt where it is shuffled."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import UserError
from workbench.transport.positions import ATTENTION, POSITIONS, check_positions, paired_rows, shuffled_rows

COUNTS = st.lists(st.integers(1, 6), min_size=1, max_size=12)


def rows(counts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    prompt = np.repeat(np.arange(len(counts)), counts)
    position = np.concatenate([np.arange(c) for c in counts])
    return prompt, position


@settings(max_examples=50, deadline=None)
@given(COUNTS, st.integers(0, 5))
def test_sources_lie_where_the_policy_says(counts, seed):
    prompt, position = rows(counts)
    for policy in set(POSITIONS) - {ATTENTION}:  # that one needs a model
        source, target = paired_rows(policy, prompt, position, np.random.default_rng(seed))
        assert len(source) == len(target)
        assert (np.diff(target) > 0).all()
        if policy == "same":
            assert (source == target).all()
        if policy in ("previous", "random"):
            assert (prompt[source] == prompt[target]).all()
            assert (position[source] < position[target]).all()
            assert len(target) == len(prompt) - len(counts)
        if policy == "previous":
            assert (position[source] == position[target] - 1).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=6), min_size=1, max_size=6))
def test_the_previous_token_is_a_source_only_where_its_row_is_there(steps):
    """Positions with gaps: pairs are those that differ by one, each counted by hand."""
    prompt = np.repeat(np.arange(len(steps)), [len(s) for s in steps])
    position = np.concatenate([np.cumsum(s) for s in steps])
    found = paired_rows("previous", prompt, position, np.random.default_rng(0))
    place = {key: i for i, key in enumerate(zip(prompt.tolist(), position.tolist(), strict=True))}
    wanted = [(place[p, t - 1], i) for (p, t), i in place.items() if (p, t - 1) in place]
    assert list(zip(*(side.tolist() for side in found), strict=True)) == wanted


@settings(max_examples=50, deadline=None)
@given(COUNTS, st.integers(0, 5))
def test_shuffled_rows_are_a_permutation_and_leave_their_prompt(counts, seed):
    prompt, _ = rows(counts)
    found = shuffled_rows(prompt, np.random.default_rng(seed))
    assert sorted(found.tolist()) == list(range(len(prompt)))
    if 2 * max(counts) <= len(prompt):
        assert (prompt[found] != prompt).all()


def test_random_sources_are_drawn_evenly():
    prompt, position = rows([3] * 3000)
    source, target = paired_rows("random", prompt, position, np.random.default_rng(0))
    last = target % 3 == 2
    assert 0.45 < (source[last] % 3 == 0).mean() < 0.55


def test_nothing_is_shuffled_of_no_rows():
    assert len(shuffled_rows(np.empty(0, dtype=np.int64), np.random.default_rng(0))) == 0


def test_unknown_policies_are_told():
    with pytest.raises(UserError, match="allowed: same, previous, random, shuffled, attention"):
        check_positions("newline")
