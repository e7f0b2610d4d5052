"""On the bundled models: the first half of the layers is what later tokens need, and layers of two models come in order."""

from __future__ import annotations

import pytest

from probes.layer_grid import layer_grid
from probes.skip_effects import layer_effects
from workbench.models import load
from workbench.profile import profile_model
from workbench.prompts import PromptSet
from workbench.untrained import untrained_like

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["donor", "recipient"])
def test_the_first_half_matters_to_later_tokens_and_more_than_untrained(name):
    model = load(f"bundled:{name}", dtype="float32", device="cpu")
    prompts = PromptSet.load("bundled:profile", limit=256, seed=0)
    trained, control = (layer_effects(one, prompts).halves() for one in (model, untrained_like(model)))
    assert trained.low > 1.5
    assert trained.low > control.high


@pytest.mark.parametrize(
    ("deep", "shallow"), [("donor", "recipient"), ("donor", "outsider"), ("outsider", "recipient")]
)
def test_best_layers_come_in_order_and_permuted_ones_do_not(deep, shallow):
    prompts = PromptSet.load("bundled:profile", limit=512, seed=0)
    models = (load(f"bundled:{name}", dtype="float32", device="cpu") for name in (deep, shallow))
    a, b = (profile_model(model, prompts, tokens="all") for model in models)
    with a, b:
        grid = layer_grid(a, b)
    assert grid.order() >= 0.8
    assert abs(grid.order_by_chance().value) < 0.3
    for layer in grid.deep_layers:
        assert grid.control(layer, grid.best[layer]).value > 0.99 * grid.baseline(layer).value
