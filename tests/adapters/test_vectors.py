"""Files of steering vectors, torch archives that are read as tensors or refused, and the formats that constants go to."""

from __future__ import annotations

import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from workbench.adapters import Adapter, LowRank, vector
from workbench.adapters.constants import constants_of, varying_share
from workbench.adapters.formats import export_adapter
from workbench.adapters.torch_archive import read_archive
from workbench.adapters.vectors import read
from workbench.errors import UserError
from workbench.sites import Site

WIDTH = 6


def some(seed: int = 0) -> Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


def check(adapter: Adapter, expected: dict[Site, Tensor]) -> None:
    assert adapter.positions == "all"
    assert set(adapter.parts) == set(expected)
    for site, v in expected.items():
        torch.testing.assert_close(adapter.delta(site, torch.randn(3, WIDTH)), v.expand(3, WIDTH))


def test_a_tensor_and_where_it_acts(tmp_path):
    v = some()
    torch.save(v, tmp_path / "vec_layer_13_Llama-2-7b-chat-hf.pt")  # as CAA names them
    check(Adapter.load(tmp_path / "vec_layer_13_Llama-2-7b-chat-hf.pt"), {Site(13): v})
    torch.save(v, tmp_path / "v2.pt")
    check(Adapter.load(tmp_path / "v2.pt", site=4), {Site(4): v})
    check(Adapter.load(tmp_path / "v2.pt", site="mlp_out.4"), {Site(4, "mlp_out"): v})
    assert Adapter.load(tmp_path / "v2.pt", site=4, positions="last").positions == "last"
    with pytest.raises(UserError, match="does not say at which layer its vector acts; pass site="):
        Adapter.load(tmp_path / "v2.pt")
    with pytest.raises(UserError, match="unknown positions 'middle'"):
        Adapter.load(tmp_path / "v2.pt", site=4, positions="middle")


@pytest.mark.parametrize("meta", [{"layer": "7"}, {"site": "resid_post.7"}, {"site": "blocks.7.hook_resid_post"}])
def test_the_layer_in_the_metadata(meta, tmp_path):
    save_file({"refusal": some()}, tmp_path / "v2.safetensors", meta)
    check(Adapter.load(tmp_path / "v2.safetensors"), {Site(7): some()})


@pytest.mark.parametrize("names", [(3, 5), ("3", "5"), ("layer_3", "layer_5"), ("model.layers.3", "model.layers.5"),
                                   ("direction.3", "direction.5"), ("resid_post.3", "blocks.5.hook_resid_post")])  # fmt: skip
def test_vectors_by_layer(names, tmp_path):
    expected = {Site(3): some(3), Site(5): some(5)}
    torch.save(dict(zip(names, (some(3), some(5)[None]), strict=True)), tmp_path / "v.pt")
    check(Adapter.load(tmp_path / "v.pt"), expected)


def test_a_row_for_each_layer(tmp_path):
    rows = torch.stack([some(), torch.zeros(WIDTH), some(2)])
    save_file({"vectors": rows}, tmp_path / "v.safetensors")
    check(Adapter.load(tmp_path / "v.safetensors"), {Site(0): some(), Site(2): some(2)})  # zeros add nothing


def test_what_are_no_vectors_is_refused(tmp_path):
    file = tmp_path / "v.pt"
    cases = [
        ([some()], "holds no vectors"),
        ({}, "holds no vectors"),
        ({3: 5}, "holds no vectors"),
        ({3: torch.zeros(2, 2, 2)}, r"has shape \[2, 2, 2\]; a steering vector is \[d\]"),
        ({3: torch.zeros(())}, r"has shape \[\]"),
        ({3: some(), 4: torch.zeros(0)}, r"has shape \[0\]"),
        (torch.zeros(4, WIDTH), "zeros alone"),
        ({3: some(), 4: torch.ones(7)}, "several widths"),
        ({3: some(), "layer_3": some()}, "two vectors for resid_post.3"),
        ({"happy": some(), "sad": some()}, "'happy' does not say a layer"),
        ({"layer_3_of_layer_5": some(), 4: some()}, "does not say a layer"),
        ({-1: some(), 4: some()}, "does not say a layer"),
        ({3: some() / 0}, "vector of resid_post.3 holds NaN or infinity"),
        ({3: torch.ones(4, dtype=torch.int64)}, "not floating point"),
    ]
    for value, said in cases:
        torch.save(value, file)
        with pytest.raises(UserError, match=said):
            Adapter.load(file)
    torch.save({3: some(), 4: some()}, file)
    with pytest.raises(UserError, match="leave site out"):
        Adapter.load(file, site=3)
    torch.save(torch.ones(3, 4), file)
    with pytest.raises(UserError, match="leave site out"):
        read(file, site=3)


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


def test_pickles_are_refused_and_nothing_in_them_runs(tmp_path, capsys):
    file = tmp_path / "layer_3.pt"
    for data in (pickle.dumps(Evil()), pickle.dumps({3: some()}), b"", b"PK\x03\x04"):
        file.write_bytes(data)
        with pytest.raises(UserError, match="was refused: it is damaged, or holds more than tensors"):
            Adapter.load(file)
    torch.save({3: Evil()}, file)
    with pytest.raises(UserError, match="was refused"):
        Adapter.load(file)
    assert "ran" not in capsys.readouterr().out


def test_sizes_are_checked_before_anything_is_allocated(tmp_path):
    file = tmp_path / "layer_3.pt"
    torch.save(torch.zeros(1).expand(10**12), file)  # a kilobyte on disk
    with pytest.raises(UserError, match=r"a tensor of shape \[1000000000000\] is not stored in full"):
        Adapter.load(file)
    torch.save(
        torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1), (10**12,), check_invariants=True),
        file,
    )
    with pytest.raises(UserError, match="was refused"):
        Adapter.load(file)
    torch.save(some(), tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    with pytest.raises(UserError, match="was refused"):
        Adapter.load(file)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_truncated_and_garbled_files_are_refused_in_one_line(suffix, tmp_path):
    file = tmp_path / f"layer_3{suffix}"
    torch.save(some(), file) if suffix == ".pt" else save_file({"v": some()}, file)
    whole = file.read_bytes()
    noise = torch.Generator().manual_seed(0)
    garbled = []
    for _ in range(60):
        i, byte = (int(torch.randint(n, (), generator=noise)) for n in (len(whole), 256))
        garbled.append(whole[:i] + bytes([byte]) + whole[i + 1 :])
    for data in [whole[:n] for n in range(0, len(whole), max(1, len(whole) // 60))] + garbled:
        file.write_bytes(data)
        said = ""
        try:
            found = Adapter.load(file)  # one changed byte may change no more than a number, or a name
            assert all(bool(torch.isfinite(part.U).all()) for part in found.parts.values())
        except UserError as err:
            said = str(err)
        assert "\n" not in said


def test_archives_of_plain_values_are_read(tmp_path):
    torch.save({"a": [some(), 1, "x"], "b": {"c": None}}, tmp_path / "x.pt")
    assert read_archive(tmp_path / "x.pt")["b"] == {"c": None}
    looped: list = [torch.zeros(1).expand(10**12)]
    looped.append(looped)
    torch.save(looped, tmp_path / "x.pt")
    with pytest.raises(UserError, match="not stored in full"):
        read_archive(tmp_path / "x.pt")


def test_a_constant_is_written_and_read_again(tmp_path):
    adapter = (vector(Site(2), some(2), positions="all") + vector(Site(3, "mlp_out"), some(3), positions="all")) * 0.5
    export_adapter(adapter, tmp_path / "v.safetensors", to="safetensors")
    loaded = Adapter.load(tmp_path / "v.safetensors")
    check(loaded, {Site(2): some(2) / 2, Site(3, "mlp_out"): some(3) / 2})
    with pytest.raises(UserError, match="exists already"):
        export_adapter(adapter, tmp_path / "v.safetensors", to="safetensors")
    with pytest.raises(UserError, match="name it so"):
        export_adapter(adapter, tmp_path / "v.pt", to="safetensors")
    with pytest.raises(UserError, match="is a folder"):
        export_adapter(adapter, tmp_path, to="safetensors", overwrite=True)
    with pytest.raises(UserError, match="unknown format 'onnx'; allowed: pyreft, gguf, safetensors"):
        export_adapter(adapter, tmp_path / "x", to="onnx")


def test_what_varies_is_said_where_a_constant_is_asked_for():
    generator = torch.Generator().manual_seed(1)
    v, u = torch.randn(WIDTH, 1, generator=generator), torch.randn(1, WIDTH, generator=generator)
    b = v.norm()[None]  # (h . v)^2 is b^2 on average: half of the mean square is the constant
    part = LowRank(v, b, u)
    assert abs(varying_share(part) - 0.5) < 0.05
    with pytest.raises(UserError, match=r"no constant at resid_post\.1: [\d.]+% of the mean square .*variance 1"):
        constants_of(Adapter({Site(1): part}))
    with pytest.raises(UserError, match=r"no constant at resid_post\.1: 0\.0% of .*on the 4 rows given"):
        constants_of(Adapter({Site(1): part}), {Site(1): torch.ones(4, WIDTH)})
    silent = LowRank(
        torch.cat([v, 0 * v], 1), torch.cat([b, b]), torch.cat([0 * u, u]), "relu"
    )  # what reads writes nothing
    torch.testing.assert_close(constants_of(Adapter({Site(1): silent}, strength=3.0))[Site(1)], 3 * b * u[0])
    assert varying_share(silent) == 0
