"""Activations of other programs become stores that say what they know; what is damaged or could run code is refused."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from workbench.alignment import pair_rows
from workbench.errors import UserError
from workbench.prompts import PromptSet
from workbench.sites import Site
from workbench.store import Store, check_pair
from workbench.store import imports as store_imports
from workbench.store.checkup import find_damage
from workbench.store.imports import import_store
from workbench.store.listing import describe_store
from workbench.store.merge import merge_stores

N, D, LAYERS, CONTEXT = 7, 6, 3, 4
TEXTS = [f"prompt {i}" for i in range(N)]


def profile(path: Path, n: int = N, dtype: torch.dtype = torch.bfloat16, **metadata: str) -> dict[str, torch.Tensor]:
    """A file as Command-V's `capture_activations` writes it."""
    noise = torch.Generator().manual_seed(0)
    found = {f"model.layers.{i}": torch.randn(n, D, generator=noise).to(dtype) for i in range(LAYERS)}
    said = {"model_name": "org/base", "num_layers": str(LAYERS), "hidden_size": str(D), "num_prompts": str(n),
            "activation_point": "Layer.out", "aggregation": "last", **metadata}  # fmt: skip
    save_file(found, path, metadata=said)
    return found


def cache(path: Path, n: int = N, dtype: str = "float32", tokens: bool = True, columns: dict[str, str] | None = None,
          **config: object) -> dict[str, np.ndarray]:  # fmt: skip
    """A folder as SAELens' CacheActivationsRunner saves it: a fixed array [context, d] in each row, and token ids."""
    noise = np.random.default_rng(0)
    names = columns or {"blocks.3.hook_resid_post": dtype}
    found = {name: noise.standard_normal((n, CONTEXT, D)).astype(kind) for name, kind in names.items()}
    features = {name: datasets.Array2D(shape=(CONTEXT, D), dtype=kind) for name, kind in names.items()}
    if tokens:
        features["token_ids"] = datasets.List(datasets.Value("int32"), length=CONTEXT)
        found["token_ids"] = np.arange(n * CONTEXT, dtype="int32").reshape(n, CONTEXT)
    made = datasets.Dataset.from_dict(dict(found), features=datasets.Features(features))
    made.save_to_disk(str(path))
    if config:
        (path / "cache_activations_runner_cfg.json").write_text(json.dumps(config))
    return found


# -- Command-V --------------------------------------------------------------------------------------------------------


def test_a_command_v_profile_is_the_last_token_after_each_block(tmp_path):
    values = profile(tmp_path / "p.safetensors")
    store = import_store(tmp_path / "p.safetensors", tmp_path / "s", prompts=TEXTS)
    assert not find_damage(store.path)
    assert store.sites == [Site(i) for i in range(LAYERS)]
    assert (store.dtype, store.tokens, store.name, store.n_rows) == ("bfloat16", "last", "org/base", N)
    for i in range(LAYERS):
        assert torch.equal(store.read(i), values[f"model.layers.{i}"])
        assert torch.equal(store.read(i, store.rows_of(4)), values[f"model.layers.{i}"][4:5])
    assert store.prompt_set().hash == store.prompt_hash == PromptSet.load(TEXTS).hash
    assert store.fingerprint == {}
    assert store.manifest["source"]["unknown"] == ["fingerprint", "template", "versions"]
    assert store.rows()["token_id"].isna().all()


def test_with_its_prompts_a_profile_pairs_and_without_them_it_does_not(tmp_path):
    for name, n in (("a", N), ("b", N)):
        profile(tmp_path / f"{name}.safetensors", n, model_name=name)
    a, b = (import_store(tmp_path / f"{name}.safetensors", tmp_path / name, prompts=TEXTS) for name in "ab")
    check_pair(a, b)
    with pytest.raises(UserError, match="an imported store does not say which characters its rows stand for"):
        pair_rows(a, b)
    c, d = (import_store(tmp_path / f"{name}.safetensors", tmp_path / f"{name}2") for name in "ab")
    with pytest.raises(UserError, match=r"differ in prompts \(a\.safetensors, unknown:.*unknown:"):
        check_pair(c, d)
    with pytest.raises(UserError, match=r"the prompts of these rows are unknown"):
        c.prompt_set()
    assert describe_store(c.path, prompt=2)["prompt"]["text"] is None
    assert "prompts" in c.manifest["source"]["unknown"]
    with pytest.raises(UserError, match="its prompts are unknown, so nobody can tell"):
        merge_stores([c, c], tmp_path / "m")
    merged = merge_stores([c, c], tmp_path / "m", allow_duplicates=True)
    assert torch.equal(merged.read(1), torch.cat([c.read(1)] * 2))


def test_the_doubled_template_of_instruct_models_is_told(tmp_path, caplog):
    profile(tmp_path / "p.safetensors", model_name="org/Model-Instruct")
    with caplog.at_level(logging.WARNING, "workbench"):
        import_store(tmp_path / "p.safetensors", tmp_path / "s")
    assert "through the chat template twice" in caplog.text


def test_what_a_profile_does_not_say_is_unknown(tmp_path):
    save_file({"model.layers.4": torch.zeros(2, 3)}, tmp_path / "p.safetensors")
    store = import_store(tmp_path / "p.safetensors", tmp_path / "s")
    assert (store.name, store.tokens, store.sites) == ("unknown", "unknown", [Site(4)])
    unknown = {"fingerprint", "template", "versions", "model", "tokens", "n_layers", "prompts"}
    assert set(store.manifest["source"]["unknown"]) == unknown
    assert import_store(tmp_path / "p.safetensors", tmp_path / "t", model="me/mine").name == "me/mine"


BAD_PROFILES = {
    "other names": ({"h.0": torch.zeros(2, 3)}, {}, r"holds h\.0; a Command-V profile holds tensors model\.layers\.0"),
    "two shapes": (
        {"model.layers.0": torch.zeros(2, 3), "model.layers.1": torch.zeros(3, 3)},
        {},
        "all layers of a profile have one shape",
    ),
    "two dtypes": (
        {"model.layers.0": torch.zeros(2, 3), "model.layers.1": torch.zeros(2, 3).half()},
        {},
        "all layers of a profile have one shape",
    ),
    "every token": ({"model.layers.0": torch.zeros(2, 5, 3)}, {}, r"shape \[2, 5, 3\]; a Command-V profile has"),
    "no rows": ({"model.layers.0": torch.zeros(0, 3)}, {}, r"shape \[0, 3\]"),
    "integers": ({"model.layers.0": torch.zeros(2, 3).int()}, {}, "of dtype I32; allowed: float32"),
    "mean": (
        {"model.layers.0": torch.zeros(2, 3)},
        {"aggregation": "mean"},
        "its aggregation is 'mean'; only .*'last'",
    ),
    "inside": (
        {"model.layers.0": torch.zeros(2, 3)},
        {"activation_point": "MLP.out"},
        "its activation_point is 'MLP.out'",
    ),
    "prompts": (
        {"model.layers.0": torch.zeros(2, 3)},
        {"num_prompts": "3"},
        "says num_prompts 3, and its tensors have 2",
    ),
    "width": (
        {"model.layers.0": torch.zeros(2, 3)},
        {"hidden_size": "4"},
        "says hidden_size 4, and its tensors have 3",
    ),
    "layers": ({"model.layers.5": torch.zeros(2, 3)}, {"num_layers": "5"}, "says num_layers 5, and holds layer 5"),
    "no number": (
        {"model.layers.0": torch.zeros(2, 3)},
        {"num_layers": "x"},
        "its num_layers is 'x', which is no number",
    ),
}


@pytest.mark.parametrize("case", BAD_PROFILES)
def test_a_profile_that_is_not_as_it_should_be_is_refused(tmp_path, case):
    tensors, metadata, said = BAD_PROFILES[case]
    save_file(tensors, tmp_path / "p.safetensors", metadata=metadata)
    with pytest.raises(UserError, match=said):
        import_store(tmp_path / "p.safetensors", tmp_path / "s")
    assert {f.name for f in tmp_path.iterdir()} == {"p.safetensors"}


@pytest.mark.parametrize("format", ["auto", "command-v"])
@pytest.mark.parametrize("name", ["p.pt", "p.pkl", "p.safetensors"])
def test_pickles_and_archives_are_refused_whatever_they_are_called(tmp_path, name, format):
    (tmp_path / name).write_bytes(pickle.dumps({"model.layers.0": [1.0]}))
    with pytest.raises(UserError, match="is a pickle or an archive, which can run code and is never loaded"):
        import_store(tmp_path / name, tmp_path / "s", format=format)
    torch.save({"model.layers.0": torch.zeros(2, 3)}, tmp_path / name)
    with pytest.raises(UserError, match="is a pickle or an archive"):
        import_store(tmp_path / name, tmp_path / "s", format=format)
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("bomb", bytes(1 << 20))
    with pytest.raises(UserError, match="is a pickle or an archive"):
        import_store(tmp_path / name, tmp_path / "s", format=format)


def test_a_profile_whose_header_begins_as_a_pickle_does_is_none(tmp_path):
    file = tmp_path / "p.safetensors"
    for pad in range(0, 640, 8):
        profile(file, note="x" * pad)
        if file.read_bytes()[:2] == b"\x80\x02":
            break
    assert file.read_bytes()[:2] == b"\x80\x02"
    assert import_store(file, tmp_path / "s").n_rows == N


def test_what_is_no_source_is_refused(tmp_path):
    profile(tmp_path / "p.safetensors")
    (tmp_path / "lie.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    (tmp_path / "p.txt").write_text("hello")
    for source, options, said in (
        ("gone", {}, "no such file or folder"),
        ("p.txt", {}, r"neither a \.safetensors file .* nor a folder"),
        ("lie.safetensors", {}, "is not a safetensors file"),
        ("p.txt", {"format": "command-v"}, "is not a safetensors file"),
        ("p.safetensors", {"format": "saelens"}, "no such folder; a SAELens cache is a folder"),
        (
            "p.safetensors",
            {"format": "numpy"},
            "unknown format 'numpy' of activations; allowed: auto, command-v, saelens",
        ),
        ("p.safetensors", {"prompts": TEXTS[:3]}, f"holds {N} prompts and prompts 3; give the prompts"),
    ):
        with pytest.raises(UserError, match=said):
            import_store(tmp_path / source, tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()


# -- SAELens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "kept"), [("float32", "float32"), ("float16", "float16"), ("float64", "float32")])
def test_a_saelens_cache_is_a_prompt_for_each_context(tmp_path, dtype, kept):
    values = cache(tmp_path / "c", dtype=dtype)
    store = import_store(tmp_path / "c", tmp_path / "s")
    assert not find_damage(store.path)
    assert (store.sites, store.dtype, store.n_rows) == ([Site(3)], kept, N * CONTEXT)
    assert np.array_equal(store.read(3).numpy(), values["blocks.3.hook_resid_post"].reshape(-1, D).astype(kept))
    assert store.prompt_index.tolist() == [i // CONTEXT for i in range(N * CONTEXT)]
    assert store.rows()["token_id"].tolist() == list(range(N * CONTEXT))
    assert store.rows()["position"].isna().all()
    assert (store.manifest["basis"], store.tokens, store.name) == ("unknown", "unknown", "unknown")
    assert store.fingerprint == {}


def test_the_runners_config_says_the_rest(tmp_path):
    said = {
        "model_name": "gpt2",
        "model_class_name": "HookedTransformer",
        "context_size": CONTEXT,
        "seqpos_slice": [None],
    }
    cache(tmp_path / "c", **said)
    store = import_store(tmp_path / "c", tmp_path / "s")
    assert (store.name, store.manifest["basis"], store.tokens) == ("gpt2", "raw", "all+special")
    assert store.rows()["position"].tolist() == list(range(CONTEXT)) * N
    cache(tmp_path / "d", **{**said, "context_size": 9, "seqpos_slice": [1, 9, 2]})
    store = import_store(tmp_path / "d", tmp_path / "t")
    assert store.tokens == "unknown"
    assert store.rows()["position"].tolist() == [1, 3, 5, 7] * N


def test_older_caches_without_tokens_and_caches_of_several_hooks(tmp_path):
    names = ["blocks.1.hook_resid_pre", "blocks.0.hook_mlp_out", "model.layers.2"]
    values = cache(tmp_path / "c", tokens=False, columns=dict.fromkeys(names, "float32"))
    store = import_store(tmp_path / "c", tmp_path / "s")
    assert set(store.sites) == {Site(1, "resid_pre"), Site(0, "mlp_out"), Site(2)}
    assert np.array_equal(store.read(2).numpy(), values["model.layers.2"].reshape(-1, D))
    assert store.rows()["token_id"].isna().all()


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(1, 9), size=st.integers(1, 2000))
def test_blocks_of_any_size_hold_the_same_rows(tmp_path, n, size):
    folder = tmp_path / f"{n}-{size}"
    if folder.exists():
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_imports, "TARGET_BYTES", size)
        values = cache(folder / "c", n)
        store = import_store(folder / "c", folder / "s")
        assert np.array_equal(store.read(3).numpy(), values["blocks.3.hook_resid_post"].reshape(-1, D))
        assert [list(store.rows_of(i)) for i in range(n)] == [
            list(range(CONTEXT * i, CONTEXT * (i + 1))) for i in range(n)
        ]


def test_values_that_are_not_finite_are_counted_and_told(tmp_path, caplog):
    values = profile(tmp_path / "p.safetensors")
    values["model.layers.1"][3, 2] = float("nan")
    save_file(values, tmp_path / "p.safetensors")
    with caplog.at_level(logging.WARNING, "workbench"):
        store = import_store(tmp_path / "p.safetensors", tmp_path / "s")
    assert "1 values of resid_post.1 are NaN or infinite" in caplog.text
    assert describe_store(store.path)["nonfinite"] == {"resid_post.0": 0, "resid_post.1": 1, "resid_post.2": 0}


def saved(path: Path, rows: dict[str, object]) -> None:
    datasets.Dataset.from_dict(rows).save_to_disk(str(path))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ({"text": ["a"]}, r"none of its columns \(text\) is named by a hook"),
        ({"blocks.0.attn.hook_z": [[[1.0]]]}, "none of its columns"),
        (
            {"blocks.0.hook_resid_post": [[1.0, 2.0]]},
            r"has rows of shape \[2\]; a SAELens cache has \[context, width\]",
        ),
        ({"blocks.0.hook_resid_post": [[[1.0, 2.0], [3.0]]]}, "has rows of shape"),
        ({"blocks.0.hook_resid_post": [[[1.0, 2.0]], [[1.0]]]}, "the cache is damaged"),
        ({"blocks.0.hook_resid_post": [[[1.0, 2.0]], [[1.0, None]]]}, "the cache is damaged"),
        ({"blocks.0.hook_resid_post": [[[1, 2]]]}, "of dtype int64; allowed: float32"),
        ({"blocks.0.hook_resid_post": [[[1.0]]], "resid_post.0": [[[1.0]]]}, r"are both resid_post\.0"),
        ({"blocks.0.hook_resid_post": [[[1.0]]], "resid_post.1": [[[1.0], [2.0]]]}, r"contexts of \[1, 2\] rows"),
        ({"blocks.0.hook_resid_post": [[[1.0]]], "token_ids": [[1, 2]]}, r"token_ids of shape \(1, 2\)"),
        ({"blocks.-1.hook_resid_post": [[[1.0]]]}, "names a negative layer"),
    ],
)
def test_a_cache_that_is_not_as_it_should_be_is_refused(tmp_path, rows, said):
    saved(tmp_path / "c", rows)
    with pytest.raises(UserError, match=said):
        import_store(tmp_path / "c", tmp_path / "s")
    assert {f.name for f in tmp_path.iterdir()} == {"c"}


def test_folders_that_are_no_caches_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    cache(tmp_path / "outside")
    state = json.loads((tmp_path / "outside" / "state.json").read_text())
    state["_data_files"][0]["filename"] = "../../secret.arrow"
    (tmp_path / "outside" / "state.json").write_text(json.dumps(state))
    shutil.copytree(tmp_path / "outside", tmp_path / "gone")
    state["_data_files"][0]["filename"] = "gone.arrow"
    (tmp_path / "gone" / "state.json").write_text(json.dumps(state))
    cache(tmp_path / "config", model_name="gpt2")
    (tmp_path / "config" / "cache_activations_runner_cfg.json").write_text("{")
    saved(tmp_path / "none", {"blocks.0.hook_resid_post": []})
    for file in ("shards/a.safetensors", "shards/b.safetensors", "store/manifest.json", "moments/moments.json"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    for name, said in (
        ("empty", r"has no state\.json, .* and holds no \.safetensors file"),
        ("shards", r"is a folder of a\.safetensors, b\.safetensors; .* give .*/shards/a\.safetensors"),
        ("store", r"is a store already, as its manifest\.json says; open it with workbench\.Store\.open"),
        ("moments", r"is a folder of moments already, .* workbench\.load_moments"),
        ("outside", r"names the file '\.\./\.\./secret\.arrow', which is not in the folder"),
        ("gone", "datasets cannot open it"),
        ("config", r"cfg\.json is damaged"),
        ("none", "datasets cannot open it"),
    ):
        with pytest.raises(UserError, match=said):
            import_store(tmp_path / name, tmp_path / "s")
    cache(tmp_path / "c")
    with pytest.raises(UserError, match="prompts belong to a Command-V profile"):
        import_store(tmp_path / "c", tmp_path / "s", prompts=TEXTS)
    assert not (tmp_path / "s").exists()


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    profile(tmp_path / "p.safetensors")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device; nothing of it was kept"):
            import_store(tmp_path / "p.safetensors", tmp_path / "s")
    assert {f.name for f in tmp_path.iterdir()} == {"p.safetensors"}
    Store.open(import_store(tmp_path / "p.safetensors", tmp_path / "s").path)
