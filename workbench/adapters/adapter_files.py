"""The workbench's own adapter folder, read with distrust: it may be damaged, or somebody else's."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..maps.linear_map import read_safetensors
from ..sites import Site
from .adapter import FORMAT, VERSION, Adapter
from .low_rank import LowRank


def read_json(file: Path, advice: str) -> Any:
    """A JSON file from outside; UserError with `advice` for one that is damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as err:
        raise UserError(f"{file} cannot be read: {err.strerror or err}; check the file") from err
    except (ValueError, RecursionError) as err:  # not UTF-8, not JSON, a number of thousands of digits, nested too deep
        raise UserError(f"{file} is damaged: it cannot be read as JSON; {advice}") from err


def read_adapter(folder: Path) -> Adapter:
    """Reads adapter.json and adapter.safetensors; UserError, in one line, for anything that is not whole."""
    file = folder / "adapter.json"
    header = read_json(file, "write the adapter again")
    if not isinstance(header, dict) or header.get("format") != FORMAT or header.get("version") != VERSION:
        raise UserError(f"{file} is not of format {FORMAT!r} version {VERSION}")
    _check_header(file, header)
    tensors, _ = read_safetensors(folder / "adapter.safetensors")
    return _assemble(folder, header, tensors)


def _check_header(file: Path, header: Mapping[str, Any]) -> None:
    """UserError for the first entry of adapter.json that is missing or of another type than `save` writes."""
    rules: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "name": ("a string", lambda x: isinstance(x, str)),
        "positions": ("a string", lambda x: isinstance(x, str)),
        "strength": ("a finite number", _is_finite_number),
        "base": (
            "an object of strings",
            lambda x: isinstance(x, dict) and all(isinstance(entry, str) for entry in x.values()),
        ),
        "meta": ("an object", lambda x: isinstance(x, dict)),
        "sites": (
            'an object such as {"resid_post.5": {"act": "linear"}}',
            lambda x: (
                isinstance(x, dict)
                and all(isinstance(entry, dict) and isinstance(entry.get("act"), str) for entry in x.values())
            ),
        ),
    }
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


def _assemble(folder: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Adapter:
    parts: dict[Site, LowRank] = {}
    for text, entry in header["sites"].items():
        missing = [key for key in ("V", "b", "U") if f"{text}.{key}" not in tensors]
        if missing:
            raise UserError(f"{folder} is damaged: {', '.join(missing)} of {text} is missing; write the adapter again")
        for key in ("V", "b", "U"):
            check_finite(tensors[f"{text}.{key}"], folder / "adapter.safetensors", f"{key} of {text}")
        try:
            site, (v, b, u) = Site.parse(text), (tensors[f"{text}.{key}"] for key in ("V", "b", "U"))
            parts[site] = LowRank(v, b, u, entry["act"])
        except ValueError as err:
            raise UserError(f"{folder} is damaged: {err}; write the adapter again") from err
    try:
        return Adapter(parts, header["positions"], header["strength"], header["name"], header["base"], header["meta"])
    except ValueError as err:
        raise UserError(f"{folder / 'adapter.json'} is damaged: {err}; write the adapter again") from err


def check_finite(tensor: Tensor, file: Path, what: str) -> None:
    """UserError naming `what` and `file` for a tensor of integers, or one that holds NaN or infinity."""
    if not tensor.is_floating_point():
        raise UserError(f"{file} is damaged: {what} is {tensor.dtype}, not floating point; write the adapter again")
    if not bool(torch.isfinite(tensor.float()).all()):
        raise UserError(f"{file} is damaged: {what} holds NaN or infinity; train or write the adapter again")
