"""Folding (acceptance checks A6 to A8 of the Command-V spec) and pasting whole adapters."""

from __future__ import annotations

import pytest
import torch

from workbench.adapters.adapter import Adapter, LowRank
from workbench.convert import Converter
from workbench.errors import UserError
from workbench.maps.fit import fit_pinv, fit_ridge
from workbench.maps.linear_map import LinearMap
from workbench.maps.quality import quality
from workbench.paste import capture, fold_gram, fold_part, paste_adapter, three_step
from workbench.sites import Site

D_DONOR, D_RECIPIENT, RANK = 40, 28, 4


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def part(d: int = D_DONOR, seed: int = 5, act: str = "linear") -> LowRank:
    return LowRank(noise(d, RANK, seed=seed), noise(RANK, seed=seed + 1), noise(RANK, d, seed=seed + 2), act)


def loreft(d: int = D_DONOR) -> LowRank:
    """delta(h) = (h W^T + b - h R) R^T as one part."""
    rotation = torch.linalg.qr(noise(d, RANK, seed=3)).Q
    return LowRank(noise(d, RANK, seed=4) - rotation, noise(RANK, seed=5), rotation.T.contiguous())


def direft(d: int = D_DONOR) -> LowRank:
    rotation = torch.linalg.qr(noise(d, RANK, seed=3)).Q
    return LowRank(noise(d, RANK, seed=4), noise(RANK, seed=5), rotation.T.contiguous())


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def rows(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    z = noise(n, 20)
    x = z @ noise(20, D_RECIPIENT, seed=1) + noise(n, D_RECIPIENT, seed=2)
    return x, z @ noise(20, D_DONOR, seed=3) + noise(n, D_DONOR, seed=4)


@pytest.mark.parametrize("form", [part(), loreft(), direft(), part(act="relu")], ids=["nodi", "lo", "di", "relu"])
@pytest.mark.parametrize("method", ["pinv", "ridge"])
def test_a8_fold_is_three_step(form, method):
    x, y = rows(400)
    fit = fit_pinv if method == "pinv" else lambda a, b: fit_ridge(a, b, alpha=0.01).map
    there, back = fit(x, y + 3), fit(y + 3, x)
    h = noise(16, D_RECIPIENT, seed=9)
    assert relative(fold_part(form, there, back).delta(h), three_step(form, there, back, h)) <= 1e-5
    assert fold_part(form, there, back).width == D_RECIPIENT


@pytest.mark.parametrize("n", [20, 400])
def test_a8_gram_path_is_pinv_path(n):
    x, y = rows(n)
    h = noise(16, D_RECIPIENT, seed=9)
    through_maps = fold_part(part(), fit_pinv(x, y), fit_pinv(y, x)).delta(h)
    assert relative(fold_gram(part(), x, y).delta(h), through_maps) <= 1e-5


def test_the_map_back_never_adds_its_bias():
    x, y = rows(400)
    there, back = fit_pinv(x, y), fit_pinv(y, x)
    moved = LinearMap(back.weight, back.bias + 100)
    assert fold_part(part(), there, moved) == fold_part(part(), there, back)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a6_identity_transfer_is_native(dtype):
    states = noise(2 * D_DONOR + 5, D_DONOR).to(dtype)
    itself = fit_pinv(states, states, dtype=dtype)
    assert float((itself.weight - torch.eye(D_DONOR)).abs().max()) <= 1e-4
    native, h = part().to(dtype), noise(16, D_DONOR, seed=9).to(dtype)
    assert relative(fold_part(native, itself, itself).delta(h), native.delta(h)) <= 1e-4


def test_a7_few_rows_transfer_the_projection_and_warn():
    d, n = 200, 50
    states = noise(n, d).double()
    itself = fit_pinv(states, states, dtype=torch.float64)
    projector = torch.linalg.pinv(states) @ states
    native, h = part(d).to(torch.float64), noise(16, d, seed=9).double()
    expected = native.delta(h @ projector) @ projector
    assert relative(fold_part(native, itself, itself).delta(h), expected) <= 1e-5
    captured = capture(native, states)
    assert captured.write == pytest.approx((n / d) ** 0.5, rel=0.15)
    assert captured.read == pytest.approx((n / d) ** 0.5, rel=0.15)
    assert "spans" in str(captured.warning)
    assert "50/200" in str(quality(itself, h, h).warning)
    assert capture(native, noise(400, d)).warning is None


def converters() -> list[Converter]:
    x, y = rows(400)
    there, back = fit_ridge(x, y, alpha=0.01).map, fit_ridge(y, x, alpha=0.01).map
    other, other_back = fit_ridge(x, 2 * y, alpha=0.01).map, fit_ridge(2 * y, x, alpha=0.01).map
    return [Converter(Site(0), Site(2), there, back), Converter(Site(4), Site(2), other, other_back)]


def test_layers_that_meet_are_summed_on_the_same_state():
    used = converters()
    donor = Adapter({Site(0): part(), Site(4): part(seed=50)}, strength=2.0, name="cot", base={"name": "donor"})
    pasted = paste_adapter(donor, used, recipient_fingerprint={"name": "recipient"}, strength=0.5)
    h = noise(16, D_RECIPIENT, seed=9)
    expected = sum(three_step(donor.parts[c.donor], c.to_donor, c.to_recipient, h) for c in used)
    assert relative(pasted.delta(Site(2), h), expected) <= 1e-5
    assert (pasted.layers, pasted.rank, pasted.width, pasted.strength) == ([2], 2 * RANK, D_RECIPIENT, 1.0)
    assert pasted.base == {"name": "recipient"}
    assert pasted.meta["donor"] == {"name": "donor"}
    assert pasted.meta["pairs"][1][:2] == ["resid_post.4", "resid_post.2"]


def test_a_paste_saves_and_loads_equal(tmp_path):
    donor = Adapter({Site(0): part()}, positions="last")
    pasted = paste_adapter(donor, converters())
    pasted.save(tmp_path / "pasted")
    assert Adapter.load(tmp_path / "pasted") == pasted


def test_bad_pastes_are_refused():
    used = converters()
    with pytest.raises(UserError, match=r"no converter for resid_post\.3 \(given: resid_post\.0, resid_post\.4\)"):
        paste_adapter(Adapter({Site(0): part(), Site(3): part()}), used)
    with pytest.raises(UserError, match=r"two converters for the donor's resid_post\.0"):
        paste_adapter(Adapter({Site(0): part()}), [used[0], used[0]])
    with pytest.raises(UserError, match="widths do not meet: the adapter part has 28"):
        paste_adapter(Adapter({Site(0): part(D_RECIPIENT)}), used)
    x, y = rows(30)
    with pytest.raises(UserError, match="30 rows of x and 29 rows of y"):
        fold_gram(part(), x, y[:29])
    with pytest.raises(UserError, match="width 40; the donor's rows have width 28"):
        fold_gram(part(), y, x)
