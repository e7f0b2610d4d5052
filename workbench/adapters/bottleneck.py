"""Bottleneck adapters in adapter-hub folders (Houlsby, arXiv:1902.00751; Pfeiffer, arXiv:2005.00247).

A bottleneck is A(x) = act(x W_down + b_down) W_up + b_up, scaled. In a decoder of pre-norm blocks the package `adapters`
(1.3, `methods/modeling.py`, layer_norm None) makes of x, what attention or MLP give, and r, the stream before them:

    original_ln_before false (Houlsby):   x + A(x) + r         delta(h) = A(h) on h = x: attn_out, mlp_out
    original_ln_before true (Pfeiffer):   x + A(x + r) + r     delta(h) = A(h) on h = x + r: resid_mid, resid_post

Everything else that its configuration can say is not a delta of the state where it is added, and is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..maps.linear_map import read_safetensors
from ..sites import Site
from .adapter import Adapter
from .adapter_files import check_finite, read_json
from .low_rank import LowRank
from .torch_archive import read_tensors

MODELS = ("gpt2", "llama", "mistral")
"""decoders for which the package puts bottlenecks where the table above says; in others they lie elsewhere"""
ACTS: Mapping[str | None, str] = {
    None: "linear", "linear": "linear", "relu": "relu", "gelu": "gelu", "gelu_new": "gelu_new", "silu": "silu",
    "swish": "silu", "tanh": "tanh", "sigmoid": "sigmoid",
}  # fmt: skip
_KEY = re.compile(r"(?:.*\.)?(?:h|layers)\.(\d{1,4})\.(attention|output)_adapters\.adapters\.([^.]+)\.(.+)")
_PARTS = ("adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias")
_NOT_A_DELTA = {
    "ln_before": "a LayerNorm before its bottleneck",
    "ln_after": "a LayerNorm after its bottleneck",
    "is_parallel": "a bottleneck parallel to attention or MLP, which reads another state than it writes",
    "use_gating": "a gate that is a mean over all tokens",
    "phm_layer": "PHM layers",
    "inv_adapter": "an invertible adapter at the embeddings",
}


def read(folder: str | Path) -> Adapter:
    """Reads adapter_config.json with adapter.safetensors or pytorch_adapter.bin; it acts at all positions.

    Raises:
        UserError: another method, another family of models, a configuration that is no delta at one site, an activation
            that is not known, or files that are damaged.
    """
    folder = Path(folder)
    file = folder / "adapter_config.json"
    header = read_json(file, "fetch the folder again")
    config = header.get("config") if isinstance(header, dict) else None
    if not isinstance(config, dict):
        raise UserError(f"{file} is no adapter-hub config: it needs an object config")
    act, resid = _check_config(file, header, config)
    tensors = _tensors(folder)
    units: dict[tuple[int, str], dict[str, Tensor]] = {}
    names = set()
    for key, tensor in tensors.items():
        if match := _KEY.fullmatch(key):
            names.add(match[3])
            units.setdefault((int(match[1]), match[2]), {})[match[4]] = tensor
        else:
            raise UserError(f"{folder}: {key[:80]!r} is no tensor of a bottleneck adapter; it is not read in part")
    if len(names) != 1:
        raise UserError(
            f"{folder} holds {len(names)} bottleneck adapters ({', '.join(sorted(names)) or 'none'}); give one"
        )
    points = (
        {"attention": "resid_mid", "output": "resid_post"} if resid else {"attention": "attn_out", "output": "mlp_out"}
    )
    parts = {
        Site(layer, points[place]): _part(state, config, act, f"{folder}: layer {layer}, {place}")
        for (layer, place), state in units.items()
    }
    base = {"name": header["model_name"]} if isinstance(header.get("model_name"), str) and header["model_name"] else {}
    return Adapter(parts, "all", name=names.pop(), base=base, meta={"format": "adapter-hub", "config": config})


def _check_config(file: Path, header: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, bool]:
    """The activation, and whether it reads the residual stream; UserError for what is not one delta at one site."""
    if config.get("architecture") is not None:
        what = str(config["architecture"])[:40]
        raise UserError(f"{file} is of method {what!r}; of adapter-hub folders, bottleneck adapters are read")
    model = header.get("model_type")
    if model not in MODELS:
        raise UserError(f"{file} is of model type {str(model)[:40]!r}; bottleneck adapters are read of {', '.join(MODELS)}, "
                        "where they act on the residual stream without a LayerNorm between")  # fmt: skip
    for key, what in _NOT_A_DELTA.items():
        if config.get(key):
            raise UserError(f"{file} has {what} ({key}): that is not act(h V + b) U of one state, so it is not read")
    before, after = bool(config.get("original_ln_before", False)), config.get("original_ln_after", True)
    own, stream = config.get("residual_before_ln", True), "drops the residual stream, or adds it twice"
    if own is not True and own is not False:
        raise UserError(f"{file} has residual_before_ln {own!r:.40}; true and false are read")
    if bool(after) != (own or not before):  # see the module's table: x + r must come out exactly once
        raise UserError(f"{file} {stream}: original_ln_before {before}, residual_before_ln {own}, original_ln_after "
                        f"{after} is no delta")  # fmt: skip
    act = config.get("non_linearity")
    name = act.lower() if isinstance(act, str) else act
    if "version" not in header:  # written before activations had the names that they have now
        name = {"gelu": "gelu_new", "gelu_orig": "gelu"}.get(str(name), name)
    if not isinstance(name, str | None) or name not in ACTS:
        known = ", ".join(sorted(key for key in ACTS if key))
        raise UserError(f"{file} has the activation {act!r:.40}; allowed: {known}")
    return ACTS[name], before


def _tensors(folder: Path) -> dict[str, Tensor]:
    if (folder / "adapter.safetensors").is_file():
        return read_safetensors(folder / "adapter.safetensors")[0]
    if (folder / "pytorch_adapter.bin").is_file():
        return read_tensors(folder / "pytorch_adapter.bin")
    raise UserError(f"weights missing: {folder} has neither adapter.safetensors nor pytorch_adapter.bin")


def _part(state: Mapping[str, Tensor], config: Mapping[str, Any], act: str, where: str) -> LowRank:
    """W_down [r, d] and W_up [d, r] on disk, as torch `Linear` has them."""
    missing = [key for key in _PARTS if key not in state]
    more = sorted(set(state) - set(_PARTS) - {"scaling"})
    if missing or more:
        raise UserError(f"{where} lacks {', '.join(missing) or 'nothing'} and has {', '.join(more)[:80] or 'nothing else'};"
                        " a bottleneck has down and up projections with biases")  # fmt: skip
    down, b, up, c = (state[key] for key in _PARTS)
    for name, tensor in state.items():
        check_finite(tensor, Path(where), name)
    if down.ndim != 2 or up.shape != down.shape[::-1] or b.shape != down.shape[:1] or c.shape != down.shape[1:]:
        shapes = [list(t.shape) for t in (down, b, up, c)]
        raise UserError(f"{where} is damaged: down, its bias, up and its bias have shapes {shapes}; fetch it again")
    scale = _scale(state, config, down, where)
    part = LowRank(down.T.contiguous(), b, up.T.contiguous() * scale, act)
    return part.plus(c * scale) if bool(c.any()) else part


def _scale(state: Mapping[str, Tensor], config: Mapping[str, Any], down: Tensor, where: str) -> Tensor | float:
    """A number, or one for each coordinate [d], that is learned."""
    said = config.get("scaling", 1.0)
    if isinstance(said, (int, float)) and not isinstance(said, bool) and abs(said) < 1e6:
        return float(said)
    learned = state.get("scaling")
    if said not in ("learned", "channel") or learned is None or learned.shape not in ((1,), down.shape[1:]):
        raise UserError(f"{where} has scaling {said!r:.40}; allowed: a number, learned or channel with its tensor")
    return learned
