"""8-bit storage: its size, its error and what is refused; without it nothing changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from workbench.adapters import Adapter, LowRank, vector
from workbench.errors import UserError
from workbench.sites import Site


def part(width: int, rank: int, seed: int, act: str = "linear") -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.arange(rank)  # ranks of very unlike size
    return LowRank(torch.randn(width, rank, generator=draw) * sizes, torch.randn(rank, generator=draw),
                   torch.randn(rank, width, generator=draw) / sizes[:, None], act)  # fmt: skip


def adapter() -> Adapter:
    return Adapter(
        {Site(1): part(64, 3, 0, "gelu"), Site(2, "mlp_out"): part(64, 2, 1)}, "prompt", 0.7, "x", {"name": "m"}
    )


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def test_a_paste_of_fourteen_layers_is_under_a_megabyte(tmp_path):
    made = Adapter({Site(layer): part(4096, 8, layer) for layer in range(14)}, meta={"kind": "paste"})
    made.save(tmp_path / "a", storage="int8")
    assert size(tmp_path / "a") < 1e6
    made.save(tmp_path / "b")
    assert size(tmp_path / "b") > 3.6e6


def test_what_is_loaded_is_within_half_a_step_of_what_was_saved(tmp_path):
    made = adapter()
    made.save(tmp_path / "a", storage="int8")
    loaded = Adapter.load(tmp_path / "a")
    head = json.loads((tmp_path / "a" / "adapter.json").read_text())
    assert (head["version"], head["storage"]) == (3, "int8")
    assert (loaded.positions, loaded.strength, loaded.name, loaded.base) == ("prompt", 0.7, "x", {"name": "m"})
    for site, was in made.parts.items():
        now = loaded.parts[site]
        assert (now.act, now.V.dtype, now.U.dtype) == (was.act, torch.float32, torch.float32)
        assert torch.equal(now.b, was.b)
        for a, b in ((now.V.T, was.V.T), (now.U, was.U)):
            step = b.abs().amax(1, keepdim=True) / 127
            assert bool(((a - b).abs() <= 0.5001 * step).all())
        for key in ("V", "U"):
            told, a, b = head["sites"][str(site)]["error"][key], getattr(now, key), getattr(was, key)
            assert told == pytest.approx(float((a - b).norm() / b.norm()), rel=1e-3)
            assert 0 < told < 0.02


def test_what_has_been_through_it_once_stays_as_it_is(tmp_path):
    adapter().save(tmp_path / "a", storage="int8")
    once = Adapter.load(tmp_path / "a")
    once.save(tmp_path / "b", storage="int8")
    for site, was in once.parts.items():
        torch.testing.assert_close(Adapter.load(tmp_path / "b").parts[site].U, was.U, rtol=1e-6, atol=0)


def test_zeros_and_terms_are_kept(tmp_path):
    both = vector(Site(0), torch.zeros(8)) + vector(Site(0), torch.ones(8), positions="first:2")
    both.save(tmp_path / "a", storage="int8")
    assert Adapter.load(tmp_path / "a") == both


def test_without_it_the_files_are_what_they_were(tmp_path):
    adapter().save(tmp_path / "a")
    head = json.loads((tmp_path / "a" / "adapter.json").read_text())
    assert head["version"] == 1
    assert "storage" not in head
    assert head["sites"]["resid_post.1"] == {"act": "gelu"}


def test_what_cannot_be_stored_or_read_is_told(tmp_path):
    with pytest.raises(UserError, match=r"unknown storage 'int4'; allowed: int8, or None"):
        adapter().save(tmp_path / "a", storage="int4")
    broken = vector(Site(0), torch.tensor([1.0, float("nan")]))
    with pytest.raises(UserError, match="U of an adapter part holds NaN or infinity, which int8 cannot keep"):
        broken.save(tmp_path / "a", storage="int8")
    assert not (tmp_path / "a").exists()
    adapter().save(tmp_path / "a", storage="int8")
    file = tmp_path / "a" / "adapter.safetensors"
    tensors = load_file(file)
    for damage in (
        {"resid_post.1.V.scale": torch.ones(2)},
        {"resid_post.1.V": torch.ones(64, 3)},
        {"resid_post.1.U": torch.ones(3, dtype=torch.int8)},
    ):
        save_file({**tensors, **damage}, file)
        with pytest.raises(UserError, match=r"damaged: [VU] of resid_post.1 is not int8 with a float32 scale"):
            Adapter.load(tmp_path / "a")
    save_file({**tensors, "resid_post.1.U.scale": torch.full((3,), float("inf"))}, file)
    with pytest.raises(UserError, match=r"damaged: U of resid_post.1 holds NaN or infinity"):
        Adapter.load(tmp_path / "a")
    header = tmp_path / "a" / "adapter.json"
    header.write_text(header.read_text().replace('"int8"', '"int2"'))
    with pytest.raises(UserError, match=r"storage must be 'int8', got 'int2'"):
        Adapter.load(tmp_path / "a")
