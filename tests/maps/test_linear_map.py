"""LinearMap: composition, truncation, saving, refusals."""

from __future__ import annotations

import pickle

import pytest
import torch

from workbench.errors import UserError
from workbench.maps.linear_map import LinearMap


def random_map(d_in: int, d_out: int, seed: int = 0) -> LinearMap:
    g = torch.Generator().manual_seed(seed)
    return LinearMap(torch.randn(d_in, d_out, generator=g), torch.randn(d_out, generator=g), {"method": "random"})


def test_composition_is_application_in_order():
    a, b, x = random_map(5, 7), random_map(7, 3, 1), torch.randn(4, 5)
    torch.testing.assert_close((a @ b)(x), b(a(x)))
    with pytest.raises(UserError, match="width 7, the second takes 5"):
        a @ a


def test_truncation_is_the_best_of_its_rank_and_full_rank_is_the_map():
    a = random_map(6, 4)
    torch.testing.assert_close(a.truncate(4).weight, a.weight)
    cut = a.truncate(2)
    error = (a.weight - cut.weight).norm()
    assert cut.rank == 2
    torch.testing.assert_close(error, a.singular_values[2:].norm())
    mean = torch.randn(6)
    torch.testing.assert_close(a.truncate(2, mean)(mean), a(mean))
    with pytest.raises(UserError, match=r"1\.\.4"):
        a.truncate(5)


def test_identity_zeros_rank_and_condition():
    assert LinearMap.identity(3).condition == 1
    assert LinearMap.zeros(3, 2).rank == 0
    assert LinearMap.zeros(3, 2).condition == float("inf")


def test_application_follows_the_dtype_of_the_states():
    a = random_map(5, 3)
    assert a(torch.ones(2, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert a.to(torch.float64).weight.dtype == torch.float64
    with pytest.raises(UserError, match="width 5; got width 4"):
        a(torch.ones(2, 4))


@pytest.mark.parametrize("name", ["folder", "file.safetensors"])
def test_save_load_equal_and_no_silent_overwrite(tmp_path, name):
    a = random_map(5, 3)
    a.save(tmp_path / name)
    assert LinearMap.load(tmp_path / name) == a
    assert LinearMap.load(tmp_path / name).meta == a.meta
    with pytest.raises(UserError, match="exists already"):
        a.save(tmp_path / name)
    a.save(tmp_path / name, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]


def test_anything_but_safetensors_is_refused(tmp_path):
    bad = tmp_path / "map.pt"
    bad.write_bytes(pickle.dumps({"weight": 1}))
    with pytest.raises(UserError, match="refused to read"):
        LinearMap.load(bad)
    renamed = tmp_path / "map.safetensors"
    renamed.write_bytes(bad.read_bytes())
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        LinearMap.load(renamed)
    with pytest.raises(UserError, match="does not exist"):
        LinearMap.load(tmp_path / "absent.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no map\.json"):
        LinearMap.load(tmp_path / "empty")


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"\[3, 2\] and \[3\]"):
        LinearMap(torch.zeros(3, 2), torch.zeros(3))
