"""docs/geometry.md is what its numbers say: the page is that of docs/geometry.json, and its words hold of them."""

from __future__ import annotations

import pytest

from . import geometry


@pytest.fixture(scope="module")
def kept():
    return geometry.read()


def test_the_page_is_that_of_its_numbers(kept):
    assert geometry.PAGE.read_text(encoding="utf-8") == geometry.page(kept)
    assert (geometry.DOCS / "img" / "geometry_costs.png").stat().st_size < 120_000


def test_what_is_said_of_parts_holds(kept):
    for name, found in kept.items():
        layers = sorted({line["layer"] for line in found["costs"]})
        assert len(layers) == {"recipient": 4, "donor": 6}[name]
        for layer in layers:
            parts = {p: geometry.cost(found, layer, "block", p) for p in ("parallel", "orthogonal", "control")}
            assert parts["orthogonal"]["delta"] > parts["parallel"]["delta"]
            if layer == 0:
                assert parts["orthogonal"]["delta"] > 1000 * abs(parts["parallel"]["delta"])
    recipient, donor = kept["recipient"], kept["donor"]
    shares = [
        geometry.size(found, x["layer"], "mlp")["share"]
        for found in kept.values()
        for x in found["sizes"]
        if x["layer"]
    ]
    assert min(shares) == geometry.size(recipient, 1, "mlp")["share"]
    assert max(shares) == geometry.size(donor, 5, "mlp")["share"]
    last = {p: geometry.cost(recipient, 3, "block", p) for p in ("parallel", "control")}
    assert last["parallel"]["delta"] > 0.02
    assert 0.3 < last["control"]["delta"] / last["parallel"]["delta"] < 3, "as much in a random direction"
    donor_last = [geometry.cost(donor, 5, "block", p)["delta"] for p in ("parallel", "control")]
    assert 0 < donor_last[0] < donor_last[1] < 0.05
    late = {p: geometry.cost(donor, 4, "block", p)["delta"] for p in ("parallel", "orthogonal")}
    assert 0 < late["orthogonal"] < 10 * late["parallel"]
    assert all(geometry.cost(donor, layer, "block", "orthogonal")["delta"] < 0.03 for layer in (3, 4, 5))


def test_what_is_said_of_runs_holds(kept):
    for found in kept.values():
        lengths = {(x["kind"], x["length"]): x for x in found["lengths"]}
        n = max(length for _, length in lengths)
        for kind in ("parallel", "stale"):
            assert lengths[kind, 1]["delta"] == 0
        for length in range(2, n + 1):
            assert lengths["parallel", length]["growth_low"] > 0
            assert lengths["skipped", length]["delta"] > 2 * lengths["parallel", length]["delta"]
            assert lengths["stale", length]["delta"] <= lengths["parallel", length]["delta"]
        firsts = [x["delta"] for x in found["runs"] if (x["kind"], x["length"]) == ("parallel", 2)]
        assert firsts[0] == max(firsts)
        for start in range(n - 1):
            of = [geometry.run(found, "parallel", start, length)["delta"] for length in range(2, n - start + 1)]
            assert of == sorted(of), "from every block on"
    donor = kept["donor"]
    assert geometry.run(donor, "stale", 0, 6)["delta"] < geometry.run(donor, "stale", 0, 2)["delta"]
