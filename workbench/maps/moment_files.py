"""Moments on disk: one .safetensors file, whose header says which tensor is what; checked whole before it is believed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from ..atomic import write_bytes
from ..errors import UserError
from .headers import damaged, read_header
from .linear_map import read_safetensors

if TYPE_CHECKING:
    from .moments import Moments

FORMAT, VERSION, WHAT = "workbench.moments", 2, "a file of moments"
FIELDS = {"n": int, "names": list, "pairs": list, "products": str, "meta": dict}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float64, torch.float32, torch.bfloat16, torch.float16)}  # fmt: skip


def save_moments(moments: Moments, path: Path, *, overwrite: bool, meta: Mapping[str, Any] | None) -> None:
    """See `Moments.save`."""
    if path.suffix != ".safetensors":
        raise UserError(f"moments are saved as one .safetensors file; got {path.name}")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already; choose another name or pass overwrite=True (--overwrite)")
    pairs = sorted(moments.product)
    tensors = {f"shift.{i}": moments.shift[name] for i, name in enumerate(moments.names)}
    tensors |= {f"sum.{i}": moments.sum[name] for i, name in enumerate(moments.names)}
    tensors |= {f"product.{i}": moments.product[pair] for i, pair in enumerate(pairs)}
    header = {"format": FORMAT, "version": VERSION, "n": moments.n, "names": moments.names, "pairs": pairs}
    header["products"] = str(moments.products).removeprefix("torch.")
    header["meta"] = dict(moments.meta if meta is None else meta)
    stored = {key: value.cpu().contiguous() for key, value in tensors.items()}
    write_bytes(path, to_bytes(stored, {"workbench": json.dumps(header)}))


def load_moments(path: Path, *, named: bool = True) -> Moments:
    """See `Moments.load`; `named` as in `read_safetensors`."""
    from .moments import Moments

    tensors, metadata = read_safetensors(path, named=named)
    header = read_header(metadata.get("workbench", ""), path, WHAT, format=FORMAT, version=VERSION, fields=FIELDS)
    names, pairs = header["names"], _pairs(path, header)
    _check_tensors(path, tensors, names, pairs)
    moments = Moments(pairs=pairs, products=DTYPES[header["products"]])
    moments.n, moments.meta = header["n"], header["meta"]
    for i, name in enumerate(names):
        moments.shift[name], moments.sum[name] = tensors[f"shift.{i}"], tensors[f"sum.{i}"]
    moments.product = {pair: tensors[f"product.{i}"] for i, pair in enumerate(pairs)}
    return moments


def _pairs(path: Path, header: dict[str, Any]) -> list[tuple[str, str]]:
    """The pairs of a header that makes sense, else UserError."""
    names, pairs = header["names"], header["pairs"]
    if header["n"] < 0:
        raise damaged(path, f"its header says {header['n']} rows")
    if header["products"] not in DTYPES:
        raise damaged(path, f"its header says products in {header['products']!r}, not in {', '.join(DTYPES)}")
    if not all(isinstance(name, str) for name in names) or names != sorted(set(names)):
        raise damaged(path, "its header does not name blocks once each, in their order")
    for pair in pairs:
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(name in names for name in pair) and pair == sorted(pair)
        ):
            raise damaged(path, f"its header pairs {pair}, and its blocks are {names}")
    found = [(a, b) for a, b in pairs]
    if len(set(found)) != len(found) or not {(name, name) for name in names} <= set(found):
        raise damaged(path, "its header does not pair every block with itself, and each pair once")
    return found


def _check_tensors(path: Path, tensors: dict[str, Tensor], names: list[str], pairs: list[tuple[str, str]]) -> None:
    """UserError where tensors are missing, left over, or of another shape or dtype than the header says."""
    width = {
        name: len(tensors[f"sum.{i}"]) for i, name in enumerate(names) if tensors.get(f"sum.{i}", torch.tensor(0)).ndim
    }
    shapes = {f"{kind}.{i}": [width.get(name)] for kind in ("shift", "sum") for i, name in enumerate(names)}
    shapes |= {f"product.{i}": [width.get(a), width.get(b)] for i, (a, b) in enumerate(pairs)}
    if set(tensors) != set(shapes):
        other = sorted(set(tensors) ^ set(shapes))[0]
        raise damaged(path, f"its tensors are not those of its header: {other} is in one of them alone")
    for key, shape in shapes.items():
        if list(tensors[key].shape) != shape or tensors[key].dtype != torch.float64:
            raise damaged(path, f"tensor {key} is {tensors[key].dtype} of shape {list(tensors[key].shape)}, not "
                          f"torch.float64 of shape {shape}")  # fmt: skip
