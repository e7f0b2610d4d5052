"""The transfer to the outsider runs, and its page is told; its figures are for its table alone."""

from __future__ import annotations

import pytest

from .tables import SECTIONS
from .third_bench import DONORS, bench


@pytest.mark.slow
def test_the_transfer_to_the_outsider_runs_with_the_defaults(tmp_path):
    found = bench(tmp_path, quick=True)
    assert set(found) == set(DONORS)
    for one in found.values():
        for behaviour in one["behaviours"].values():
            assert {"base", "native", "paste", "random_converter", "shuffled_pairs", "mean_delta"} <= set(
                behaviour["arms"]
            )
    said = SECTIONS["third"].tell(found)
    assert "| donor | refusal |" in said
    assert "| recipient | style |" in said
