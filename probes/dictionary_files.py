"""Dictionaries as others write them: SAELens, Gemma Scope and dictionary_learning, read with distrust.

Nothing that could run is loaded: npz without pickles, torch archives with `weights_only=True`, and neither where it would
unpack to many times its size on disk.
"""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from workbench.atomic import staged_folder
from workbench.bundled import PREFIX, bundled_path
from workbench.errors import UserError
from workbench.maps.linear_map import read_safetensors
from workbench.sites import Site
from workbench.small_files import plain_file, read_json, reason

if TYPE_CHECKING:
    from .dictionaries import Dictionary

SAELENS, GEMMA, LEARNING = "sae_weights.safetensors", "params.npz", "ae.pt"
GEMMA_NAME = re.compile(r"gemma-scope-(\d+b)-(pt|it)-(res|att|mlp)")
UNPACKED = 20  # times its size on disk: weights hardly compress, a bomb does a thousandfold
SLACK = 1 << 20
ARCHITECTURES = {"standard": "relu", "jumprelu": "jumprelu", "topk": "topk", "gated": "gated", "batchtopk": "jumprelu"}


def read_dictionary(path: str | Path, scale: float | None = None) -> Dictionary:
    """See `Dictionary.load`."""
    bundled = str(path).startswith(PREFIX)
    path = bundled_path(str(path), "dictionaries") if bundled else Path(path).expanduser()
    if not path.exists():
        raise UserError(f"dictionary {path}: no such file or folder; give a folder, or {PREFIX}NAME")
    folder = path if path.is_dir() else path.parent
    found = [name for name in (SAELENS, GEMMA, LEARNING) if (folder / name).is_file()]
    if path.is_file():
        found = [name for name in found if name == path.name] or [GEMMA] * (path.suffix == ".npz")
    if not found:
        raise UserError(f"dictionary {path}: holds none of {SAELENS} (SAELens), {GEMMA} (Gemma Scope), {LEARNING} "
                        "(dictionary_learning)")  # fmt: skip
    if scale is not None and not 0 < scale < float("inf"):
        raise UserError(f"scale must be a positive number; got {scale}")
    if scale is not None and found[0] != SAELENS:
        raise UserError(f"scale is for SAELens dictionaries that leave it open; {found[0]} never does")
    if found[0] == SAELENS:
        return _saelens(folder, scale)
    if found[0] == GEMMA:
        return _gemma(path if path.is_file() else folder / GEMMA, path.is_file())
    return _learning(folder)


def write_saelens(dictionary: Dictionary, path: Path, *, overwrite: bool = False) -> None:
    """Writes the folder that SAELens and `read_dictionary` read."""
    names = {v: k for k, v in ARCHITECTURES.items() if k != "batchtopk"}
    site = None if dictionary.site is None else Site.parse(dictionary.site).transformer_lens
    cfg: dict[str, Any] = {
        "architecture": names[dictionary.kind],
        "d_in": dictionary.width,
        "d_sae": dictionary.n_features,
        "dtype": str(dictionary.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": dictionary.subtract_b_dec,
        "normalize_activations": dictionary.normalise,
        "reshape_activations": "none",
        "metadata": {**dictionary.meta, "hook_name": site, "model_name": dictionary.model},
    }
    if dictionary.kind == "topk":
        cfg["k"] = dictionary.k
    tensors = {name: value.detach().cpu().contiguous() for name, value in dictionary.tensors.items()}
    if dictionary.kind == "gated":
        tensors["b_gate"] = tensors.pop("b_enc")
    text = json.dumps(cfg, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    with staged_folder(path, marker="cfg.json", overwrite=overwrite) as folder:
        (folder / "cfg.json").write_text(text + "\n", encoding="utf-8")
        (folder / SAELENS).write_bytes(to_bytes(tensors))


def _saelens(folder: Path, scale: float | None) -> Dictionary:
    cfg = _json(folder / "cfg.json")
    tensors, _ = read_safetensors(folder / SAELENS)
    metadata = cfg.get("metadata") if isinstance(cfg.get("metadata"), dict) else cfg  # before version 6, all lay in cfg
    assert isinstance(metadata, dict)
    kind, k = _saelens_kind(folder, cfg)
    if cfg.get("reshape_activations", "none") != "none" or cfg.get("hook_head_index") is not None:
        raise UserError(f"dictionary {folder}: reads single attention heads; dictionaries of whole sites are read")
    if kind == "gated" and "b_gate" in tensors:
        tensors["b_enc"] = tensors.pop("b_gate")
    _check_tensors(folder, tensors, kind)
    if "scaling_factor" in tensors:  # finetuned ones multiply features by it before they are decoded
        tensors["W_dec"] = tensors["W_dec"] * tensors.pop("scaling_factor")[:, None]
    if cfg.get("rescale_acts_by_decoder_norm"):
        _fold_norm(tensors)
    normalise = str(cfg.get("normalize_activations") or "none")
    scale = _saelens_scale(folder, normalise, cfg, scale)
    if scale is not None:
        normalise = "none"
        tensors["W_enc"] = tensors["W_enc"] * scale
        tensors |= {name: tensors[name] / scale for name in ("W_dec", "b_dec")}
    said = {name: metadata.get(name) for name in ("hook_name", "model_name")}
    meta = {name: value for name, value in metadata.items() if name not in said} if metadata is not cfg else {}
    options = {"subtract_b_dec": bool(cfg.get("apply_b_dec_to_input", True)), "normalise": normalise, "meta": meta}
    return _make(folder, kind, tensors, site=said["hook_name"], model=said["model_name"], k=k, **options)


def _saelens_kind(folder: Path, cfg: Mapping[str, Any]) -> tuple[str, int | None]:
    architecture = str(cfg.get("architecture", "standard"))
    old = str(cfg.get("activation_fn_str") or cfg.get("activation_fn") or "relu")
    if architecture == "standard" and old.startswith("topk"):  # before version 6
        architecture = "topk"
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"dictionary {folder}: architecture {architecture!r} is not read; allowed: {known}")
    kwargs = cfg.get("activation_fn_kwargs")
    k = cfg.get("k", kwargs.get("k") if isinstance(kwargs, dict) else None)
    if architecture == "topk" and not (isinstance(k, int) and not isinstance(k, bool)):
        raise UserError(f"dictionary {folder}: cfg.json of a topk dictionary must give k, a whole number; got {k!r}")
    return ARCHITECTURES[architecture], k if architecture == "topk" else None


def _saelens_scale(folder: Path, normalise: str, cfg: Mapping[str, Any], scale: float | None) -> float | None:
    """The factor to fold, of a dictionary whose activations were scaled by one number for the whole data set."""
    if normalise != "expected_average_only_in":
        if scale is not None:
            raise UserError(f"dictionary {folder}: was trained with normalize_activations {normalise!r}; give no scale")
        return None
    stored = cfg.get("norm_scaling_factor", cfg.get("neuronpedia_norm_scaling_factor"))
    found = scale if scale is not None else stored
    if not isinstance(found, (int, float)) or not found > 0:
        raise UserError(f"dictionary {folder}: was trained on activations scaled to mean length sqrt(d) and does not say "
                        "by how much; pass scale=sqrt(d) / mean length of the rows")  # fmt: skip
    return float(found)


def _gemma(file: Path, named: bool) -> Dictionary:
    """params.npz of Gemma Scope: JumpReLU, b_dec not subtracted, layer, kind and model in the folders' names."""
    _check_archive(file, _npy_bytes, named)
    try:
        with np.load(plain_file(file, named=named), allow_pickle=False) as arrays:
            tensors = {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in arrays.files}
    except (ValueError, OSError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as err:
        raise UserError(
            f"{file} is damaged, or holds what is not a plain array ({_line(err)}); fetch it again"
        ) from err
    _check_tensors(file, tensors, "jumprelu")
    layers, scope = re.findall(r"layer_(\d+)", str(file.parent)), re.findall(GEMMA_NAME, str(file))
    size, tuned, kind = scope[-1] if scope else ("", "", "res")
    # those of attention read its heads before their output matrix, which is no site
    site = f"{'mlp_out' if kind == 'mlp' else 'resid_post'}.{layers[-1]}" if layers and kind != "att" else None
    model = f"google/gemma-2-{size}" + "-it" * (tuned == "it") if scope else ""
    return _make(file, "jumprelu", tensors, site=site, model=model, k=None)


LEARNING_CLASSES = {
    "AutoEncoder": "relu", "AutoEncoderNew": "relu", "GatedAutoEncoder": "gated", "JumpReluAutoEncoder": "jumprelu",
    "AutoEncoderTopK": "topk", "BatchTopKSAE": "jumprelu", "MatryoshkaBatchTopKSAE": "jumprelu",
}  # fmt: skip
# their names -> ours; a torch Linear holds its weight [out, in]
LEARNING_NAMES = {
    "bias": "b_dec", "decoder_bias": "b_dec", "decoder.bias": "b_dec", "encoder.bias": "b_enc", "gate_bias": "b_enc",
    "mag_bias": "b_mag",
}  # fmt: skip


def _learning(folder: Path) -> Dictionary:
    """ae.pt + config.json of dictionary_learning; its biases are for plain activations, so nothing is scaled."""
    config = _json(folder / "config.json")
    trainer = config.get("trainer")
    trainer = trainer if isinstance(trainer, dict) else {}
    name = str(trainer.get("dict_class"))
    if name not in LEARNING_CLASSES:
        known = ", ".join(LEARNING_CLASSES)
        raise UserError(f"dictionary {folder}: dict_class {name!r} is not read; allowed: {known}")
    tensors = _learning_tensors(folder / LEARNING)
    k = int(tensors.pop("k")) if "k" in tensors else trainer.get("k")
    kind = LEARNING_CLASSES[name]
    threshold = tensors.pop("threshold", None)
    if kind == "jumprelu" and threshold is not None and "W_enc" in tensors:
        if threshold.numel() == 1 and float(threshold) < 0:
            raise UserError(f"dictionary {folder}: its threshold was never set in training, so no feature is cut off; "
                            "train it past its threshold_start_step")  # fmt: skip
        tensors["threshold"] = threshold.expand(tensors["W_enc"].shape[1]).clone()
    _check_tensors(folder, tensors, kind)
    if name == "AutoEncoder":  # its loader makes decoder rows of length 1, and activations in that unit
        _fold_norm(tensors)
    # all but these subtract the decoder's bias from what they read
    subtracts = name not in ("AutoEncoderNew", "JumpReluAutoEncoder")
    where, layer = str(trainer.get("submodule_name") or ""), trainer.get("layer")
    resid = isinstance(layer, int) and (not where or "resid_post" in where or re.search(r"layers?\.\d+$", where))
    options = {"subtract_b_dec": subtracts, "site": f"resid_post.{layer}" if resid else None}
    return _make(folder, kind, tensors, model=trainer.get("lm_name"), k=k if kind == "topk" else None, **options)


def _learning_tensors(file: Path) -> dict[str, Tensor]:
    _check_archive(file, None, False)
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's own, of a file that says another protocol or storage
            state = torch.load(plain_file(file), map_location="cpu", weights_only=True)
    except Exception as err:  # its own unpickler raises a dozen kinds; each means that this is no plain state dict
        raise UserError(f"{file} is damaged, or holds more than tensors ({_line(err)}); only tensors are read") from err
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{file} is not a state dict of tensors; give the ae.pt that dictionary_learning wrote")
    out = {}
    for key, value in state.items():
        if key in ("encoder.weight", "decoder.weight"):
            out["W_enc" if key == "encoder.weight" else "W_dec"] = value.T.contiguous()
        else:
            out[LEARNING_NAMES.get(str(key), str(key))] = value
    return out


def _fold_norm(tensors: dict[str, Tensor]) -> None:
    """Decoder rows of length 1, features in that unit: the same function, written another way."""
    norm = tensors["W_dec"].norm(dim=1)
    norm = torch.where(norm > 0, norm, 1.0)
    tensors["W_dec"] = tensors["W_dec"] / norm[:, None]
    tensors["W_enc"], tensors["b_enc"] = tensors["W_enc"] * norm, tensors["b_enc"] * norm


def _check_tensors(where: Path, tensors: Mapping[str, Tensor], kind: str) -> None:
    from .dictionaries import EXTRA

    needed = ["W_enc", "b_enc", "W_dec", "b_dec", *(n for n in EXTRA[kind] if n != "k")]
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise UserError(f"dictionary {where}: {', '.join(missing)} missing for kind {kind}; fetch it again")
    for name in needed:
        value = tensors[name]
        if not value.numel() or not value.is_floating_point() or not bool(torch.isfinite(value.float()).all()):
            raise UserError(
                f"dictionary {where}: {name} holds NaN, infinity or no floating-point numbers; fetch it again"
            )


def _make(
    where: Path, kind: str, tensors: Mapping[str, Tensor], *, site: Any, model: Any, **options: Any
) -> Dictionary:
    from .dictionaries import EXTRA, Dictionary

    try:
        place = None if site is None else str(Site.parse(str(site)))
    except UserError:  # a point that the workbench has no name for, such as hook_z: the file is read, the site unknown
        place, options = None, {**options, "meta": {**options.get("meta", {}), "hook_name": str(site)}}
    kept = {n: tensors[n] for n in ("W_enc", "b_enc", "W_dec", "b_dec", *EXTRA[kind]) if n != "k"}
    # halves are for the disk: a CPU computes in float32
    kept = {n: v.float() if v.dtype in (torch.float16, torch.bfloat16) else v for n, v in kept.items()}
    try:
        return Dictionary(**kept, kind=kind, site=place, model=str(model or ""), **options)
    except UserError as err:
        raise UserError(f"dictionary {where}: {err}") from err


def _json(file: Path) -> dict[str, Any]:
    try:
        value = read_json(file)
    except OSError as err:
        raise UserError(f"{file} cannot be read: {err.strerror or err}; fetch the complete folder") from err
    except ValueError as err:
        raise UserError(f"{file} is damaged: it cannot be read as JSON ({reason(err)}); fetch it again") from err
    if not isinstance(value, dict):
        raise UserError(f"{file} is damaged: it must hold a JSON object; fetch it again")
    return value


def _check_archive(file: Path, member_bytes: Any, named: bool) -> None:
    """UserError for a zip that would unpack to far more than it weighs, or whose arrays claim more than they hold."""
    limit = UNPACKED * file.stat().st_size + SLACK
    try:
        with zipfile.ZipFile(plain_file(file, named=named)) as archive:
            total = sum(info.file_size for info in archive.infolist())
            if total <= limit and member_bytes is not None:
                total = max(total, sum(member_bytes(archive, info) for info in archive.infolist()))
    except (
        Exception
    ) as err:  # a damaged archive fails as zip, zlib, struct, numpy, or the tokenizer of an array's header do
        raise UserError(f"{file} is not a zip archive that can be read ({_line(err)}); fetch it again") from err
    if total > limit:
        raise UserError(f"refused to read {file}: it would unpack to {total:,} bytes from {file.stat().st_size:,}, more "
                        f"than {UNPACKED} times its size")  # fmt: skip


def _npy_bytes(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
    """How many bytes the header of an .npy member claims; numpy would make room for them before reading."""
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError(f"{info.filename} is an array of Python objects")
    count = 1
    for side in shape:
        count *= int(side)
    return count * dtype.itemsize


def _line(err: Exception) -> str:
    return " ".join(str(err).split())[:120] or type(err).__name__
