"""Files of steering vectors: .safetensors, or .pt as contrastive activation addition (CAA) and its kin save them.

A vector is added to the output of a block, at every position unless said otherwise (CAA adds it after the instruction;
arXiv:2312.06681). Where it acts is read from its name, the file's metadata or the file's name, or given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from ..atomic import write_bytes
from ..errors import UserError
from ..maps.linear_map import read_safetensors
from ..sites import Site
from .adapter import Adapter
from .adapter_files import check_finite
from .constants import constants_of
from .low_rank import LowRank
from .torch_archive import read_archive

MOST_LAYERS = 10_000
MOST = 1 << 28  # numbers in one file: 1 GiB in float32, far more than vectors for every layer of any model


def read(file: str | Path, *, site: str | int | Site | None = None) -> Adapter:
    """Reads a file of steering vectors.

    Args:
        file: holds a tensor [d]; a tensor [L, d], whose row l acts at the output of block l; or tensors [d] by layer (an
            int, `resid_post.5`, `blocks.5.hook_resid_post`, or a name such as `direction.5` or `layer_5`).
        site: where a single vector acts; needed where neither the metadata (`site` or `layer`) nor the file's name
            (`layer_13`, as CAA names them) say it.

    Raises:
        UserError: a file that is damaged, holds anything but such tensors, or does not say where they act.
    """
    found, meta = contents(Path(file))
    return assemble(found, meta, Path(file), None if site is None else Site.parse(site))


def contents(file: Path) -> tuple[Any, Mapping[str, str]]:
    """A tensor, or a dictionary, and the metadata of a file."""
    if file.suffix == ".safetensors":
        return read_safetensors(file, named=True)
    return read_archive(file, named=True), {}


def assemble(found: Any, meta: Mapping[str, str], file: Path, site: Site | None) -> Adapter:
    """The adapter that `contents` stand for."""
    if isinstance(found, Tensor):
        found = {"vector": found}
    if not isinstance(found, Mapping) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        raise UserError(f"{file} holds no vectors: it must be a tensor [d] or [L, d], or tensors [d] by layer")
    rows = _rows(found, meta, file, site)
    if len({len(v) for v in rows.values()}) > 1:
        raise UserError(f"{file} holds vectors of several widths: {sorted({len(v) for v in rows.values()})}")
    parts = {}
    for where, v in rows.items():
        check_finite(v, file, f"the vector of {where}")
        parts[where] = LowRank(v.new_zeros(len(v), 1), v.new_ones(1), v[None].clone())
    kept = {"format": "vectors", "file": file.name}
    try:
        return Adapter(
            parts, meta.get("positions", "all"), name=meta.get("name", file.stem), base=_base(meta), meta=kept
        )
    except ValueError as err:
        raise UserError(f"{file}: {err}") from err


def _base(meta: Mapping[str, str]) -> dict[str, str]:
    return {"name": meta["model"]} if meta.get("model") else {}


def _rows(found: Mapping[Any, Tensor], meta: Mapping[str, str], file: Path, site: Site | None) -> dict[Site, Tensor]:
    """Each vector by its site."""
    if len(found) == 1:
        ((key, only),) = found.items()
        if only.ndim == 2 and len(only) > 1:
            if site is not None:
                raise UserError(f"{file} holds {len(only)} vectors, row l for the output of block l; leave site out")
            if only.numel() == 0 or len(only) > MOST_LAYERS:
                raise UserError(
                    f"{file} holds a tensor of shape {list(only.shape)}; that is no steering vector for each layer"
                )
            _check_size(only, file)
            rows = {Site(layer): row for layer, row in enumerate(only) if bool(row.float().any())}
            if not rows:
                raise UserError(f"{file} holds zeros alone")
            return rows
        single = site or _named(key) or _said(meta) or _in_text(file.stem)
        if single is None:
            raise UserError(f"{file} does not say at which layer its vector acts; pass site=, such as resid_post.13")
        return {single: _flat(only, str(key), file)}
    if site is not None:
        raise UserError(f"{file} holds {len(found)} vectors with layers of their own; leave site out")
    rows = {}
    for key, tensor in found.items():
        named = _named(key)
        if named is None:
            raise UserError(f"{file}: the name {str(key)[:60]!r} does not say a layer; name them 13 or resid_post.13")
        if named in rows:
            raise UserError(f"{file} has two vectors for {named}")
        rows[named] = _flat(tensor, str(key), file)
    return rows


def _flat(tensor: Tensor, name: str, file: Path) -> Tensor:
    _check_size(tensor, file)
    if tensor.numel() == 0 or tensor.shape not in ((tensor.numel(),), (1, tensor.numel())):
        raise UserError(f"{file}: {name[:60]!r} has shape {list(tensor.shape)}; a steering vector is [d]")
    return tensor.detach().reshape(-1)


def _check_size(tensor: Tensor, file: Path) -> None:
    if tensor.numel() > MOST:
        raise UserError(f"{file} holds a tensor of shape {list(tensor.shape)}; that is no steering vector")


def _named(key: Any) -> Site | None:
    """The site that a key stands for."""
    site: Site | None
    try:
        site = Site.parse(key if isinstance(key, int) and not isinstance(key, bool) else str(key))
    except ValueError:
        site = _in_text(str(key))
    return site if site is not None and site.layer >= 0 else None


def _said(meta: Mapping[str, str]) -> Site | None:
    said = meta.get("site") or meta.get("layer")
    return None if said is None else _named(said)


def _in_text(text: str) -> Site | None:
    """The output of the block that a name speaks of: `vec_layer_13_llama`, `direction.13`; None where there is not one."""
    found = re.findall(r"(?:^|[^a-z])(?:layers?|blocks?|direction)[_. -]?(\d{1,4})(?!\d)", text.lower())
    return Site(int(found[0])) if len(found) == 1 else None


def write(adapter: Adapter, file: str | Path) -> None:
    """Writes an adapter that is a constant as a .safetensors file of vectors, float32, by the names of their sites.

    Raises:
        UserError: an adapter that is no constant, or a file that does not end in .safetensors.
    """
    file = Path(file)
    if file.suffix != ".safetensors":
        raise UserError(f"{file} is not a .safetensors file; name it so")
    tensors = {str(site): v.to(torch.float32).contiguous() for site, v in constants_of(adapter).items()}
    meta = {"format": "workbench.vectors", "positions": adapter.positions, "name": adapter.name}
    if adapter.base.get("name"):
        meta["model"] = adapter.base["name"]
    write_bytes(file, to_bytes(tensors, meta))
