"""The jackknife: the error of a mean is its textbook one, uneven shards too, and it covers the truth."""

from __future__ import annotations

import pytest
import torch

from workbench.errors import UserError
from workbench.maps import Moments, leave_out_shards

from .example_rows import noise


def shards(x: torch.Tensor, sizes: list[int]) -> list[Moments]:
    return [Moments().update({"x": part}) for part in x.split(sizes)]


def test_the_error_of_a_mean_is_the_standard_error():
    x = noise(50, 3) + 4
    found = leave_out_shards(lambda m: m.mean("x"), shards(x, [1] * 50))
    torch.testing.assert_close(found.value, x.mean(0))
    torch.testing.assert_close(found.error, x.std(0) / 50**0.5)
    assert found.shards == 50
    low, high = found.interval(2.0)
    torch.testing.assert_close(high - low, 4 * found.error)


def test_uneven_shards_have_about_the_same_error():
    x = noise(4000, 1)
    even = leave_out_shards(lambda m: m.mean("x")[0], shards(x, [100] * 40))
    uneven = leave_out_shards(lambda m: m.mean("x")[0], shards(x, [50, 150] * 20))
    assert float(even.error) == pytest.approx(1 / 4000**0.5, rel=0.35)
    assert float(uneven.error) == pytest.approx(1 / 4000**0.5, rel=0.35)


def test_uneven_shards_count_as_busing_says():
    """Sizes 5, 20 and 75 by the published formula, for a statistic that is no mean."""
    x, sizes = noise(100, 1) + 1, [5, 20, 75]
    found = leave_out_shards(lambda m: m.mean("x")[0] ** 2, shards(x, sizes))
    theta = float(x.mean()) ** 2
    left = [float(torch.cat([part for j, part in enumerate(x.split(sizes)) if j != i]).mean()) ** 2 for i in range(3)]
    middle = 3 * theta - sum((1 - m / 100) * one for m, one in zip(sizes, left, strict=True))
    variance = sum((100 / m * theta - (100 / m - 1) * one - middle) ** 2 / (100 / m - 1)
                   for m, one in zip(sizes, left, strict=True)) / 3  # fmt: skip
    assert float(found.error) == pytest.approx(variance**0.5, rel=1e-9)


def test_rows_that_belong_together_make_the_error_larger():
    x = noise(40, 1).repeat_interleave(25, 0) + 0.1 * noise(1000, 1, seed=1)
    apart = leave_out_shards(lambda m: m.mean("x")[0], shards(x[torch.randperm(1000)], [25] * 40))
    together = leave_out_shards(lambda m: m.mean("x")[0], shards(x, [25] * 40))
    assert float(together.error) > 2.5 * float(apart.error)


def test_one_shard_is_refused():
    with pytest.raises(UserError, match="at least 2 shards that hold rows; got 1"):
        leave_out_shards(lambda m: m.n, [*shards(noise(5, 1), [5]), Moments()])
