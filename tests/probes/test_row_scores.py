"""A probe's score of rows of a store is what the probe says of them, for every class and for a quantity."""

from __future__ import annotations

import pytest
import torch

from probes.linear import train_probes
from probes.probe import Probe
from probes.row_scores import BATCH, score_rows
from workbench.errors import UserError
from workbench.sites import Site
from workbench.store.resident import ResidentRows

from .labelled import planted, write_labelled


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    x, y, _ = planted(300, 6, gap=6.0, classes=3)
    x[7, 2] = float("inf")
    return write_labelled(tmp_path_factory.mktemp("s") / "s", {Site(1): x}, label=[f"c{int(i)}" for i in y])


def probe(classes: tuple[str, ...], width: int = 6) -> Probe:
    g = torch.Generator().manual_seed(1)
    c = 1 if len(classes) in (0, 2) else len(classes)
    return Probe(torch.randn(width, c, generator=g), torch.randn(c, generator=g), classes, Site(1), "label")


def test_the_log_odds_of_a_class_are_those_of_its_probability(store):
    rows = torch.tensor([5, 0, 299, 12])
    x = store.read(1, rows)
    for classes in (("no", "yes"), ("a", "b", "c")):
        one = probe(classes)
        p = one.probabilities(x).double()
        for i, name in enumerate(classes):
            found = score_rows(store, one, rows, target=name)
            torch.testing.assert_close(found.scores.double(), (p[:, i] / (1 - p[:, i])).log(), rtol=1e-3, atol=1e-3)
            assert found.name == f"label: {name} (log-odds, nats)"
            assert found.frame()["row"].tolist() == rows.tolist()
    assert score_rows(store, probe(("no", "yes")), rows).target == "yes"


def test_a_quantity_is_its_value_and_batches_change_nothing(store):
    one = probe(())
    rows = torch.arange(300).repeat(1 + BATCH // 300)
    found = score_rows(ResidentRows(store, "cpu"), one, rows)
    x = store.read(1)
    want = one.score(x)
    want[7] = torch.nan
    torch.testing.assert_close(found.scores[:300], want, equal_nan=True)
    assert torch.equal(found.scores[300:600].nan_to_num(), found.scores[:300].nan_to_num())
    assert found.name == "label, read by a probe"
    assert "RowScores" in found._repr_html_()


def test_a_trained_probe_tells_the_planted_classes_apart(store):
    made = train_probes(store, "label", sites=[1], controls=(), words=False).at(1).probe
    found = score_rows(store, made, torch.arange(300), target="c1").scores
    whole = torch.isfinite(found)
    mine = torch.arange(300) % 3 == 1
    assert whole.sum() == 299
    assert ((found > 0) == mine)[whole].float().mean() > 0.97


def test_what_does_not_fit_is_refused(store):
    with pytest.raises(UserError, match="has no class 'z'"):
        score_rows(store, probe(("no", "yes")), torch.arange(3), target="z")
    with pytest.raises(UserError, match="reads rows of width 5"):
        score_rows(store, probe(("no", "yes"), 5), torch.arange(3))
    other = Probe(torch.ones(6, 1), torch.zeros(1), ("a", "b"), Site(1), base={"name": "another", "weights": "x"})
    with pytest.raises(UserError, match="belongs to another"):
        score_rows(store, other, torch.arange(3))
    assert len(score_rows(store, other, torch.arange(0), allow_mismatch=True).scores) == 0
