"""Figures of the geometry of writes: every part and run is there, and what a logarithm cannot show is said when pointed at."""

from __future__ import annotations

import pandas as pd

from workbench.geometry_plots import FLOOR, run_lengths, run_places, write_costs, write_sizes


def spread(key, value):
    return {key: value, f"{key}_low": value - 0.01, f"{key}_high": value + 0.01}


VALUES = (("parallel", -0.002), ("orthogonal", 0.5), ("control", 0.03))
COSTS = pd.DataFrame([{"layer": l, "write": w, "part": p} | spread("delta", v)
                      for l in range(3) for w in ("attn", "mlp", "block") for p, v in VALUES])  # fmt: skip
SIZES = pd.DataFrame([{"layer": l, "write": w} | spread("size", 0.3) | spread("cosine", -0.1) | spread("share", 0.1)
                      for l in range(3) for w in ("attn", "mlp")])  # fmt: skip
RUNS = pd.DataFrame([{"kind": k, "start": s, "length": n} | spread("delta", n - 1.0) for k in ("parallel", "stale", "skipped")
                     for n in (1, 2) for s in range(3 - n + 1)])  # fmt: skip
LENGTHS = pd.DataFrame([{"kind": k, "length": n, "places": 4 - n} | spread("delta", n - 1.0) | spread("growth", 1.0)
                        for k in ("parallel", "stale", "skipped") for n in (1, 2, 3)])  # fmt: skip


def test_every_part_of_every_write_is_drawn():
    figure = write_costs(COSTS)
    assert len(figure.data) == 9
    assert [a.text for a in figure.layout.annotations] == ["attention", "MLP", "both"]
    assert figure.layout.yaxis.type == "log"
    assert figure.layout.yaxis.title.text == "rise of the loss (nats per token)"
    low = next(t for t in figure.data if t.name == "parallel part")
    assert list(low.y) == [FLOOR] * 3
    assert low.text[0].startswith("parallel part, layer 0: -0.0020 nats per token")
    assert list(low.error_y.arrayminus) == [0.0] * 3
    assert (
        list(next(t for t in write_costs(COSTS, logarithmic=False).data if t.name == "parallel part").y) == [-0.002] * 3
    )


def test_sizes_have_a_panel_each():
    figure = write_sizes(SIZES)
    assert len(figure.data) == 6
    assert list(figure.data[2].y) == [-0.1] * 3
    assert figure.layout.yaxis.title.text == "ratio"


def test_runs_are_drawn_by_length_and_by_place():
    figure = run_lengths(LENGTHS)
    assert [t.name for t in figure.data] == ["all on the same input", "on the input one block old", "left out"]
    assert list(figure.data[0].y) == [FLOOR, 1.0, 2.0]
    places = run_places(RUNS)
    assert len(places.data) == 3
    assert [list(line) for line in places.data[0].z] == [[0.0, 0.0, 0.0], [1.0, 1.0, None]]
    assert places.data[0].text[1][0].startswith("2 blocks from block 0: +1.0000 nats per token")
    assert places.layout.coloraxis.cmax == 1.0


def test_what_is_not_there_is_said():
    for draw in (write_costs, write_sizes, run_lengths, run_places):
        assert draw(pd.DataFrame()).layout.annotations[0].text.startswith("No ")
