"""What a converter carries of an adapter: planted inside, planted outside, and random."""

from __future__ import annotations

import pytest
import torch

from workbench.adapters.adapter import LowRank
from workbench.captures import capture_of_maps
from workbench.errors import UserError
from workbench.maps.linear_map import LinearMap

D_DONOR, D_RECIPIENT, RANK = 40, 16, 3


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def maps(seed: int = 0) -> tuple[LinearMap, LinearMap, torch.Tensor]:
    """To the donor and back, both through the first 16 of 40 orthonormal directions of the donor, each weaker than the last."""
    basis = torch.linalg.qr(noise(D_DONOR, D_DONOR, seed=seed)).Q
    turn = torch.linalg.qr(noise(D_RECIPIENT, D_RECIPIENT, seed=seed + 1)).Q
    gains = torch.linspace(2, 0.5, D_RECIPIENT, dtype=torch.float64)
    there = LinearMap((turn * gains) @ basis[:, :D_RECIPIENT].T, torch.zeros(D_DONOR, dtype=torch.float64))
    back = LinearMap((basis[:, :D_RECIPIENT] * gains) @ turn.T, torch.zeros(D_RECIPIENT, dtype=torch.float64))
    return there, back, basis


def part(read: torch.Tensor, write: torch.Tensor) -> LowRank:
    """V with these columns, U with these rows."""
    return LowRank(read, torch.zeros(read.shape[1], dtype=read.dtype), write.T.contiguous())


def test_what_lies_in_the_directions_of_the_map_is_captured_from_there_on():
    there, back, basis = maps()
    read = basis[:, [4]]  # the fifth strongest
    write = (0.6 * basis[:, [0]] + 0.8 * basis[:, [30]]).reshape(
        -1, 1
    )  # 0.36 of its square in the strongest, else outside
    found = capture_of_maps(part(read, write), there, back)
    assert len(found.read) == len(found.write) == D_RECIPIENT
    assert found.read.tolist() == pytest.approx([0] * 4 + [1] * 12, abs=1e-6)
    assert found.write.tolist() == pytest.approx([0.6] * D_RECIPIENT, abs=1e-6)


def test_a_random_part_has_what_chance_says():
    there, back, _ = maps()
    made = [capture_of_maps(part(noise(D_DONOR, RANK, seed=10 + s), noise(D_DONOR, RANK, seed=500 + s)), there, back)
            for s in range(200)]  # fmt: skip
    shares = torch.stack([found.read for found in made] + [found.write for found in made])
    mean, low, high = made[0].chance(torch.arange(1, D_RECIPIENT + 1))
    assert shares.square().mean(0).sqrt().tolist() == pytest.approx(mean.tolist(), rel=0.08)
    within = ((shares >= low) & (shares <= high)).double().mean(0)
    assert float(within.min()) > 0.91
    assert float(within.max()) < 0.99


def test_all_directions_hold_everything_and_chance_is_sure_there():
    whole = LinearMap(noise(D_DONOR, D_DONOR), torch.zeros(D_DONOR, dtype=torch.float64))
    found = capture_of_maps(part(noise(D_DONOR, 2), noise(D_DONOR, 2, seed=1)), whole, whole)
    assert (float(found.read[-1]), float(found.write[-1])) == (pytest.approx(1), pytest.approx(1))
    assert [float(end) for end in found.chance(D_DONOR)] == pytest.approx([1, 1, 1])


def test_it_shows_itself_and_its_table_has_both_sides():
    there, back, basis = maps()
    found = capture_of_maps(part(basis[:, :2], basis[:, :2]), there, back)
    table = found.frame()
    assert list(table.groupby("side").size()) == [D_RECIPIENT] * 2
    assert (table["chance_low"] < table["chance"]).all()
    assert "read 1.000 in 16 of 40 directions" in repr(found)
    assert "<td>1.000</td>" in found._repr_html_()


def test_what_cannot_be_is_refused():
    there, back, basis = maps()
    with pytest.raises(UserError, match="widths do not meet: the adapter part has 7, the map to the donor gives 40"):
        capture_of_maps(part(noise(7, 1), noise(7, 1)), there, back)
    nothing = torch.zeros(D_DONOR, 1, dtype=torch.float64)
    with pytest.raises(UserError, match="a side of this adapter part is zero"):
        capture_of_maps(part(nothing, basis[:, :1]), there, back)
    with pytest.raises(UserError, match="this map is zero"):
        capture_of_maps(part(basis[:, :1], basis[:, :1]), LinearMap.zeros(D_RECIPIENT, D_DONOR), back)
