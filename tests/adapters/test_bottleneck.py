"""Bottleneck adapters in adapter-hub folders and AdapterBias: the same states as the forward pass of their own code.

The package `adapters` is not needed: what its `Adapter` does with a decoder's block is written out below.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from workbench.adapters import Adapter
from workbench.adapters.adapter_bias import read as read_bias
from workbench.errors import UserError
from workbench.maps.linear_map import LinearMap
from workbench.paste import fold_part, three_step
from workbench.sites import Site

WIDTH, DOWN = 12, 3
HOULSBY = {"original_ln_before": False, "original_ln_after": True, "residual_before_ln": True}
PFEIFFER = {"original_ln_before": True, "original_ln_after": True, "residual_before_ln": True}
ONCE = {"original_ln_before": True, "original_ln_after": False, "residual_before_ln": False}
ACTIVATIONS = {"relu": torch.relu, "gelu": nn.functional.gelu, "swish": nn.functional.silu, "tanh": torch.tanh,
               "gelu_new": lambda x: nn.functional.gelu(x, approximate="tanh")}  # fmt: skip


class Bottleneck(nn.Module):
    """`adapters.methods.modeling.Adapter` with layer_norm None: pre_forward, forward and post_forward in one."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.adapter_down = nn.Sequential(nn.Linear(WIDTH, DOWN))
        self.adapter_up = nn.Linear(DOWN, WIDTH)
        scaling = config["scaling"]
        if isinstance(scaling, str):
            self.scaling = nn.Parameter(torch.rand(1 if scaling == "learned" else WIDTH))
        else:
            self.scaling = scaling

    def forward(self, x: Tensor, stream: Tensor) -> Tensor:
        c, hidden, residual = self.config, x, x
        if c["original_ln_before"]:
            hidden = hidden + stream
        if not c["residual_before_ln"]:
            residual = hidden
        output = self.adapter_up(ACTIVATIONS[c["non_linearity"]](self.adapter_down(hidden))) * self.scaling + residual
        return output + stream if c["original_ln_after"] else output


def folder_of(path: Path, config: dict[str, Any], file: str = "adapter.safetensors", **header: Any) -> list[Bottleneck]:
    """A folder as the package saves it, for attention and MLP of block 1 of a decoder."""
    torch.manual_seed(0)
    config = {"non_linearity": "relu", "scaling": 1.0, **config}
    made = [Bottleneck(config), Bottleneck(config)]
    names = [f"transformer.h.1.{place}_adapters.adapters.task" for place in ("attention", "output")]
    state = {f"{name}.{k}": v.detach().clone() for name, unit in zip(names, made, strict=True)
             for k, v in unit.state_dict().items()}  # fmt: skip
    path.mkdir(exist_ok=True)
    said = {"config": config, "model_type": "gpt2", "model_name": "gpt2", "version": "adapters.1.0.0", **header}
    (path / "adapter_config.json").write_text(json.dumps({k: v for k, v in said.items() if v is not None}))
    save_file(state, path / file) if file.endswith("safetensors") else torch.save(state, path / file)
    return made


@pytest.mark.parametrize("act", list(ACTIVATIONS))
@pytest.mark.parametrize("scaling", [1.0, 0.3, "learned", "channel"])
@pytest.mark.parametrize("config", [HOULSBY, PFEIFFER, ONCE], ids=["houlsby", "pfeiffer", "once"])
def test_the_block_gives_what_the_package_makes_of_it(config, scaling, act, tmp_path):
    made = folder_of(tmp_path, {**config, "scaling": scaling, "non_linearity": act})
    adapter = Adapter.load(tmp_path)
    reads_stream = config["original_ln_before"]
    points = ("resid_mid", "resid_post") if reads_stream else ("attn_out", "mlp_out")
    assert (adapter.positions, adapter.sites) == ("all", sorted(Site(1, point) for point in points))
    assert (adapter.name, adapter.base) == ("task", {"name": "gpt2"})
    x, stream = torch.randn(2, 5, WIDTH)
    for unit, point in zip(made, points, strict=True):
        h = x + stream if reads_stream else x
        edited = h + adapter.delta(Site(1, point), h) + (0 if reads_stream else stream)
        torch.testing.assert_close(edited, unit(x, stream))


def test_a_state_dict_of_torch_is_read_too(tmp_path):
    folder_of(tmp_path / "a", PFEIFFER)
    folder_of(tmp_path / "b", PFEIFFER, "pytorch_adapter.bin")
    assert Adapter.load(tmp_path / "a") == Adapter.load(tmp_path / "b")


def test_activations_of_old_folders_have_their_old_names(tmp_path):
    folder_of(tmp_path, {**PFEIFFER, "non_linearity": "gelu"}, version=None)
    assert Adapter.load(tmp_path).parts[Site(1)].act == "gelu_new"


def test_a_paste_carries_the_bias_of_the_write_side_as_it_carries_u(tmp_path):
    folder_of(tmp_path, {**PFEIFFER, "non_linearity": "tanh"})
    part = Adapter.load(tmp_path).parts[Site(1)]
    g = torch.Generator().manual_seed(1)
    there = LinearMap(torch.randn(7, WIDTH, generator=g), torch.randn(WIDTH, generator=g))
    back = LinearMap(torch.randn(WIDTH, 7, generator=g), torch.randn(7, generator=g))
    h = torch.randn(5, 7, generator=g)
    torch.testing.assert_close(
        fold_part(part, there, back).delta(h), three_step(part, there, back, h), rtol=1e-4, atol=1e-4
    )


REFUSED = [
    ({"config": {**PFEIFFER, "ln_before": True}}, "a LayerNorm before its bottleneck"),
    ({"config": {**PFEIFFER, "ln_after": True}}, "a LayerNorm after its bottleneck"),
    ({"config": {**PFEIFFER, "is_parallel": True}}, "parallel to attention or MLP"),
    ({"config": {**PFEIFFER, "use_gating": True}}, "a gate that is a mean over all tokens"),
    ({"config": {**PFEIFFER, "phm_layer": True}}, "PHM layers"),
    ({"config": {**PFEIFFER, "inv_adapter": "nice"}}, "an invertible adapter"),
    ({"config": {**PFEIFFER, "residual_before_ln": False}}, "drops the residual stream, or adds it twice"),
    ({"config": {**PFEIFFER, "original_ln_after": False}}, "drops the residual stream, or adds it twice"),
    ({"config": {**HOULSBY, "original_ln_after": False}}, "drops the residual stream, or adds it twice"),
    ({"config": {**PFEIFFER, "residual_before_ln": "post_add"}}, "residual_before_ln 'post_add'"),
    ({"config": {**PFEIFFER, "non_linearity": "leakyrelu"}}, "activation 'leakyrelu'; allowed: gelu, gelu_new"),
    ({"config": {**PFEIFFER, "non_linearity": ["relu"]}}, "the activation"),
    ({"config": {**PFEIFFER, "scaling": "other"}}, "scaling 'other'; allowed: a number, learned or channel"),
    ({"config": {**PFEIFFER, "scaling": "learned"}}, "scaling 'learned'"),
    ({"config": {"architecture": "lora"}}, "of method 'lora'"),
    ({"config": None}, "it needs an object config"),
    ({"model_type": "bert"}, "model type 'bert'; bottleneck adapters are read of gpt2, llama, mistral"),
    ({"peft_type": "LORA"}, "is a PEFT LORA"),
]


@pytest.mark.parametrize(("change", "said"), REFUSED, ids=[said[:30] for _, said in REFUSED])
def test_what_is_no_delta_of_one_state_is_refused_in_one_line(change, said, tmp_path):
    folder_of(tmp_path, PFEIFFER)
    file = tmp_path / "adapter_config.json"
    header = json.loads(file.read_text())
    if "config" in change and change["config"] is not None:
        change = {"config": {"non_linearity": "relu", "scaling": 1.0, **change["config"]}}
    file.write_text(json.dumps(header | change))
    with pytest.raises(UserError) as caught:
        Adapter.load(tmp_path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_tensors_are_refused(tmp_path):
    from safetensors.torch import load_file

    folder_of(tmp_path, PFEIFFER)
    file = tmp_path / "adapter.safetensors"
    state = load_file(file)
    first = next(iter(state))
    down = "transformer.h.1.output_adapters.adapters.task.adapter_down.0.weight"
    cases = [
        ({k: v for k, v in state.items() if k != down}, "lacks adapter_down.0.weight"),
        (state | {down: torch.zeros(DOWN, WIDTH + 1)}, "have shapes"),
        (state | {down: torch.full((DOWN, WIDTH), float("nan"))}, "holds NaN or infinity"),
        (state | {first.replace(".task.", ".other."): state[first]}, "holds 2 bottleneck adapters"),
        (state | {"heads.task.weight": state[first]}, "is no tensor of a bottleneck adapter"),
        (state | {down.replace("adapter_down.0.weight", "gate.weight"): state[first]}, "and has gate.weight"),
        ({}, "holds 0 bottleneck adapters"),
    ]
    for changed, said in cases:
        save_file({k: v.clone() for k, v in changed.items()}, file)
        with pytest.raises(UserError, match=said):
            Adapter.load(tmp_path)
    file.write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        Adapter.load(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match="weights missing"):
        Adapter.load(tmp_path)


def bias_of(width: int = WIDTH, layer: int = 2) -> dict[str, Tensor]:
    name = f"encoder.layer.{layer}.output.adapter_"
    return {
        name + "vector": torch.randn(WIDTH),
        name + "alpha.weight": torch.randn(1, width),
        name + "alpha.bias": torch.randn(1),
    }


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_adapter_bias_is_a_vector_with_a_weight_for_each_token(suffix, tmp_path):
    state = bias_of() | bias_of(layer=3) | {"encoder.layer.2.output.dense.weight": torch.randn(4, 4)}
    file = tmp_path / f"x{suffix}"
    torch.save(state, file) if suffix == ".pt" else save_file(state, file)
    adapter, h = Adapter.load(file), torch.randn(5, WIDTH)
    assert (adapter.positions, adapter.rank, adapter.sites) == ("all", 1, [Site(2, "mlp_out"), Site(3, "mlp_out")])
    v, w, b = (state[f"encoder.layer.2.output.adapter_{name}"] for name in ("vector", "alpha.weight", "alpha.bias"))
    torch.testing.assert_close(adapter.delta(Site(2, "mlp_out"), h), (h @ w[0] + b)[:, None] * v)
    assert read_bias(file, site="resid_post.0").sites == [Site(2), Site(3)]


def test_adapter_bias_that_is_no_delta_of_one_state_is_refused(tmp_path):
    file = tmp_path / "x.pt"
    name = "encoder.layer.2.output.adapter_"
    cases = [
        (bias_of(4 * WIDTH), "reads its weight off a state of width 48 .* adds a vector of width 12"),
        ({name + "vector": torch.ones(4)}, "layer 2 lacks adapter_alpha.weight, adapter_alpha.bias"),
        ({"adapter_vector": torch.ones(4)}, "do not say a layer"),
        (bias_of() | {name + "alpha.bias": torch.ones(2)}, "has shapes"),
        (bias_of() | {name + "vector": torch.full((WIDTH,), float("inf"))}, "adapter_vector of layer 2 holds NaN"),
    ]
    for state, said in cases:
        torch.save(state, file)
        with pytest.raises(UserError, match=said):
            Adapter.load(file)
    torch.save({"layer_3": torch.ones(4)}, file)
    with pytest.raises(UserError, match="holds no adapter_vector"):
        read_bias(file)
