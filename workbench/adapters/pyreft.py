"""Adapter folders as pyreft and pyvene write them: config.json and one intkey_*.bin per edited layer.

The .bin files are torch archives by that format's own definition; they are read with `weights_only=True`, which admits
tensors and nothing that could run. Formulas: arXiv:2404.03592; arXiv:2506.19140 (the released adapters).
"""

from __future__ import annotations

import functools
import io
import json
import re
from collections import Counter, OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..atomic import staged_folder
from ..errors import UserError
from ..sites import Site
from .adapter import Adapter
from .adapter_files import check_finite, read_json
from .interventions import low_rank_of
from .low_rank import LowRank
from .torch_archive import read_tensors

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
    """Reads a pyreft folder: NoDiReFT, LoReFT, DiReFT, NoReFT, ConsReFT or LobiReFT, at `l1`, `f3`, `f1+l1` and the like.

    Two units at a layer (`f1+l1`) become an adapter of two `terms`. Of a prompt that is shorter than both together,
    pyreft gives each at most half; here both act where they meet.

    NoDiReFT keeps its tensors and dtype (V = W1^T, U = W2, both [r, d] on disk); the other forms are rewritten as
    delta(h) = (h @ V + b) @ U in float32. The bias of proj_layer has no effect in NoDiReFT and is not kept.

    Args:
        folder: with config.json and intkey_*.bin, keys written with dots or underscores.
        act: the folder does not say which activation was trained with; anything but linear is taken for NoDiReFT and
            DiReFT only, where it can be said in one part.

    Raises:
        UserError: weights missing, an unknown kind of intervention, two edits of one site at the same positions, or
            entries and tensors that are damaged.
    """
    folder = Path(folder)
    config = _json(folder / "config.json")
    keys, kinds = _strings(folder, config, "sorted_keys"), _strings(folder, config, "intervention_types")
    if not keys or len(kinds) != len(keys):
        raise UserError(f"{folder / 'config.json'} is not a pyreft config: it needs sorted_keys and intervention_types")
    if not list(folder.glob("intkey_*.bin")):
        raise UserError(f"weights missing: {folder} has a config but no intkey_*.bin file; fetch the complete folder")
    listed = config.get("representations") or []
    if not isinstance(listed, list) or len(listed) != len(keys) or not all(map(_is_representation, listed)):
        raise UserError(
            f"{folder / 'config.json'} is damaged: it needs one list in representations for each of its keys, such as "
            '[5, "block_output", ...]; fetch the folder again'
        )
    by_unit = _by_unit(listed, kinds)
    training = _training(folder / "training_metadata.json")
    where = _policies(folder, keys, training)
    terms: dict[str, dict[Site, LowRank]] = {}
    for key, policy in zip(keys, where, strict=True):
        layer, component, index = _parse(key)
        part = low_rank_of(_tensors(folder, key), by_unit.get((layer, component, index), kinds[0]), act, key)
        for name in ("V", "b", "U"):
            check_finite(getattr(part, name), folder, f"{name} of {key}")
        site, parts = Site(layer, POINTS[component]), terms.setdefault(policy, {})
        if site in parts:
            raise UserError(
                f"{folder} edits {site} twice at positions {policy}, the second on what the first made of the state; that "
                "is no sum on one state, so it is not read"
            )
        parts[site] = part
    base = {"name": training["model_name"]} if training.get("model_name") else {}
    meta = {"format": "pyreft", "training": training, "transformers_version": config.get("transformers_version")}
    made = [Adapter(parts, policy) for policy, parts in terms.items()]
    return replace(
        functools.reduce(Adapter.__add__, made), name=training.get("dataset_name") or "", base=base, meta=meta
    )


def write(adapter: Adapter, folder: str | Path, *, overwrite: bool = False) -> None:
    """Writes an adapter as a NoDiReFT folder that pyreft's `ReftModel.load` takes; strength goes into the write side.

    An adapter that differs between first and last positions becomes `f..+l..` with two units at each site, the firsts
    listed before the lasts, as pyreft's `get_intervention_locations` shares them out; one that does the same at both
    is written with `share_weight`.

    Raises:
        UserError: an act other than linear, positions or sites that pyreft cannot say, or a folder that exists.
    """
    component = {point: name for name, point in POINTS.items()}
    terms = sorted(adapter.split(), key=lambda term: term.positions)  # first before last
    said = _said(terms)
    listed: list[tuple[str, Site, LowRank]] = []
    for index, term in enumerate(terms):
        for site, part in term.parts.items():
            if part.act != "linear" or site.point not in component:
                allowed = ", ".join(component)
                raise UserError(f"pyreft cannot say {site} with act {part.act}; allowed: act linear at {allowed}")
            unit = sum(site in earlier.parts for earlier in terms[:index])
            key = f"layer_{site.layer}_comp_{component[site.point]}_unit_pos_nunit_1#{unit}"
            listed.append((key, site, part * term.strength))
    config = {
        "intervention_constant_sources": [True] * len(listed),
        "intervention_dimensions": [part.width for _, _, part in listed],
        "intervention_types": [NODIREFT] * len(listed),
        "mode": "parallel",
        "representations": [
            [site.layer, component[site.point], "pos", 1, part.rank, *[None] * 9] for _, site, part in listed
        ],
        "sorted_keys": [key for key, _, _ in listed],
        "transformers_version": adapter.meta.get("transformers_version") or TRANSFORMERS,
    }
    training = {**adapter.meta.get("training", {}), **said}
    if adapter.base.get("name"):
        training["model_name"] = adapter.base["name"]
    with staged_folder(folder, marker="config.json", overwrite=overwrite) as staged:
        (staged / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        (staged / "training_metadata.json").write_text(json.dumps(training, indent=2) + "\n")
        for key, _, part in listed:
            (staged / f"intkey_{key}.bin").write_bytes(_archive(part))


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
    return read_tensors(file)


def _parse(key: str) -> tuple[int, str, int]:
    match = KEY.fullmatch(key)
    if match is None or match[2] not in POINTS:
        raise UserError(f"cannot read the pyreft key {key!r}; components that are read: {', '.join(POINTS)}")
    return int(match[1]), match[2], int(match[5])


def _by_unit(listed: list[Any], kinds: list[str]) -> dict[tuple[int, str, int], str]:
    """The kind of each intervention by layer, component, and its number among those of the same layer and component."""
    seen: Counter[tuple[int, str]] = Counter()
    found = {}
    for (layer, component, *_), kind in zip(listed, kinds, strict=True):
        found[layer, component, seen[layer, component]] = kind
        seen[layer, component] += 1
    return found


def _policies(folder: Path, keys: list[str], training: dict[str, Any]) -> list[str]:
    """The positions of each key. Of `f..+l..` pyreft gives the first half of the keys the firsts, the others the lasts;
    where weights are shared, each has both."""
    text = training.get("positions", "l1")
    match = re.fullmatch(r"(?:f([1-9]\d*))?(\+)?(?:l([1-9]\d*))?", text)
    if match is None or bool(match[2]) != bool(match[1] and match[3]) or not (match[1] or match[3]):
        raise UserError(f"pyreft positions {text!r} are not read; allowed: f1, f2, ..., l1, l2, ..., and both: f1+l1")
    first, last = f"first:{match[1]}", "last" if match[3] == "1" else f"last:{match[3]}"
    if not match[2]:
        return [first if match[1] else last] * len(keys)
    shared = training.get("share_weight", training.get("share_weights"))
    if shared is None:
        shared = False if any(_parse(key)[2] for key in keys) else None
    if shared is None or (not shared and len(keys) % 2):
        raise UserError(
            f"{folder} has positions {text!r} and {len(keys)} interventions, and does not say whether first and last "
            "positions share them; write share_weight, true or false, into training_metadata.json"
        )
    half = len(keys) // 2
    return [f"{first}+{last}"] * len(keys) if shared else [first] * half + [last] * half


def _said(terms: list[Adapter]) -> dict[str, Any]:
    """What training_metadata.json says of the positions of an adapter."""
    policies = [term.positions for term in terms]
    matches = [re.fullmatch(r"(first|last)(?::(\d+))?", one) for policy in policies for one in policy.split("+")]
    found = [f"{match[1][0]}{match[2] or 1}" for match in matches if match]
    if len(found) < len(matches) or [one[0] for one in found] not in (["f"], ["l"], ["f", "l"]):
        raise UserError(
            f"pyreft cannot say positions {' and '.join(policies)!r}; allowed: last, first:n, last:n, and first:n with "
            "last:n"
        )
    if len({len(term.parts) for term in terms}) > 1:
        raise UserError(
            "pyreft gives half of its interventions to the first positions and half to the last; this adapter has "
            f"{' and '.join(str(len(term.parts)) for term in terms)} parts there"
        )
    return {"positions": "+".join(found)} | ({"share_weight": len(terms) == 1} if len(found) == 2 else {})


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
    for key in ("share_weight", "share_weights"):
        if not isinstance(found.get(key, False), bool):
            raise UserError(f"{file} is damaged: {key} must be true or false, got {found[key]!r:.80}")
    return found


def _json(file: Path) -> dict[str, Any]:
    value = read_json(file, "fetch the folder again")
    if not isinstance(value, dict):
        raise UserError(f"{file} is not a JSON object")
    return value
