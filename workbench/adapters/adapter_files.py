"""The workbench's own adapter folder, read with distrust: it may be damaged, or somebody else's."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from .. import small_files
from ..atomic import staged_folder
from ..errors import UserError
from ..maps.linear_map import read_safetensors
from ..sites import Site
from ..small_files import reason
from .adapter import Adapter
from .card import CARD, card_text
from .low_rank import LowRank
from .storage import STORAGES, pack, unpack

FORMAT = "workbench.adapter"
ADAPTER = "adapter.json"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
VERSIONS = (1, 2, 3)
"""2 has `terms`, one entry of positions and sites for each, in place of the two; 3 has `storage` and at each site the `error`
of what is stored, with or without terms; all else is as in 1"""


def read_json(file: Path, advice: str) -> Any:
    """A JSON file from outside; UserError with `advice` for one that is damaged."""
    try:
        return small_files.read_json(file)
    except OSError as err:
        raise UserError(f"{file} cannot be read: {err.strerror or err}; check the file") from err
    except ValueError as err:  # not UTF-8, not JSON, a number of thousands of digits, nested too deep, a link or a pipe
        raise UserError(f"{file} is damaged: it cannot be read as JSON ({reason(err)}); {advice}") from err


def write_adapter(adapter: Adapter, folder: Path, *, overwrite: bool = False, storage: str | None = None) -> None:
    """Writes adapter.json and adapter.safetensors, and the card of a paste; see `Adapter.save`."""
    if storage not in (None, *STORAGES):
        raise UserError(
            f"unknown storage {storage!r}; allowed: {', '.join(STORAGES)}, or None for the tensors as they are"
        )
    header, tensors = header_and_tensors(adapter, storage)
    with staged_folder(folder, marker=ADAPTER, overwrite=overwrite) as staged:
        (staged / ADAPTER).write_text(json.dumps(header, indent=2, sort_keys=True) + "\n")
        (staged / "adapter.safetensors").write_bytes(to_bytes(tensors))
        if adapter.meta.get("kind") == "paste":
            (staged / CARD).write_text(card_text(adapter), encoding="utf-8")


def header_and_tensors(adapter: Adapter, storage: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What adapter.json and adapter.safetensors hold of an adapter."""
    header: dict[str, Any] = {
        "format": FORMAT,
        "version": 3 if storage else 2 if adapter.terms else 1,
        "name": adapter.name,
        "strength": adapter.strength,
        "base": dict(adapter.base),
        "meta": dict(adapter.meta),
    }
    entries: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for prefix, term in _prefixed(adapter.split()):
        sites: dict[str, Any] = {}
        entries.append({"positions": term.positions, "sites": sites})
        for site, part in term.parts.items():
            sites[str(site)] = {"act": part.act}
            # cloned: safetensors takes no two names for one memory, as of a part that acts in two places
            kept = {key: getattr(part, key).detach().cpu().contiguous().clone() for key in ("V", "b", "U")}
            if storage:
                kept, sites[str(site)]["error"] = pack(part)
            tensors |= {f"{prefix}{site}.{key}": tensor for key, tensor in kept.items()}
    header |= {"terms": entries} if adapter.terms else entries[0]
    header |= {"storage": storage} if storage else {}
    return header, tensors


def _prefixed(terms: list[Any]) -> list[tuple[str, Any]]:
    """Each term with what the names of its tensors begin with: nothing where it is the only one."""
    return [("" if len(terms) == 1 else f"{i}.", term) for i, term in enumerate(terms)]


def read_adapter(folder: Path) -> Adapter:
    """Reads adapter.json and adapter.safetensors; UserError, in one line, for anything that is not whole."""
    header = read_json(folder / ADAPTER, "write the adapter again")
    return adapter_of(header, lambda: read_safetensors(folder / "adapter.safetensors")[0], folder)


def adapter_of(header: Any, read: Callable[[], Mapping[str, Tensor]], folder: Path) -> Adapter:
    """The adapter of `header_and_tensors`; errors name the files of `folder`, and `read` is called once the header is good."""
    file = folder / ADAPTER
    if not isinstance(header, dict) or header.get("format") != FORMAT or header.get("version") not in VERSIONS:
        raise UserError(f"{file} is not of format {FORMAT!r} version {' or '.join(map(str, VERSIONS))}")
    several = header["version"] == 2 or (header["version"] == 3 and "terms" in header)
    packed = header["version"] == 3
    _check_header(file, header, _RULES | (_TERMS if several else _PLACES) | (_STORAGE if packed else {}))
    entries = header["terms"] if several else [header]
    for entry in entries:
        _check_header(file, entry, _PLACES)
    tensors = read()
    terms = [_assemble(folder, prefix, entry, tensors, packed) for prefix, entry in _prefixed(entries)]
    if len({term.positions for term in terms}) < len(terms):
        raise UserError(f"{file} is damaged: two of its terms have the same positions; write the adapter again")
    whole = terms[0] if len(terms) == 1 else Adapter({}, terms=tuple(terms))
    return replace(whole, strength=header["strength"], name=header["name"], base=header["base"], meta=header["meta"])


def _check_header(file: Path, header: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """UserError for the first entry of adapter.json that is missing or of another type than `write_adapter` writes."""
    for key, (wanted, fits) in rules.items():
        if key not in header:
            raise UserError(f"{file} is damaged: {key} is missing; write the adapter again")
        if not fits(header[key]):
            raise UserError(
                f"{file} is damaged: {key} must be {wanted}, got {header[key]!r:.80}; write the adapter again"
            )


def _is_finite_number(value: Any) -> bool:
    # comparing works for integers that no float holds, and is false for NaN
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


Rule = tuple[str, Callable[[Any], bool]]
_RULES: dict[str, Rule] = {
    "name": ("a string", lambda x: isinstance(x, str)),
    "strength": ("a finite number", _is_finite_number),
    "base": (
        "an object of strings",
        lambda x: isinstance(x, dict) and all(isinstance(entry, str) for entry in x.values()),
    ),
    "meta": ("an object", lambda x: isinstance(x, dict)),
}
_PLACES: dict[str, Rule] = {
    "positions": ("a string", lambda x: isinstance(x, str)),
    "sites": (
        'an object such as {"resid_post.5": {"act": "linear"}}',
        lambda x: (
            isinstance(x, dict)
            and all(isinstance(entry, dict) and isinstance(entry.get("act"), str) for entry in x.values())
        ),
    ),
}
_STORAGE: dict[str, Rule] = {"storage": (" or ".join(map(repr, STORAGES)), lambda x: x in STORAGES)}
_TERMS: dict[str, Rule] = {
    "terms": (
        "a list of two objects or more",
        lambda x: isinstance(x, list) and len(x) > 1 and all(isinstance(entry, dict) for entry in x),
    )
}


def _assemble(
    folder: Path, prefix: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor], packed: bool
) -> Adapter:
    """One adapter of one positions, of strength 1."""
    parts: dict[Site, LowRank] = {}
    for text, said in entry["sites"].items():
        names = {key: f"{prefix}{text}.{key}" for key in ("V", "b", "U", *(("V.scale", "U.scale") if packed else ()))}
        found = {key: tensors[name] for key, name in names.items() if name in tensors}
        missing = [key for key in ("V", "b", "U") if key not in found]
        if missing:
            raise UserError(f"{folder} is damaged: {', '.join(missing)} of {text} is missing; write the adapter again")
        if packed:
            found = unpack(found, folder / "adapter.safetensors", text)
        for key, tensor in found.items():
            check_finite(tensor, folder / "adapter.safetensors", f"{key} of {text}")
        try:
            parts[Site.parse(text)] = LowRank(found["V"], found["b"], found["U"], said["act"])
        except ValueError as err:
            raise UserError(f"{folder} is damaged: {err}; write the adapter again") from err
    try:
        return Adapter(parts, entry["positions"])
    except ValueError as err:
        raise UserError(f"{folder / 'adapter.json'} is damaged: {err}; write the adapter again") from err


def check_finite(tensor: Tensor, file: Path, what: str) -> None:
    """UserError naming `what` and `file` for a tensor of integers or 8-bit floats, or one that holds NaN or infinity."""
    if tensor.dtype not in FLOATS:
        raise UserError(
            f"{file} is damaged: {what} is {tensor.dtype}, not floating point of 16, 32 or 64 bits; write the adapter again"
        )
    if not bool(torch.isfinite(tensor.float()).all()):
        raise UserError(f"{file} is damaged: {what} holds NaN or infinity; train or write the adapter again")
