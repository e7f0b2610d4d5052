"""The paper's form: folding changes nothing but the number of weights."""

from __future__ import annotations

import pytest
import torch

from workbench.errors import UserError
from workbench.folding.batch_norm import ChannelIdleFFN, idle_count, reparameterise


def trained_like(theta: float, width: int = 24, rho: int = 4, dtype: torch.dtype = torch.float64) -> ChannelIdleFFN:
    """A network whose norms have seen rows and whose every part matters."""
    torch.manual_seed(0)
    ffn = ChannelIdleFFN(width, rho * width, theta).to(dtype)
    with torch.no_grad():
        for norm in (ffn.norm_in, ffn.norm_mid):
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
    for _ in range(20):
        ffn(3 * torch.randn(5, 7, width, dtype=dtype) + 1)
    return ffn.eval()


@pytest.mark.parametrize("theta", [0.0, 0.25, 0.5, 0.75, 0.9])
def test_the_folded_form_is_exact(theta):
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        ffn = trained_like(theta, dtype=dtype)
        y = 3 * torch.randn(4, 9, 24, dtype=dtype, generator=torch.Generator().manual_seed(1)) + 1
        with torch.no_grad():
            assert (reparameterise(ffn)(y) - ffn(y)).abs().max() < bound


@pytest.mark.parametrize(("theta", "rho"), [(0.25, 4), (0.5, 2), (0.75, 4), (0.875, 8)])
def test_so_many_weights_are_left(theta, rho):
    ffn = trained_like(theta, 16, rho)
    folded = reparameterise(ffn)
    dense = sum(m.weight.numel() for m in (ffn.up, ffn.down))
    left = sum(m.weight.numel() for m in (folded.up, folded.down, folded.linear))
    assert left / dense == 1 - theta + 1 / (2 * rho)


def test_the_norms_matter_and_the_idle_channels_too():
    ffn = trained_like(0.5)
    y = torch.randn(6, 24, dtype=torch.float64)
    with torch.no_grad():
        folded, whole = reparameterise(ffn), ffn(y)
        folded.linear.weight.zero_()
        assert (folded(y) - whole).abs().max() > 0.1
        ffn.norm_mid.running_var.mul_(4)
        assert (ffn(y) - whole).abs().max() > 0.1


@pytest.mark.parametrize("theta", [-0.1, 1, 1.5, True, float("nan")])
def test_other_shares_are_refused(theta):
    with pytest.raises(UserError, match=r"theta is the share of channels that are idle, from 0 to less than 1; got"):
        idle_count(theta, 8)
