"""A map folded into a dictionary reads what the dictionary reads of the mapped rows, for every kind of dictionary."""

from __future__ import annotations

import pytest
import torch

from probes.dictionaries import KINDS, NORMALISATIONS
from probes.readouts import Readout
from tests.probes.test_dictionaries import D, draw, planted
from workbench.maps.linear_map import LinearMap


@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize("normalise", NORMALISATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_folded_map_is_the_map_applied_first(kind, normalise, subtract):
    dictionary = planted(kind, subtract_b_dec=subtract, normalise=normalise).to(torch.float64)
    x = draw(40, D + 3, seed=20).double()
    operator = LinearMap(draw(D + 3, D, seed=21), draw(D, seed=22)).to(torch.float64)
    for one, rows in ((operator, x), (LinearMap.identity(D, torch.float64), x[:, :D])):
        predicted, acts = Readout.of(one, dictionary, dictionary.directions, torch.float64)(rows)
        wanted = one(rows)
        torch.testing.assert_close(predicted, wanted @ dictionary.directions.T)
        torch.testing.assert_close(acts, dictionary.encode(wanted))
        assert (acts > 0).any()
