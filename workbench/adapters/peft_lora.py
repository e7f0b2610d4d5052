"""LoRA folders as PEFT writes them (arXiv:2106.09685): y = x W + scale (x A') B' at the modules that they name.

Read without peft, and put on a model as hooks on those modules, so that weights of any dtype stay as they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor, nn

from ..anatomy.hooks import Hooks, state_in
from ..errors import UserError
from ..maps.linear_map import read_safetensors
from .adapter_files import check_finite, read_json
from .torch_archive import read_tensors

if TYPE_CHECKING:
    from ..models import Model

_NOT_PLAIN = {
    "use_dora": "DoRA, which rescales the weights",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "a block-diagonal LoRA",
    "alora_invocation_tokens": "an activated LoRA, which waits for a token",
    "layer_replication": "layers that are repeated",
    "target_parameters": "parameters that are no module",
    "trainable_token_indices": "embeddings of single tokens",
    "arrow_config": "a router of several LoRAs",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "modules_to_save": "modules trained whole",
}
"""entries of adapter_config.json that make it something else than W + scale B A, and what"""
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""`init_lora_weights` that leave the model's own weights as they are; PiSSA and its kin change them"""
_KEY = re.compile(r"(?:base_model\.model\.)?(.+?)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|(?:base_layer\.)?bias)")
_OLD = re.compile(r"\.lora_(A|B)\.default\.")


@dataclass(frozen=True, eq=False)
class LoraModule:
    """What is added to the output of one module: scale ((x A') B' + c), and its bias put in the place of the old one."""

    A: Float[Tensor, "r d_in"] | None
    B: Float[Tensor, "d_out r"] | None
    c: Float[Tensor, " d_out"] | None
    bias: Float[Tensor, " d_out"] | None
    scale: float

    def added(self, x: Float[Tensor, "*n d_in"], module: nn.Module) -> Tensor | float:
        """To an output for the input x [..., d_in], [..., d_out], as peft computes it: in the dtype of A."""
        total: Any = 0.0
        if self.A is not None and self.B is not None:
            a, b = self.A.to(x.device), self.B.to(x.device)
            low = (x.to(a.dtype) @ a.T) @ b.T
            total = (low if self.c is None else low + self.c.to(low)) * self.scale
        if self.bias is not None:
            old: Any = module.bias
            total = total + (self.bias.to(old.device) - old)
        return total


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA that was read: its modules by name, and the model that it says it is of."""

    modules: Mapping[str, LoraModule]
    name: str
    base: str

    def __repr__(self) -> str:
        return f"Lora({self.name!r}, {len(self.modules)} modules)"

    @contextmanager
    def on(self, model: Model) -> Iterator[None]:
        """The model with this LoRA inside the block.

        Raises:
            UserError: a module that the model lacks, or that has another shape.
        """
        found = {name: self._module(model, name) for name in self.modules}
        with Hooks(model.module) as hooks:
            for name, module in found.items():
                hooks.add(module.register_forward_hook(_hook(self.modules[name]), with_kwargs=True))
            yield

    def _module(self, model: Model, name: str) -> nn.Module:
        try:
            module = model.module.get_submodule(name)
        except AttributeError as err:
            raise UserError(f"{self.name} is a LoRA of {self.base or 'another model'}: it changes {name}, which "
                            f"{model.name} has not; give the model that it was trained on") from err  # fmt: skip
        wanted, weight = self.modules[name], getattr(module, "weight", None)
        if wanted.A is not None and wanted.B is not None and weight is not None and weight.ndim == 2:
            shape = wanted.B.shape[0], wanted.A.shape[1]
            # a Conv1D (GPT-2) holds [d_in, d_out]; packed weights say their shape elsewhere
            sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)
            held = sizes if None not in sizes else tuple(weight.shape[::-1])
            if shape != held:
                raise UserError(f"{self.name} is a LoRA of another model: at {name} it maps {shape[1]} to {shape[0]} and "
                                f"{model.name} maps {held[1]} to {held[0]}")  # fmt: skip
        if wanted.bias is not None and getattr(module, "bias", None) is None:
            raise UserError(f"{self.name} changes the bias of {name}, and in {model.name} that has none")
        return module


def _hook(change: LoraModule) -> Any:
    def run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        return (output + change.added(state_in(args, kwargs), module)).to(output.dtype)

    return run


def is_lora(folder: str | Path) -> bool:
    """Whether a folder is one that PEFT wrote."""
    file = Path(folder) / "adapter_config.json"
    if not file.is_file():
        return False
    config = read_json(file, "fetch the folder again")
    return isinstance(config, dict) and "peft_type" in config


def read(folder: str | Path) -> Lora:
    """Reads adapter_config.json with adapter_model.safetensors, or .bin by `weights_only`.

    Raises:
        UserError: another method of PEFT, a LoRA that is more than W + scale B A (DoRA, say), or damaged files.
    """
    folder = Path(folder)
    file = folder / "adapter_config.json"
    config = read_json(file, "fetch the folder again") if file.is_file() else None
    if not isinstance(config, dict) or "peft_type" not in config:
        raise UserError(f"{folder} is no LoRA: it has no adapter_config.json that PEFT wrote")
    _check_config(file, config)
    tensors = _weights(folder)
    held: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if "lora_magnitude_vector" in key:
            raise UserError(f"{folder} holds DoRA, which rescales the weights; merge it and give the merged checkpoint")
        match = _KEY.fullmatch(_OLD.sub(r".lora_\1.", key))
        if match is None:
            raise UserError(f"{folder}: {key[:120]!r} is no part of a LoRA of linear modules; it is not read in part: merge "
                            "it and give the merged checkpoint")  # fmt: skip
        check_finite(tensor, folder, key)
        held.setdefault(match[1], {})[match[2].removeprefix("base_layer.")] = tensor
    if not held:
        raise UserError(f"{folder} holds no weights; fetch it again")
    modules = {name: _assemble(folder, name, state, config) for name, state in held.items()}
    return Lora(modules, str(folder), str(config.get("base_model_name_or_path") or ""))


def _check_config(file: Path, config: Mapping[str, Any]) -> None:
    if config["peft_type"] != "LORA":
        raise UserError(f"{file} is of PEFT's {str(config['peft_type'])[:40]}; of PEFT, LoRA is read: merge others and "
                        "give the merged checkpoint")  # fmt: skip
    for key, what in _NOT_PLAIN.items():
        if config.get(key):
            raise UserError(f"{file} has {what} ({key}), which is not W + scale B A; merge it and give the merged "
                            "checkpoint")  # fmt: skip
    start = config.get("init_lora_weights", True)
    if not any(start is known or (isinstance(start, str) and start == known) for known in _PLAIN_STARTS):
        raise UserError(f"{file} has init_lora_weights {start!r:.40}, which changes the weights of the model itself; merge "
                        "it and give the merged checkpoint")  # fmt: skip
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e6:
            raise UserError(f"{file} is damaged: {key} must be a number above 0, got {value!r:.40}; fetch it again")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(_is_number(value) for value in pattern.values()):
            raise UserError(f"{file} is damaged: {key} must be an object of numbers; fetch it again")
        for name in pattern:
            if not re.fullmatch(r"[\w.]+", _literal(name)):
                raise UserError(f"{file} has the regular expression {name[:60]!r} in {key}; names of modules are read")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e6


def _literal(pattern: str) -> str:
    return pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")


def _chosen(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first entry that names a module or the end of its name, as peft's `get_pattern_key` finds it."""
    for key, value in (pattern or {}).items():
        wanted = _literal(key)
        if name == wanted or (not key.startswith("^") and name.endswith(f".{wanted}")):
            return value
    return default


def _weights(folder: Path) -> dict[str, Tensor]:
    if (folder / "adapter_model.safetensors").is_file():
        return read_safetensors(folder / "adapter_model.safetensors")[0]
    if (folder / "adapter_model.bin").is_file():
        return read_tensors(folder / "adapter_model.bin")
    raise UserError(f"weights missing: {folder} has neither adapter_model.safetensors nor adapter_model.bin")


def _assemble(folder: Path, name: str, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> LoraModule:
    a, b = state.get("lora_A.weight"), state.get("lora_B.weight")
    c, bias = state.get("lora_B.bias"), state.get("bias")
    if (a is None) != (b is None) or (a is None and bias is None):
        raise UserError(f"{folder} is damaged: of {name} it holds {', '.join(state)} alone; fetch it again")
    if bias is not None and bias.ndim != 1:
        raise UserError(
            f"{folder} is damaged: the bias of {name} has shape {list(bias.shape)}, not [d_out]; fetch it again"
        )
    if a is None or b is None:
        return LoraModule(None, None, None, bias, 1.0)
    rank = _chosen(config.get("rank_pattern") or None, name, config["r"])
    shapes = [list(t.shape) for t in (a, b, *([] if c is None else [c]))]
    if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == rank or (c is not None and c.shape != b.shape[:1]):
        raise UserError(f"{folder} is damaged: A and B of {name} have shapes {shapes} and the config says rank {rank}; "
                        "fetch it again")  # fmt: skip
    alpha = _chosen(config.get("alpha_pattern") or None, name, config["lora_alpha"])
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LoraModule(a, b, c, bias, float(scale))
