"""Adapter folders as pyreft and pyvene write them: config.json and one intkey_*.bin per edited layer.

The .bin files are torch archives by that format's own definition; they are read with `weights_only=True`, which admits
tensors and nothing that could run. Formulas: arXiv:2404.03592; arXiv:2506.19140 (the released adapters).
"""

from __future__ import annotations

import io
import json
import pickle
import re
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..atomic import staged_folder
from ..errors import UserError
from ..sites import Site
from .adapter import Adapter
from .adapter_files import check_finite, read_json
from .low_rank import LowRank

POINTS = {
    "block_input": "resid_pre",
    "block_output": "resid_post",
    "attention_output": "attn_out",
    "mlp_output": "mlp_out",
    "mlp_activation": "mlp_act",
}
KEY = re.compile(r"layer[._](\d+)[._]comp[._](\w+)[._]unit[._](\w+)[._]nunit[._](\d+)#(\d+)")
NODIREFT = "<class 'pyreft.interventions.NodireftIntervention'>"
TRANSFORMERS = "4.45.1"  # the release that published folders name; pyreft asks for one of that time


def read(folder: str | Path, *, act: str = "linear") -> Adapter:
    """Reads a pyreft folder: NoDiReFT, LoReFT, DiReFT, NoReFT, ConsReFT or LobiReFT.

    NoDiReFT keeps its tensors and dtype (V = W1^T, U = W2, both [r, d] on disk); the other forms are rewritten as
    delta(h) = (h @ V + b) @ U in float32. The bias of proj_layer has no effect in NoDiReFT and is not kept.

    Args:
        folder: with config.json and intkey_*.bin, keys written with dots or underscores.
        act: the folder does not say which activation was trained with; anything but linear is taken for NoDiReFT and
            DiReFT only, where it can be said in one part.

    Raises:
        UserError: weights missing, an unknown kind of intervention, positions with more than one edit per layer, or
            entries and tensors that are damaged.
    """
    folder = Path(folder)
    config = _json(folder / "config.json")
    keys, kinds = _strings(folder, config, "sorted_keys"), _strings(folder, config, "intervention_types")
    if not keys or len(kinds) != len(keys):
        raise UserError(f"{folder / 'config.json'} is not a pyreft config: it needs sorted_keys and intervention_types")
    if not list(folder.glob("intkey_*.bin")):
        raise UserError(f"weights missing: {folder} has a config but no intkey_*.bin file; fetch the complete folder")
    parts: dict[Site, LowRank] = {}
    listed = config.get("representations") or []
    if not isinstance(listed, list) or len(listed) != len(keys) or not all(map(_is_representation, listed)):
        raise UserError(
            f"{folder / 'config.json'} is damaged: it needs one list in representations for each of its keys, such as "
            '[5, "block_output", ...]; fetch the folder again'
        )
    by_layer = {(entry[0], entry[1]): kind for entry, kind in zip(listed, kinds, strict=True)}
    for key in keys:
        layer, component, index = _parse(key)
        if index:
            raise UserError(f"{folder} edits layer {layer} at several positions; adapters with one position are read")
        kind = by_layer.get((layer, component), kinds[0])
        part = _part(_tensors(folder, key), kind, act, key)
        for name in ("V", "b", "U"):
            check_finite(getattr(part, name), folder, f"{name} of {key}")
        parts[Site(layer, POINTS[component])] = part
    training = _training(folder / "training_metadata.json")
    base = {"name": training["model_name"]} if training.get("model_name") else {}
    meta = {"format": "pyreft", "training": training, "transformers_version": config.get("transformers_version")}
    positions = _policy(training.get("positions", "l1"))
    return Adapter(parts, positions=positions, name=training.get("dataset_name") or "", base=base, meta=meta)


def write(adapter: Adapter, folder: str | Path, *, overwrite: bool = False) -> None:
    """Writes an adapter as a NoDiReFT folder that pyreft's `ReftModel.load` takes; strength goes into the write side.

    Raises:
        UserError: an act other than linear, positions or sites that pyreft cannot say, or a folder that exists.
    """
    component = {point: name for name, point in POINTS.items()}
    for site, part in adapter.parts.items():
        if part.act != "linear" or site.point not in component:
            allowed = ", ".join(component)
            raise UserError(f"pyreft cannot say {site} with act {part.act}; allowed: act linear at {allowed}")
    keys = {site: f"layer_{site.layer}_comp_{component[site.point]}_unit_pos_nunit_1#0" for site in adapter.parts}
    count = len(keys)
    config = {
        "intervention_constant_sources": [True] * count,
        "intervention_dimensions": [part.width for part in adapter.parts.values()],
        "intervention_types": [NODIREFT] * count,
        "mode": "parallel",
        "representations": [
            [site.layer, component[site.point], "pos", 1, part.rank, *[None] * 9]
            for site, part in adapter.parts.items()
        ],
        "sorted_keys": list(keys.values()),
        "transformers_version": adapter.meta.get("transformers_version") or TRANSFORMERS,
    }
    training = {**adapter.meta.get("training", {}), "positions": _positions(adapter.positions)}
    if adapter.base.get("name"):
        training["model_name"] = adapter.base["name"]
    with staged_folder(folder, marker="config.json", overwrite=overwrite) as staged:
        (staged / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        (staged / "training_metadata.json").write_text(json.dumps(training, indent=2) + "\n")
        for site, part in adapter.parts.items():
            (staged / f"intkey_{keys[site]}.bin").write_bytes(_archive(part * adapter.strength))


def _archive(part: LowRank) -> bytes:
    width = torch.tensor(part.width)
    state = OrderedDict(
        {
            "embed_dim": width,
            "interchange_dim": width.clone(),
            "proj_layer.weight": part.U.detach().cpu().contiguous(),
            "proj_layer.bias": torch.zeros_like(part.b, device="cpu"),
            "learned_source.weight": part.V.detach().cpu().T.contiguous(),
            "learned_source.bias": part.b.detach().cpu().contiguous(),
        }
    )
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _part(state: dict[str, Tensor], kind: str, act: str, key: str) -> LowRank:
    """One intervention as delta(h) = (h @ V + b) @ U."""
    name = kind.strip("<>'").rsplit(".", 1)[-1].removesuffix("Intervention").lower()
    forms = {
        "nodireft": _nodireft,
        "noreft": _noreft,
        "loreft": _loreft,
        "direft": _direft,
        "consreft": _consreft,
        "lobireft": _lobireft,
    }
    if name not in forms:
        raise UserError(f"{key} is a {kind}; adapters that are read: {', '.join(forms)}")
    if act != "linear" and name not in ("nodireft", "direft"):
        raise UserError(
            f"{name} with act {act} is not one low-rank part; only nodireft and direft are read with an act"
        )
    try:
        part = forms[name](state)
    except KeyError as err:
        raise UserError(f"{key} says {name} but holds {sorted(map(str, state))}: {err} is missing") from err
    except (RuntimeError, IndexError, ValueError) as err:  # shapes that do not fit together
        reason = " ".join(str(err).split())[:200]
        raise UserError(
            f"{key} is damaged: its tensors do not fit together ({reason}); fetch the folder again"
        ) from err
    return replace(part, act=act)


def _nodireft(s: dict[str, Tensor]) -> LowRank:
    # (h W1^T + b) W2
    return LowRank(s["learned_source.weight"].T.contiguous(), s["learned_source.bias"], s["proj_layer.weight"])


def _noreft(s: dict[str, Tensor]) -> LowRank:
    # (h W1^T + b1 - h W2^T - b2) W2
    w1, w2, b = s["learned_source.weight"].float(), s["proj_layer.weight"].float(), s["learned_source.bias"].float()
    return LowRank((w1 - w2).T.contiguous(), b - s["proj_layer.bias"].float() if "proj_layer.bias" in s else b, w2)


def _loreft(s: dict[str, Tensor]) -> LowRank:
    # (h W^T + b - h R) R^T
    weight, bias = _source(s)
    rotation = _rotation(s)
    return LowRank(weight.T - rotation, bias, rotation.T.contiguous())


def _direft(s: dict[str, Tensor]) -> LowRank:
    # (h W^T + b) R^T
    weight, bias = _source(s)
    return LowRank(weight.T.contiguous(), bias, _rotation(s).T.contiguous())


def _consreft(s: dict[str, Tensor]) -> LowRank:
    # (b - h R) R^T
    rotation = _rotation(s)
    return LowRank(-rotation, s["learned_source"].float(), rotation.T.contiguous())


def _lobireft(s: dict[str, Tensor]) -> LowRank:
    # b R^T
    rotation = _rotation(s)
    return LowRank(torch.zeros_like(rotation), s["learned_source"].float(), rotation.T.contiguous())


def _source(s: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    prefix = "" if "weight" in s else "learned_source."  # LoReFT saves its learned source without a prefix
    return s[f"{prefix}weight"].float(), s[f"{prefix}bias"].float()


def _rotation(s: dict[str, Tensor]) -> Float[Tensor, "d r"]:
    """R, plain or as torch's orthogonal parametrization stores it: base @ Householder product of its lower triangle."""
    if "rotate_layer" in s:
        return s["rotate_layer"].float()
    original = s["rotate_layer.parametrizations.weight.original"].float()
    below = original.tril(diagonal=-1)
    q = torch.linalg.householder_product(below, 2 / (1 + (below * below).sum(-2)))
    q = q * original.diagonal().int().unsqueeze(-2)
    base = s.get("rotate_layer.parametrizations.weight.0.base")
    return q if base is None else base.float() @ q


def _tensors(folder: Path, key: str) -> dict[str, Tensor]:
    match = KEY.fullmatch(key)
    assert match is not None
    layer, component, unit, number, index = match.groups()
    names = (
        f"intkey_layer_{layer}_comp_{component}_unit_{unit}_nunit_{number}#{index}.bin",
        f"intkey_layer.{layer}.comp.{component}.unit.{unit}.nunit.{number}#{index}.bin",
    )
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"weights missing: {folder} has no {names[0]}; fetch the complete folder")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as err:
        raise UserError(f"{file} was refused: it is damaged, or holds more than tensors") from err
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file} was refused: it is not a dictionary of tensors")
    return dict(state)


def _parse(key: str) -> tuple[int, str, int]:
    match = KEY.fullmatch(key)
    if match is None or match[2] not in POINTS:
        raise UserError(f"cannot read the pyreft key {key!r}; components that are read: {', '.join(POINTS)}")
    return int(match[1]), match[2], int(match[5])


def _policy(text: str) -> str:
    match = re.fullmatch(r"([fl])(\d+)", text)
    if match is None or match[2] == "0":
        raise UserError(f"pyreft positions {text!r} are not read; allowed: one of f1, f2, ..., l1, l2, ...")
    side, count = ("first" if match[1] == "f" else "last"), match[2]
    return "last" if (side, count) == ("last", "1") else f"{side}:{count}"


def _positions(policy: str) -> str:
    match = re.fullmatch(r"(first|last)(?::(\d+))?", policy)
    if match is None:
        raise UserError(f"pyreft cannot say positions {policy!r}; allowed: last, first:n, last:n")
    return f"{match[1][0]}{match[2] or 1}"


def _strings(folder: Path, config: dict[str, Any], key: str) -> list[str]:
    """A list of strings in config.json; empty where it is missing."""
    found = config.get(key) or []
    if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found):
        raise UserError(
            f"{folder / 'config.json'} is damaged: {key} must be a list of strings, got {found!r:.80}; fetch the "
            "folder again"
        )
    return found


def _is_representation(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) > 1 and type(entry[0]) is int and isinstance(entry[1], str)


def _training(file: Path) -> dict[str, Any]:
    """training_metadata.json, {} where there is none; the entries that are used are checked."""
    found = _json(file) if file.is_file() else {}
    for key in ("positions", "model_name", "dataset_name"):
        value = found.get(key)
        if not isinstance(value, str) and (value is not None or (key in found and key == "positions")):
            raise UserError(f"{file} is damaged: {key} must be a string, got {value!r:.80}; fetch the folder again")
    return found


def _json(file: Path) -> dict[str, Any]:
    value = read_json(file, "fetch the folder again")
    if not isinstance(value, dict):
        raise UserError(f"{file} is not a JSON object")
    return value
