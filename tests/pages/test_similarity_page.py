"""docs/similarity.md is what its numbers say: the page is that of docs/similarity.json, and its words hold of them."""

from __future__ import annotations

import pytest

from . import similarity


@pytest.fixture(scope="module")
def kept():
    return similarity.read()


def test_the_page_is_that_of_its_numbers(kept):
    assert similarity.PAGE.read_text(encoding="utf-8") == similarity.page(kept)
    assert (similarity.DOCS / "img" / "similarity_best.png").stat().st_size < 120_000


def test_what_is_said_holds(kept):
    by = {line["measure"]: line for line in kept["summary"]}
    assert set(by) == set(similarity.SHORT)
    assert all(line["value"] > 2 * line["null_high"] for line in kept["best"]), "far beyond chance"
    assert by["svcca"]["null"] > 0.05
    assert by["pwcca"]["null"] > 0.05
    assert abs(by["cka_debiased"]["null"]) < by["cka"]["null"] < 0.02
    best = similarity.partners(kept, "cka_debiased")
    assert best == sorted(best), "partners never get shallower"
    assert all(line["order"] > 0.8 for name, line in by.items() if name != "rsa")
    assert len(set(similarity.partners(kept, "rsa"))) == 1
    values = {m: [line["value"] for line in kept["best"] if line["measure"] == m] for m in by}
    assert sum(values["cka_debiased"][-2:]) < 2 * min(values["cka_debiased"][:-2])
    for measure in ("procrustes", "pwcca"):
        assert min(values[measure][-2:]) > max(values[measure][:-2])
    for i, line in enumerate(kept["own"]):
        assert line[i] == pytest.approx(1)
        assert all(line[j] <= line[j + 1] for j in range(i)), "nearer layers are more alike"
