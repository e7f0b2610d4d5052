"""What a store's manifest says, how it is written, and every reason to refuse a folder that says otherwise."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .errors import UserError
from .sites import Site

FORMAT = "workbench.store"
SCHEMA = 1
MANIFEST = "manifest.json"
TABLES = ("rows.parquet", "prompts.parquet")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_HEADER_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SHARD_NAME = re.compile(r"shards/[A-Za-z0-9_.\-]+\.safetensors")


def manifest_text(manifest: dict[str, Any]) -> str:
    """The one way in which a manifest is written; its `checksum` is the sha256 of this text with the checksum empty."""
    blank = _dump({**manifest, "checksum": ""})
    return _dump({**manifest, "checksum": hashlib.sha256(blank.encode()).hexdigest()})


def _dump(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a folder; raises UserError where there is none, or none that this version reads."""
    if not path.exists():
        raise UserError(f"store {path}: no such folder; make one with `workbench profile`")
    if not (path / MANIFEST).is_file():
        raise UserError(f"store {path}: has no {MANIFEST}, so it is no store; give one that `workbench profile` made")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except ValueError as err:
        raise UserError(f"store {path}: its {MANIFEST} is damaged (not JSON); profile again") from err
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"store {path}: its {MANIFEST} is not that of a store (format {FORMAT!r})")
    schema = manifest.get("schema")
    if not isinstance(schema, int) or schema < 1:
        raise UserError(f"store {path}: schema version {schema!r} is not a version; profile again")
    if schema > SCHEMA:
        raise UserError(f"store {path}: was made by a later version (schema {schema}, this one reads up to {SCHEMA}); "
                        "update the workbench")  # fmt: skip
    return manifest


def files_of(manifest: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name and the entry (bytes, sha256) of every file but the manifest."""
    yield from manifest["tables"].items()
    for entry in manifest["sites"].values():
        for shard in entry["shards"]:
            yield shard["file"], shard


def check_folder(path: Path, manifest: dict[str, Any]) -> None:
    """Raises UserError where the files in the folder are not those that the manifest describes."""
    if manifest["dtype"] not in DTYPES:
        raise UserError(f"store {path}: unknown dtype {manifest['dtype']!r}; allowed: {', '.join(DTYPES)}")
    if set(manifest["tables"]) != set(TABLES):
        raise UserError(f"store {path}: its {MANIFEST} names other tables than {', '.join(TABLES)}")
    if (path / "shards").is_symlink():
        raise UserError(f"store {path}: its shards folder is a link; refused")
    for name, entry in manifest["tables"].items():
        _check_file(path, name, entry["bytes"])
    seen: set[str] = set()
    for site, entry in manifest["sites"].items():
        Site.parse(site, manifest["model"]["n_layers"])
        if sum(shard["rows"] for shard in entry["shards"]) != manifest["n_rows"]:
            raise UserError(f"store {path}: the shards of {site} do not add up to {manifest['n_rows']} rows")
        for shard in entry["shards"]:
            if not _SHARD_NAME.fullmatch(shard["file"]) or shard["file"] in seen:
                raise UserError(f"store {path}: shard name {shard['file']!r} is not allowed; it must lie in shards/")
            seen.add(shard["file"])
            _check_file(path, shard["file"], shard["bytes"])
            _check_header(path, site, shard, entry["width"], manifest["dtype"])


def _check_file(path: Path, name: str, size: int) -> None:
    try:
        found = os.lstat(path / name)
    except OSError:
        raise UserError(f"store {path}: {name} is missing; profile again or restore it from a copy") from None
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"store {path}: {name} is not a regular file; refused")
    if found.st_size != size:
        raise UserError(f"store {path}: {name} has {found.st_size} bytes, its {MANIFEST} says {size}; profile again or "
                        "restore it from a copy")  # fmt: skip


def _check_header(path: Path, site: str, shard: dict[str, Any], width: int, dtype: str) -> None:
    """The safetensors header must hold the one tensor that the manifest says, and fill the file exactly."""
    with open(path / shard["file"], "rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        text = stream.read(length) if 0 < length <= min(shard["bytes"], 1 << 20) else b""
    try:
        header = json.loads(text)
        (name,) = [key for key in header if key != "__metadata__"]
        one = header[name]
    except (ValueError, TypeError, KeyError):
        raise UserError(f"store {path}: {shard['file']} is not a safetensors file of one tensor; refused") from None
    size = shard["rows"] * width * DTYPES[dtype].itemsize
    said = (name, _HEADER_DTYPES.get(one.get("dtype")), one.get("shape"), one.get("data_offsets"))
    if said != (site, dtype, [shard["rows"], width], [0, size]) or 8 + length + size != shard["bytes"]:
        raise UserError(f"store {path}: the header of {shard['file']} says {said[0]} {said[1]} {said[2]} at {said[3]}, "
                        f"the manifest says {site} {dtype} {[shard['rows'], width]}; refused")  # fmt: skip
