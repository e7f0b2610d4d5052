"""The benchmark of probes runs, on little."""

from __future__ import annotations

from .probe_bench import probes


def test_probes_are_timed_beside_reading_and_a_loop(tmp_path):
    found = probes(tmp_path, layers=2, width=16, rows=2000, loop=1, repeats=1)
    assert all(seconds > 0 for seconds in found["seconds"].values())
    assert found["accuracy"]["probe"] > 0.8
