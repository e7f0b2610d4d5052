"""Which pairs a run fits, measures and keeps: what is asked for, and each refusal by name."""

from __future__ import annotations

from itertools import pairwise

import pytest

from probes.transport_choice import MANY, PairChoice, named, neighbours, transport_cost
from probes.transport_job import TransportJob
from tests.conftest import make_model
from workbench.errors import UserError
from workbench.prompts import PromptSet
from workbench.sites import Site
from workbench.transport.pairs import site_pairs


def chosen(**options) -> PairChoice:
    return PairChoice.of(make_model("llama"), TransportJob("m", "p", **options))


def names(pairs) -> list[str]:
    return [f"{a.layer}:{b.layer}" for a, b in pairs]


def test_few_pairs_are_all_measured_and_their_maps_kept():
    choice = chosen()
    assert names(choice.pairs) == names(choice.causal) == names(choice.operators) == ["0:1", "0:2", "1:2"]
    assert choice.controls == ()
    assert choice.left_out == []


def test_pairs_and_causal_pairs_are_chosen_by_name():
    choice = chosen(pairs=("1:2", "resid_pre.0:2"), causal="1:2")
    assert [named(p) for p in choice.pairs] == ["resid_pre.0:resid_post.2", "resid_post.1:resid_post.2"]
    assert names(choice.operators) == ["1:2"]
    assert "of 1 of 2 pairs; 1 are left out (resid_pre.0 to resid_post.2)" in choice.left_out[0]
    assert "--causal all measures every pair, --causal resid_pre.0:resid_post.2 those" in choice.left_out[0]
    assert chosen(causal="none").operators == ()
    assert names(chosen(causal="none", keep_maps="all").operators) == ["0:1", "0:2", "1:2"]
    assert names(chosen(causal="neighbours").causal) == ["0:1", "1:2"]
    assert chosen(grid_only=True).operators == chosen(positions="previous").operators == ()


def test_neighbours_are_the_next_sites_of_the_grid_whatever_layers_it_has():
    sites = [Site(layer) for layer in range(0, 40, 4)]
    found = neighbours(site_pairs(sites))
    assert len(site_pairs(sites)) > MANY
    assert found == list(pairwise(sites))
    mixed = neighbours(site_pairs([Site(0), Site.parse("mlp_out.1"), Site(1), Site(2)]))
    assert (Site(0), Site(1)) in mixed
    assert (Site(0), Site.parse("mlp_out.1")) in mixed
    assert (Site(0), Site(2)) not in mixed


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pairs": ("2:1",)}, r"resid_post\.2 is not before resid_post\.1"),
        ({"pairs": ("1",)}, "cannot read the pair '1'; write two sites, such as 3:5"),
        ({"pairs": ("0:9",)}, "layer 9 is out of range"),
        ({"pairs": ("0:1",), "sites": ("resid_post.0",)}, "both sites and pairs"),
        ({"causal": "some"}, "unknown choice of causal pairs 'some'; allowed: auto, all, neighbours, none, or pairs"),
        ({"pairs": ("0:1",), "causal": "0:2"}, r"the causal pair resid_post\.0:resid_post\.2 is not fitted"),
        ({"keep_maps": "some"}, "unknown choice of maps to keep 'some'; allowed: needed, all"),
    ],
)
def test_what_there_is_not_is_told(options, words):
    with pytest.raises(UserError, match=words):
        chosen(**options)


def test_the_cost_is_that_of_the_maps(tmp_path):
    model = make_model("llama")
    prompts = PromptSet.load([f"w{i} w{i + 1}" for i in range(40)])
    job = TransportJob("m", "p", folds=2, shards=2, causal="0:1")
    cost = transport_cost(model, prompts, tmp_path / "not" / "yet", job)
    assert (cost.pairs, cost.causal, cost.operators, cost.controls, cost.passes) == (3, 1, 1, 0, 1)
    assert cost.bytes == 4 * (model.width + 1) * model.width < cost.free
    assert "3 pairs of sites, causal figures of 1" in str(cost)
