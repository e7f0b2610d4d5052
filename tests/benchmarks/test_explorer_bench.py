"""The benchmark of the explorer runs, on little."""

from __future__ import annotations

import pytest

from ..ui.browser import CHROMIUM, WHY_NOT
from .explorer_bench import large_store, sessions

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT)]


def test_a_store_is_seen_changed_and_selected_in(tmp_path):
    found = large_store(tmp_path, 3000, 32, 2, turns=2)
    assert all(found[key] > 0 for key in ("browser_s", "overview_s", "plane_s", "change_s", "selection_s"))


def test_readers_at_once_meet_no_exception_and_nothing_of_one_another(tmp_path):
    found = sessions(tmp_path, 2, 10.0, wait=1.0)
    assert found["clicks"] > 0
    assert (found["foreign"], found["exceptions"]) == (0, 0)
