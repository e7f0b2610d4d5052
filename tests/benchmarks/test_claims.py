"""The summary of docs/benchmarks.md is read from the results: nothing of it is typed, and what is missed is said."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest

from .__main__ import KEPT, PAGE
from .claims import CLAIMS, anchor, rows
from .tables import SECTIONS, page

TITLES = {name: section.title for name, section in SECTIONS.items()}


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    return json.loads(KEPT.read_text(encoding="utf-8"))


def test_the_page_is_that_of_its_results(kept):
    assert PAGE.read_text(encoding="utf-8") == page(kept)


def test_every_claim_is_of_a_section_and_leads_to_it(kept):
    assert {claim.section for claim in CLAIMS} <= set(SECTIONS)
    headings = {anchor(title) for title in re.findall(r"^## (.*)$", page(kept), flags=re.MULTILINE)}
    for *_, section in rows(kept, TITLES):
        assert re.fullmatch(r"\[.*\]\(#(.*)\)", section)[1] in headings


def test_what_was_not_measured_is_left_out_and_what_is_missed_is_said(kept):
    assert rows({}, TITLES) == []
    worse = copy.deepcopy({"speed": kept["speed"]})
    worse["speed"]["result"]["ratio"]["12 layers, all"] = 0.5
    assert rows(worse, TITLES)[0][2] == "0.50 times **not met**"


def test_a_claim_with_a_target_says_what_was_wanted():
    assert all(bool(claim.wanted) == (claim.met is not None) for claim in CLAIMS)
