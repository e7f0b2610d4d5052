"""Opening a model's files: whole ones load as they were saved, and what is wrong with others is said in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from workbench.bundled import bundled_path
from workbench.checkpoints import folder_of, open_config, open_tokenizer, open_weights
from workbench.errors import UserError

from .conftest import FAMILIES, make_module, save_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_folder(make_module("llama"), tmp_path / "m")


def rewrite(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """The weights of a folder with other tensors, or without those that are None."""
    file = folder / "model.safetensors"
    tensors = load_file(file) | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, file, metadata={"format": "pt"})


def opened(folder: Path) -> Any:
    open_config("m", folder)
    return open_weights("m", folder, torch.float32, None)


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        opened(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_whole_checkpoints_load_as_they_were_saved(family, tmp_path):
    module = make_module(family)
    loaded = open_weights("m", save_folder(module, tmp_path / "m"), torch.float32, None)
    expected = module.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("name", ["donor", "recipient"])
def test_bundled_models_are_complete(name):
    open_weights(f"bundled:{name}", bundled_path(f"bundled:{name}", "models"), torch.float32, None)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_missing_only_where_it_is_not_tied(tied, tmp_path):
    module = make_module("llama")
    module.config.tie_word_embeddings = tied
    module.tie_weights()
    folder = save_folder(module, tmp_path / "m")
    rewrite(folder, {"lm_head.weight": None})
    if tied:
        loaded = open_weights("m", folder, torch.float32, None)
        assert torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
    else:
        assert "1 missing (lm_head.weight)" in refusal(folder)


def test_missing_tensors_are_named(folder):
    gone = [f"model.layers.{layer}.mlp.{part}_proj.weight" for layer in (0, 1) for part in ("down", "gate")]
    rewrite(folder, {gone[0]: None})
    assert f"weights of m are not complete: tensors 1 missing ({gone[0]})" in refusal(folder)
    rewrite(folder, dict.fromkeys(gone))
    assert f"4 missing ({', '.join(gone[:3])}, ...)" in refusal(folder)


def test_tensors_of_another_shape_are_named(folder):
    rewrite(folder, {"model.norm.weight": torch.zeros(5)})
    assert "1 of another shape (model.norm.weight is [5], not [48])" in refusal(folder)


def test_tensors_that_are_not_needed_do_no_harm(folder):
    rewrite(folder, {"extra.weight": torch.zeros(5)})
    open_weights("m", folder, torch.float32, None)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5])
def test_truncated_weights_are_named(folder, kept):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept)])
    assert "a .safetensors file is damaged or cut short" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": 47}, "not a multiple of the number of attention heads"),
        ({"hidden_size": -1}, "not a multiple"),
        ({"hidden_size": "x"}, "Field 'hidden_size' expected int, got str"),
        ({"num_attention_heads": 0}, "modulo by zero"),
        ({"num_hidden_layers": None}, "Field 'num_hidden_layers' expected int"),
        ({"dtype": "nope"}, "no attribute 'nope'"),
        ({"model_type": "nope"}, "model type `nope`"),
        ({"hidden_act": "nope"}, "KeyError 'nope'"),
        ({"vocab_size": 0}, "cannot load the weights of m: "),
    ],
)
def test_impossible_configs_are_refused(folder, change, said):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert said in refusal(folder)


@pytest.mark.parametrize("content", [b"null", b"[]", b"\xff{", b"{"])
def test_configs_that_are_no_objects_are_refused(folder, content):
    (folder / "config.json").write_bytes(content)
    assert "cannot read the config of m" in refusal(folder)


def test_a_damaged_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(UserError, match="has no tokenizer that can be loaded"):
        open_tokenizer("m", folder)


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_refused(name):
    with pytest.raises(UserError, match="the name is empty"):
        folder_of(name, None)
