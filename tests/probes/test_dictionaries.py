"""Dictionaries: each kind against its formula written out, each format against a planted one, each refusal by name."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from probes.dictionaries import KINDS, Dictionary
from workbench.errors import UserError

D, F, N, K = 6, 11, 9, 3


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def planted(kind: str = "relu", **options) -> Dictionary:
    extra = {"jumprelu": {"threshold": draw(F, seed=5).abs()}, "topk": {"k": K},
             "gated": {"r_mag": draw(F, seed=6), "b_mag": draw(F, seed=7)}}.get(kind, {})  # fmt: skip
    parts = {"W_enc": draw(D, F), "b_enc": draw(F, seed=1), "W_dec": draw(F, D, seed=2), "b_dec": draw(D, seed=3)}
    return Dictionary(**parts, kind=kind, **extra, **options)


def by_hand(kind: str, d: Dictionary, row: list[float]) -> list[float]:
    """One row's features, a number at a time, in float64."""
    z = [v - (float(d.b_dec[i]) if d.subtract_b_dec else 0.0) for i, v in enumerate(row)]
    bare = [sum(z[i] * float(d.W_enc[i, j]) for i in range(D)) for j in range(F)]
    p = [bare[j] + float(d.b_enc[j]) for j in range(F)]
    if kind == "relu":
        return [max(v, 0.0) for v in p]
    if kind == "jumprelu":
        return [v if v > float(d.threshold[j]) and v > 0 else 0.0 for j, v in enumerate(p)]
    if kind == "topk":
        kept = sorted(range(F), key=lambda j: -p[j])[:K]
        return [max(p[j], 0.0) if j in kept else 0.0 for j in range(F)]
    magnitude = [bare[j] * np.exp(float(d.r_mag[j])) + float(d.b_mag[j]) for j in range(F)]
    return [max(magnitude[j], 0.0) if p[j] > 0 else 0.0 for j in range(F)]


@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_its_formula(kind, subtract):
    d, h = planted(kind, subtract_b_dec=subtract), draw(N, D, seed=9)
    wanted = torch.tensor([by_hand(kind, d, row) for row in h.tolist()])
    a = d.encode(h)
    torch.testing.assert_close(a, wanted.float(), atol=1e-5, rtol=1e-5)
    assert (a > 0).any()
    assert not (a > 0).all()
    torch.testing.assert_close(d.decode(a), a @ d.W_dec + d.b_dec)
    assert torch.equal(d(h), d.decode(a, h))


def test_normalised_rows_are_scaled_back():
    h = 7 * draw(N, D, seed=9)
    for normalise in ("constant_norm_rescale", "layer_norm"):
        d = planted("relu", normalise=normalise, subtract_b_dec=True)
        if normalise == "layer_norm":
            mean, scale = h.mean(1, keepdim=True), h.std(1, keepdim=True)
            z = (h - mean) / (scale + 1e-5)
        else:
            mean, scale = torch.zeros(N, 1), h.norm(dim=1, keepdim=True) / D**0.5
            z = h / scale
        plain = planted("relu", subtract_b_dec=True)
        torch.testing.assert_close(d.encode(h), plain.encode(z))
        torch.testing.assert_close(d(h), plain.decode(plain.encode(z)) * scale + mean)
        with pytest.raises(UserError, match=r"give decode the rows too"):
            d.decode(d.encode(h))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_loaded_again(kind, tmp_path):
    d = planted(kind, subtract_b_dec=True, site="resid_post.4", model="a/b", meta={"note": [1, "x"]})
    d.save(tmp_path / "d")
    again = Dictionary.load(tmp_path / "d")
    assert again == d
    assert again.meta == d.meta
    assert {p.name for p in (tmp_path / "d").iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    assert json.loads((tmp_path / "d" / "cfg.json").read_text())["metadata"]["hook_name"] == "blocks.4.hook_resid_post"
    with pytest.raises(UserError, match="exists already"):
        d.save(tmp_path / "d")
    assert d != replace(d, subtract_b_dec=False)
    halves = d.to(torch.float16)
    halves.save(tmp_path / "half")
    torch.testing.assert_close(Dictionary.load(tmp_path / "half").W_enc, halves.W_enc.float())


def write_saelens(folder: Path, d: Dictionary, cfg: dict, **more: torch.Tensor) -> Path:
    folder.mkdir()
    save_file({**{k: v.contiguous() for k, v in d.tensors.items()}, **more}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": F, **cfg}))
    return folder


def test_saelens_of_before_version_6(tmp_path):
    """Everything in cfg itself, topk as an activation of the standard kind, b_dec subtracted unless it says otherwise."""
    cfg = {"hook_name": "blocks.2.hook_resid_pre", "model_name": "gpt2", "activation_fn_str": "topk",
           "activation_fn_kwargs": {"k": K}, "normalize_activations": "layer_norm"}  # fmt: skip
    found = Dictionary.load(write_saelens(tmp_path / "old", planted("relu"), cfg))
    assert (found.kind, found.k, found.site, found.model) == ("topk", K, "resid_pre.2", "gpt2")
    assert found.subtract_b_dec
    assert found.normalise == "layer_norm"


def test_saelens_scaled_by_a_constant(tmp_path):
    cfg = {
        "architecture": "jumprelu",
        "normalize_activations": "expected_average_only_in",
        "apply_b_dec_to_input": True,
    }
    d, h, scale = planted("jumprelu", subtract_b_dec=True), draw(N, D, seed=9), 0.25
    folder = write_saelens(tmp_path / "d", d, cfg)
    found = Dictionary.load(folder, scale=scale)
    torch.testing.assert_close(found.encode(h), d.encode(h * scale))
    torch.testing.assert_close(found(h), d(h * scale) / scale)
    with pytest.raises(UserError, match=r"does not say by how much; pass scale="):
        Dictionary.load(folder)
    with pytest.raises(UserError, match=r"give no scale"):
        Dictionary.load(write_saelens(tmp_path / "e", d, {"architecture": "jumprelu"}), scale=2.0)


def test_saelens_that_ranks_by_what_is_written(tmp_path):
    """rescale_acts_by_decoder_norm: the k largest of p * |W_dec_f|, decoded with W_dec_f / |W_dec_f|."""
    d, h = planted("topk"), draw(N, D, seed=9)
    cfg = {"architecture": "topk", "k": K, "apply_b_dec_to_input": False, "rescale_acts_by_decoder_norm": True}
    found = Dictionary.load(write_saelens(tmp_path / "d", d, cfg))
    norm = d.W_dec.norm(dim=1)
    p = (h @ d.W_enc + d.b_enc) * norm
    top = p.topk(K)
    a = torch.zeros_like(p).scatter_(1, top.indices, top.values.relu())
    torch.testing.assert_close(found.encode(h), a)
    torch.testing.assert_close(found(h), (a / norm) @ d.W_dec + d.b_dec)


def test_gemma_scope(tmp_path):
    d, h = planted("jumprelu"), draw(N, D, seed=9)
    folder = tmp_path / "layer_20" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{name: value.numpy() for name, value in d.tensors.items()})
    for path in (folder, folder / "params.npz"):
        found = Dictionary.load(path)
        assert found.site == "resid_post.20"
        assert torch.equal(found.encode(h), d.encode(h))
        assert not found.subtract_b_dec


def learning_state(d: Dictionary, name: str) -> dict[str, torch.Tensor]:
    linear = {"encoder.weight": d.W_enc.T.contiguous(), "decoder.weight": d.W_dec.T.contiguous()}
    if name == "AutoEncoder":
        return {**linear, "encoder.bias": d.b_enc, "bias": d.b_dec}
    if name == "AutoEncoderNew":
        return {**linear, "encoder.bias": d.b_enc, "decoder.bias": d.b_dec}
    if name == "GatedAutoEncoder":
        return {**linear, "gate_bias": d.b_enc, "mag_bias": d.b_mag, "r_mag": d.r_mag, "decoder_bias": d.b_dec}
    if name == "JumpReluAutoEncoder":
        return dict(d.tensors)
    state = {**linear, "encoder.bias": d.b_enc, "b_dec": d.b_dec, "k": torch.tensor(K, dtype=torch.int32)}
    return {**state, "threshold": torch.tensor(0.5)}


@pytest.mark.parametrize(
    ("name", "kind", "subtract"),
    [("AutoEncoder", "relu", True), ("AutoEncoderNew", "relu", False), ("GatedAutoEncoder", "gated", True),
     ("JumpReluAutoEncoder", "jumprelu", False), ("AutoEncoderTopK", "topk", True), ("BatchTopKSAE", "jumprelu", True)],
)  # fmt: skip
def test_dictionary_learning(name, kind, subtract, tmp_path):
    d, h = planted(kind, subtract_b_dec=subtract), draw(N, D, seed=9)
    if name == "BatchTopKSAE":  # one threshold for all
        d = replace(d, threshold=torch.full((F,), 0.5))
    torch.save(learning_state(d, name), tmp_path / "ae.pt")
    trainer = {"dict_class": name, "lm_name": "m", "layer": 3, "submodule_name": "resid_post_layer_3"}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    found = Dictionary.load(tmp_path)
    assert (found.kind, found.site, found.model) == (kind, "resid_post.3", "m")
    torch.testing.assert_close(found(h), d(h))
    # the first class's own loader rewrites it with decoder rows of length 1; the others' features are as they stand
    unit = d.W_dec.norm(dim=1) if name == "AutoEncoder" else 1.0
    torch.testing.assert_close(found.encode(h), d.encode(h) * unit)


def test_a_zip_bomb_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "params.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("W_enc.npy", bytes(64 << 20))
    with pytest.raises(UserError, match=r"refused to read .*params\.npz: it would unpack to 67,108,864 bytes"):
        Dictionary.load(tmp_path)


def test_an_array_that_claims_more_than_it_holds_is_refused(tmp_path):
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }"
    text = header + b" " * (63 - (len(header) + 10) % 64) + b"\n"
    npy = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as archive:
        archive.writestr("W_enc.npy", npy)
    with pytest.raises(UserError, match=r"would unpack to 4,000,000,000,000 bytes"):
        Dictionary.load(tmp_path)


def test_nothing_that_runs_is_loaded(tmp_path):
    np.savez(tmp_path / "params.npz", W_enc=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match="array of Python objects"):
        Dictionary.load(tmp_path)
    folder = tmp_path / "learning"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoder"}}))
    torch.save({"bias": Path("x")}, folder / "ae.pt")
    with pytest.raises(UserError, match="only tensors are read"):
        Dictionary.load(folder)


def test_what_does_not_fit_is_told_in_one_line(tmp_path):
    d = planted("jumprelu", site="resid_post.4", model="a/b")
    with pytest.raises(UserError, match=r"resid_post\.4 of a/b\) reads rows of width 6; got width 7"):
        d.encode(draw(N, 7))
    with pytest.raises(UserError, match=r"does not belong to resid_post\.5"):
        d.check(site=5)
    with pytest.raises(UserError, match=r"trained on another model than c/d"):
        d.check(model="c/d")
    d.check(width=D, site="blocks.4.hook_resid_post", model="a/b")
    with pytest.raises(UserError, match="needs threshold"):
        replace(d, threshold=None)
    with pytest.raises(UserError, match="unknown kind of dictionary 'soft'"):
        replace(d, kind="soft")
    with pytest.raises(UserError, match=r"needs b_dec \[6\]; got \[5\]"):
        replace(d, b_dec=torch.zeros(5))
    with pytest.raises(UserError, match=r"k in 1\.\.11; got 12"):
        replace(planted("topk"), k=12)
    with pytest.raises(UserError, match="unknown normalisation"):
        replace(d, normalise="l2")
    with pytest.raises(UserError, match="no such file or folder"):
        Dictionary.load(tmp_path / "none")
    with pytest.raises(UserError, match=r"holds none of sae_weights\.safetensors"):
        Dictionary.load(tmp_path)
    with pytest.raises(UserError, match=r"not bundled; allowed: bundled:recipient\.resid_post"):
        Dictionary.load("bundled:nonsense")


@pytest.mark.parametrize(
    ("cfg", "message"),
    [({"architecture": "temporal"}, "architecture 'temporal' is not read"), ({"architecture": "topk"}, "must give k"),
     ({"architecture": "gated"}, "r_mag, b_mag missing"), ({"reshape_activations": "hook_z"}, "single attention heads")],
)  # fmt: skip
def test_a_saelens_folder_that_cannot_be_read(cfg, message, tmp_path):
    with pytest.raises(UserError, match=message):
        Dictionary.load(write_saelens(tmp_path / "d", planted("relu"), cfg))


def test_damaged_folders(tmp_path):
    folder = write_saelens(tmp_path / "d", planted("relu"), {})
    (folder / "cfg.json").write_text("{")
    with pytest.raises(UserError, match=r"cfg\.json is damaged"):
        Dictionary.load(folder)
    (folder / "cfg.json").write_text("{}")
    (folder / "sae_weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        Dictionary.load(folder)
    broken = planted("relu")
    broken.W_enc[0, 0] = torch.nan
    with pytest.raises(UserError, match="W_enc holds NaN"):
        Dictionary.load(write_saelens(tmp_path / "e", broken, {}))


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "gated"])
def test_chosen_features_fire_as_they_did(kind):
    d, h, chosen = planted(kind), draw(N, D, seed=9), [7, 2]
    torch.testing.assert_close(d.select(chosen).encode(h), d.encode(h)[:, chosen])
    with pytest.raises(UserError, match="features 0 to 10; got 2 to 11"):
        d.select([2, 11])
    with pytest.raises(UserError, match="named twice"):
        d.select([2, 2])
    with pytest.raises(UserError, match="encode with all of them"):
        planted("topk").select([1])
