"""Which positions a policy keeps, and the shared boundaries of two tokenizations."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.errors import UserError
from workbench.tokens import check_tokens, select, shared_ends

IDS = [0, 10, 11, 1, 12, 13, 14, 1]
SPECIAL = [i < 2 for i in IDS]


@pytest.mark.parametrize(
    ("policy", "positions"),
    [
        ("last", [7]),
        ("all", [1, 2, 4, 5, 6]),
        ("first:2", [1, 2]),
        ("last:2", [5, 6]),
        ("every:2", [1, 4, 6]),
        ("first:99", [1, 2, 4, 5, 6]),
        ("all+special", list(range(8))),
        ("every:3+special", [0, 3, 6]),
        ("first:1+special", [0]),
    ],
)
def test_policies(policy, positions):
    assert select(policy, IDS, SPECIAL) == positions


def test_nothing_to_keep():
    assert select("all", [0, 1], [True, True]) == []
    assert select("last", [0, 1], [True, True]) == [1]


@pytest.mark.parametrize("policy", ["", "lst", "first", "first:0", "first:-1", "every:x", "all:2", "last:1.5"])
def test_unknown_policies_are_named(policy):
    with pytest.raises(UserError, match="allowed: last, all, first:n"):
        check_tokens(policy)


def spans(cuts):
    edges = [0, *sorted(cuts)]
    return list(pairwise(edges))


@given(st.sets(st.integers(1, 30)), st.sets(st.integers(1, 30)))
def test_shared_ends_are_exactly_the_common_boundaries(a, b):
    x, y = spans(a), spans(b)
    pairs = shared_ends(x, y)
    assert [x[i][1] for i, _ in pairs] == [y[j][1] for _, j in pairs] == sorted(a & b)


def test_the_last_byte_of_a_character_ends_it():
    assert shared_ends([(0, 1), (1, 2), (1, 2), (2, 2)], [(0, 2)]) == [(2, 0)]
