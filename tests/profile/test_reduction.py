"""Moments summed by an engine: equal for any number of workers and any deaths, and one process's to 1e-12."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from workbench.engines import Engine, LocalEngine
from workbench.errors import UserError
from workbench.maps.moments import Moments, total
from workbench.models import Model
from workbench.profile import plan as plans
from workbench.profile import profile_model, reduction
from workbench.profile.sums import load_moments, profile_moments

PROMPTS = [" ".join(f"w{(7 * i + j) % 180}" for j in range(1 + i % 9)) for i in range(60)]


class Shuffled(LocalEngine):
    """Stands for an engine of several workers: pieces in another order, and every third one done twice, as after a death."""

    name = "others"

    def __init__(self, stop_after: int = 1 << 30) -> None:
        self.left = stop_after

    def spread(self, model: Any, task: str, pieces: Iterable[Any], *, common: Mapping[str, Any] | None = None,
               stop: Any = None) -> Iterator[tuple[int, Any]]:  # fmt: skip
        for index, piece in list(enumerate(pieces))[::-1]:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            for _ in range(2 if index % 3 == 0 else 1):
                ((_, result),) = super().spread(model, task, [piece], common=common)
            yield index, result


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "BLOCK_ROWS", 30)


def apart(a: Moments, b: Moments) -> float:
    """The largest difference of two sums of products, over the largest entry."""
    return max(
        float((a.product[pair] - b.product[pair]).abs().max() / b.product[pair].abs().max()) for pair in b.product
    )


@pytest.mark.parametrize("options", [{"folds": 3}, {"folds": 2, "pairs": []}, {"products": torch.float64}])
def test_sums_are_those_of_one_process(saved_model: Model, tmp_path: Path, options: dict):
    one = profile_moments(saved_model, PROMPTS, tokens="all", **options)
    spread = profile_moments(saved_model, PROMPTS, tmp_path / "m", tokens="all", engine=Shuffled(), **options)
    assert [m.n for m in spread] == [m.n for m in one]
    for a, b in zip(spread, one, strict=True):
        assert all(torch.equal(a.shift[name], b.shift[name]) for name in b.names)
        assert set(a.product) == set(b.product)
        assert apart(a, b) < 1e-12
    assert [m.n for m in load_moments(tmp_path / "m")] == [m.n for m in one]
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_sums_are_of_the_rows_that_a_store_holds(saved_model: Model):
    rows = profile_model(saved_model, PROMPTS, tokens="all").read("resid_post.1").double()
    moments = total(profile_moments(saved_model, PROMPTS, tokens="all", folds=2, engine=Shuffled()))
    centred = rows - rows.mean(0)
    torch.testing.assert_close(moments.cov("resid_post.1", "resid_post.1"), centred.T @ centred, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stop_after", [0, 1, 4, 6, 9])
def test_a_stopped_reduction_goes_on_and_ends_with_the_same_bytes(saved_model: Model, tmp_path: Path, stop_after: int,
                                                                   monkeypatch: pytest.MonkeyPatch):  # fmt: skip
    monkeypatch.setattr(reduction, "RUNS", 5)
    profile_moments(saved_model, PROMPTS, tmp_path / "one", tokens="all", engine=Shuffled())
    with pytest.raises(KeyboardInterrupt):
        profile_moments(saved_model, PROMPTS, tmp_path / "two", tokens="all", engine=Shuffled(stop_after))
    profile_moments(saved_model, PROMPTS, tmp_path / "two", tokens="all", engine=Shuffled())
    files = [{f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert files[0] == files[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


def test_sums_that_do_not_fit_are_refused(saved_model: Model, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("workbench.profile.room.memory_free", lambda device: 1000)
    with pytest.raises(UserError, match=r"which has 0\.0 GiB free; give fewer sites"):
        profile_moments(saved_model, PROMPTS, engine=Shuffled())


@pytest.mark.xdist_group("ray")
def test_ray_sums_what_one_process_does(saved_model: Model, two_workers: Engine, tmp_path: Path):
    one = profile_moments(saved_model, PROMPTS, tokens="all", folds=2)
    profile_moments(saved_model, PROMPTS, tmp_path / "ray", tokens="all", folds=2, engine=two_workers)
    profile_moments(saved_model, PROMPTS, tmp_path / "others", tokens="all", folds=2, engine=Shuffled())
    assert all(apart(a, b) < 1e-12 for a, b in zip(load_moments(tmp_path / "ray"), one, strict=True))
    files = [{f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("ray", "others")]
    assert files[0] == files[1]
