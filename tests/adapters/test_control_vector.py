"""GGUF control vectors: what repeng writes is read, what is written repeng reads, and damaged files are refused."""

from __future__ import annotations

import builtins
import struct

import pytest
import torch

from workbench.adapters import Adapter, LowRank, vector
from workbench.adapters.formats import export_adapter
from workbench.errors import UserError
from workbench.sites import Site

WIDTH = 8


def constant(positions: str = "all", layers: tuple[int, ...] = (2, 5)) -> Adapter:
    g = torch.Generator().manual_seed(0)
    parts = {
        site: part for l in layers for site, part in vector(Site(l), torch.randn(WIDTH, generator=g)).parts.items()
    }
    return Adapter(parts, positions, 0.5)


def written_as_repeng_does(gguf, path, directions, architecture="controlvector"):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string(f"{architecture}.model_hint", "llama")
    writer.add_uint32(f"{architecture}.layer_count", len(directions))
    for name, data in directions.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf():
    return pytest.importorskip("gguf", reason="the package gguf is not installed")


def test_direction_n_is_added_to_the_output_of_block_n(gguf, tmp_path):
    v = torch.randn(2, WIDTH)
    directions = {"direction.1": v[0].numpy(), "direction.12": v[1].half().numpy()}
    written_as_repeng_does(gguf, tmp_path / "v.gguf", directions)
    loaded = Adapter.load(tmp_path / "v.gguf")
    assert (loaded.positions, loaded.layers, loaded.meta["model_hint"]) == ("all", [1, 12], "llama")
    torch.testing.assert_close(loaded.delta(Site(1), torch.randn(WIDTH)), v[0])
    torch.testing.assert_close(loaded.parts[Site(12)].U[0], v[1].half())


def test_a_constant_paste_is_written_and_read_again(gguf, tmp_path):
    adapter = constant()
    export_adapter(adapter, tmp_path / "v.gguf", to="gguf")
    loaded = Adapter.load(tmp_path / "v.gguf")
    assert loaded.strength == 1
    for site in adapter.parts:
        torch.testing.assert_close(
            loaded.delta(site, torch.randn(3, WIDTH)), adapter.delta(site, torch.randn(3, WIDTH))
        )
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.layer_count").contents() == 2
    assert [t.name for t in reader.tensors] == ["direction.2", "direction.5"]


def test_what_a_control_vector_cannot_say_is_refused(tmp_path):
    g = torch.Generator().manual_seed(0)
    reads = LowRank(torch.randn(WIDTH, 1, generator=g), torch.zeros(1), torch.ones(1, WIDTH))
    out = tmp_path / "v.gguf"
    with pytest.raises(UserError, match=r"(99\.\d|100\.0)% of the mean square of its delta varies"):
        export_adapter(Adapter({Site(1): reads}, "all"), out, to="gguf")
    with pytest.raises(UserError, match=r"acts at resid_post; this adapter acts at mlp_out\.1"):
        export_adapter(vector(Site(1, "mlp_out"), torch.ones(WIDTH)), out, to="gguf")
    with pytest.raises(UserError, match="at all positions; this adapter acts at 'last': pass any_positions"):
        export_adapter(constant("last"), out, to="gguf")
    with pytest.raises(UserError, match="acts differently at"):
        export_adapter(constant("last") + constant("first:1"), out, to="gguf")
    assert not out.exists()


def test_positions_may_be_given_up_and_layer_0_is_warned_of(gguf, tmp_path, caplog):
    export_adapter(constant("last", (0, 1)), tmp_path / "v.gguf", to="gguf", any_positions=True)
    assert Adapter.load(tmp_path / "v.gguf").layers == [0, 1]
    assert "llama.cpp refuses it" in caplog.text


def test_files_that_are_no_control_vectors_are_refused(gguf, tmp_path):
    file = tmp_path / "v.gguf"
    v = torch.ones(WIDTH).numpy()
    cases = [
        ({"direction.1": v}, "llama", "architecture is 'llama'"),
        ({"other.1": v}, "controlvector", "holds no direction.N"),
        ({"direction.x": v}, "controlvector", "'direction.x' does not say a layer"),
        ({"direction.1": v, "direction.2": v[:4]}, "controlvector", "differ in width"),
        ({"direction.1": torch.ones(2, 4).numpy()}, "controlvector", r"has shape \[2, 4\]"),
        (
            {"direction.1": torch.full((WIDTH,), float("inf")).numpy()},
            "controlvector",
            "direction.1 holds NaN or infinity",
        ),
        ({"direction.1": v.astype("int32")}, "controlvector", "is stored as I32"),
    ]
    for directions, architecture, said in cases:
        written_as_repeng_does(gguf, file, directions, architecture)
        with pytest.raises(UserError, match=said):
            Adapter.load(file)
    with pytest.raises(UserError, match="leave site out"):
        Adapter.load(file, site=3)


def test_truncated_and_garbled_files_are_refused_in_one_line(gguf, tmp_path):
    file = tmp_path / "v.gguf"
    export_adapter(constant(), file, to="gguf")
    whole = file.read_bytes()
    heads = [
        whole[:4] + struct.pack("<IQQ", *counts) + whole[24:] for counts in ((3, 2**60, 3), (3, 2, 2**60), (9, 2, 3))
    ]
    for data in heads:
        file.write_bytes(data)
        with pytest.raises(UserError, match="is no control vector: version"):
            Adapter.load(file)
    for n in range(0, len(whole) - 1, 3):
        file.write_bytes(whole[:n])
        with pytest.raises(UserError) as caught:
            Adapter.load(file)
        assert "\n" not in str(caught.value)


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "gguf":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    (tmp_path / "v.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="pip install gguf"):
        Adapter.load(tmp_path / "v.gguf")
    with pytest.raises(UserError, match="pip install gguf"):
        export_adapter(constant(), tmp_path / "w.gguf", to="gguf")
