"""The grid of layers: planted answers are found, the errors are those of the maps themselves, and controls know nothing."""

from __future__ import annotations

import pytest
import torch

from probes.layer_grid import LayerGrid, layer_grid
from tests.transport.streams import write_stream
from workbench.convert import ConverterFits
from workbench.errors import UserError
from workbench.sites import Site
from workbench.store import Store

AT = [0, 2, 5, 7]
"""the step of the walk that each shallow layer is"""


def walk(n: int, d: int, steps: int, seed: int = 0) -> list[torch.Tensor]:
    """States that drift: the nearer two steps, the more one says of the other."""
    g = torch.Generator().manual_seed(seed)
    h = [torch.randn(n, d, generator=g)]
    for _ in range(steps - 1):
        h.append(0.8 * h[-1] + 0.6 * torch.randn(n, d, generator=g))
    return h


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Store, Store]:
    home = tmp_path_factory.mktemp("grid")
    steps = walk(1600, 6, 8)
    g = torch.Generator().manual_seed(9)
    deep = {Site(l): h @ torch.randn(6, 10, generator=g) + 0.5 for l, h in enumerate(steps)}
    shallow = {Site(m): steps[at] @ torch.randn(6, 7, generator=g) - 1.0 for m, at in enumerate(AT)}
    return write_stream(home / "deep", deep, 20), write_stream(home / "shallow", shallow, 20)


@pytest.fixture(scope="module")
def grid(pair) -> LayerGrid:
    return layer_grid(*pair, alpha=1e-6, pairing="last")


def test_the_planted_layers_answer(grid):
    near = {l: min(range(4), key=lambda m: abs(AT[m] - l)) for l in range(8)}
    assert all(abs(AT[m] - l) == abs(AT[near[l]] - l) for l, m in grid.best.items()), grid.best
    for m, at in enumerate(AT):
        assert grid.error(at, m).value < 1e-3, "the same step in another basis"
        assert grid.baseline(at).value > 0.5
    assert grid.order() > 0.95
    matching = grid.matching()
    assert [matching[at] for at in AT] == [0, 1, 2, 3]
    assert list(matching.values()) == sorted(matching.values())
    assert grid.matching(monotone=False) == grid.best


def test_permuted_layers_are_in_no_order(grid):
    chance = grid.order_by_chance()
    assert abs(chance.value) < 0.05
    assert chance.high < 0.8 < grid.order()
    assert grid.order_by_chance(seed=1).value == pytest.approx(chance.value, abs=0.05)


def test_the_control_says_no_more_than_the_mean(grid):
    for d in (0, 4, 7):
        assert grid.control(d, 1).value > 0.97 * grid.baseline(d).value


def test_errors_are_those_of_the_maps_themselves(pair, grid):
    fits = ConverterFits(*pair, 0.25, 0, pairing="last")
    made = fits.converter(Site(4), Site(1), "ridge", 1e-6)
    y = fits.states("donor", Site(4), held=True)
    gap = (y - made.to_donor(fits.states("recipient", Site(1), held=True))).norm(dim=1) / y.norm(dim=1)
    assert grid.error(4, 1).value == pytest.approx(float(gap.mean()), rel=1e-4)
    by_prompt = [float(gap[fits.held.prompt == p].sum()) for p in fits.held.prompt.unique()]
    torch.testing.assert_close(grid.sums[4, 1], torch.tensor(by_prompt).double(), rtol=1e-4, atol=1e-6)


def test_rows_that_are_fewer_than_the_width_are_fitted_too(tmp_path):
    g = torch.Generator().manual_seed(0)
    x = {Site(l): torch.randn(60, 90, generator=g) for l in range(3)}
    a, b = write_stream(tmp_path / "a", x, 4), write_stream(tmp_path / "b", x, 4)
    found = layer_grid(a, b, pairing="last", control=False, alpha=0.1)
    fits = ConverterFits(a, b, 0.25, 0, pairing="last")
    made, y = fits.converter(Site(1), Site(1), "ridge", 0.1), fits.states("donor", Site(1), held=True)
    gap = (y - made.to_donor(fits.states("recipient", Site(1), held=True))).norm(dim=1) / y.norm(dim=1)
    assert found.error(1, 1).value == pytest.approx(float(gap.mean()), rel=1e-4)
    with pytest.raises(UserError, match="made without its control"):
        found.control(0, 0)
    assert "shuffled" not in found.frame()


def test_what_it_shows(grid):
    table = grid.frame()
    assert len(table) == 32
    assert table["best"].sum() == 8
    assert (table["error_low"] <= table["error_high"]).all()
    assert "shallow" in grid._repr_html_()
    assert repr(grid) == "LayerGrid(m -> m, 8 x 4 layers, 1,200 rows fitted)"
    with pytest.raises(UserError, match=r"layer 9 of the deep model m is not in this grid; it has 0, 1, "):
        grid.error(9, 0)


def test_a_grid_without_order_has_none(tmp_path):
    x = walk(400, 4, 2)
    a, b = (write_stream(tmp_path / name, {Site(l): h for l, h in enumerate(x)}, 20) for name in "ab")
    found = layer_grid(a, b, pairing="last")
    assert found.order() is None
    assert found.order_by_chance() is None


def test_what_does_not_pair_is_refused(pair, tmp_path):
    deep, _ = pair
    other = write_stream(tmp_path / "o", {Site(0): torch.randn(400, 6)}, 20)
    with pytest.raises(UserError, match="do not pair"):
        layer_grid(deep, other, pairing="last")
    inside = write_stream(tmp_path / "i", {Site(0, "attn_out"): torch.randn(1600, 6)}, 20)
    with pytest.raises(UserError, match="has no resid_post; profile the model again at its layers"):
        layer_grid(deep, inside, pairing="last")
    with pytest.raises(UserError, match="holds out fewer than two prompts; give a larger share"):
        layer_grid(*pair, holdout=0.01, pairing="last")
