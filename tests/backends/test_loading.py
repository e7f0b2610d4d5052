"""Models that come with a backend, or are loaded with one."""

from __future__ import annotations

import sys

import pytest
import torch

from tests.conftest import make_module, save_folder, word_tokenizer
from workbench.errors import UserError
from workbench.models import load
from workbench.prompts import pad
from workbench.sites import Site

IDS, MASK = pad([[1, 20, 21, 22], [1, 30]], 0, "left")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    return save_folder(make_module("llama"), tmp_path_factory.mktemp("model"))


def test_a_folder_is_loaded_with_each_backend_and_stays_the_same_model(folder):
    models = [load(folder, backend=name) for name in ("hooks", "transformer-lens", "nnsight")]
    assert [m.backend.name for m in models] == ["hooks", "transformer-lens", "nnsight"]
    assert len({m.fingerprint_id for m in models}) == 1
    assert [repr(m).rpartition(", ")[2] for m in models] == ["cpu)", "transformer-lens)", "nnsight)"]


def test_a_bridge_of_a_notebook_is_taken_as_it_is(folder):
    from transformer_lens import TransformerBridge

    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)
    model = load(bridge)
    assert model.backend.bridge is bridge
    assert model.tokenizer is bridge.tokenizer
    with torch.inference_mode(), model.read([Site(1)]) as seen:
        model.run(IDS[:1], MASK[:1])
        _, cache = bridge.run_with_cache(IDS[:1])
    torch.testing.assert_close(seen[Site(1)], cache["resid_post", 1])
    assert model.fingerprint["weights"] == load(make_module("llama"), tokenizer=word_tokenizer()).fingerprint["weights"]
    with pytest.raises(UserError, match="read and edited with backend='transformer-lens'; leave backend out"):
        load(bridge, backend="nnsight")
    bridge.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(UserError, match="compatibility mode was enabled on this model's bridge after it was loaded"):
        with model.read([Site(1)]):
            pass
    with pytest.raises(UserError, match="in compatibility mode or has processed weights"):
        load(bridge)


def test_hooks_that_a_notebook_set_on_its_bridge_stay(folder):
    from workbench.backends.transformer_lens import bridge_of

    bridge = bridge_of(make_module("gpt2"))
    model = load(bridge, tokenizer=word_tokenizer())
    calls = []
    bridge.add_hook("blocks.1.hook_resid_post", lambda h, hook: calls.append(1))
    with torch.inference_mode(), model.edit({Site(1): lambda h, w: h + 1.0}), model.read([Site(1)]):
        model.run(IDS, MASK)
    model.run(IDS, MASK)
    assert calls == [1, 1]


def test_an_nnsight_model_of_a_notebook_is_taken_as_it_is(folder):
    from nnsight import TransformersModel

    source = TransformersModel(str(folder), task="text-generation", tokenizer=word_tokenizer())
    model = load(source)  # lazy: its weights are read now
    assert model.backend.source is source
    with torch.inference_mode(), model.read([Site(1)]) as seen:
        model.run(IDS, MASK)
        with source.trace(IDS, attention_mask=MASK):
            wanted = source.model.layers[1].output.save()
    assert torch.equal(seen[Site(1)], wanted)
    with source.edit(inplace=True):
        source.model.layers[1].output[:] = 0
    with pytest.raises(UserError, match=r"carries edits of its own .*clear_edits\(\)"):
        load(source)


def test_a_module_that_transformer_lens_wraps_is_a_copy_and_nnsight_shares_it():
    module = make_module("llama")
    names = list(module.state_dict())
    wrapped = load(module, tokenizer=word_tokenizer(), backend="transformer-lens")
    assert wrapped.module is not module
    assert load(module, tokenizer=word_tokenizer(), backend="nnsight").module is module
    assert list(module.state_dict()) == names


def test_loading_a_plain_model_imports_neither_library(folder):
    import subprocess

    code = (f"from workbench.models import load; load({str(folder)!r}); import sys; "
            "print({'nnsight', 'transformer_lens'} & set(sys.modules))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "set()"


def test_an_edit_that_calls_the_model_within_its_own_pass_is_refused():
    model = load(make_module("gpt2"), tokenizer=word_tokenizer(), backend="nnsight")
    with pytest.raises(UserError, match="nnsight cannot run one pass inside another"):
        with model.edit({Site(1): lambda h, w: model.logits(IDS, MASK)}):
            model.run(IDS, MASK)
    model.run(IDS, MASK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "jax"}, "unknown backend 'jax'; allowed: hooks, transformer-lens, nnsight"),
        ({"remote": True}, "remote runs are nnsight's and take a hub id"),
        ({"backend": "nnsight", "remote": "mars"}, r"remote='mars' is not known; allowed: False, True .NDIF., 'local'"),
    ],
)
def test_what_cannot_be_loaded_is_refused(options, message, folder):
    with pytest.raises(UserError, match=message):
        load(folder, **options)
