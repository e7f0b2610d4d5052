"""What a store's manifest says, how it is written, and every reason to refuse a folder that says otherwise."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import struct
from collections.abc import Iterator
from typing import Any

from ..errors import UserError
from ..sites import Site
from ..small_files import check_depth
from .folder import Folder
from .shards import DTYPES, Layout

FORMAT = "workbench.store"
SCHEMA = 2
MANIFEST = "manifest.json"
MOMENTS = "moments.json"  # in its place in a folder that `profile_moments` made
MOMENTS_FORMAT = "workbench.profile_moments"
TABLES = ("rows.parquet", "prompts.parquet")
MANIFEST_BYTES = 256 << 20  # of a manifest at most: a hundred thousand shards
PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt", ".joblib", ".dill")
_SHARD_NAME = re.compile(r"shards/[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST = 1 << 62  # no count of rows or bytes reaches it


def manifest_text(manifest: dict[str, Any]) -> str:
    """The one way in which a manifest is written; its `checksum` is the sha256 of this text with the checksum empty."""
    blank = _dump({**manifest, "checksum": ""})
    return _dump({**manifest, "checksum": hashlib.sha256(blank.encode()).hexdigest()})


def _dump(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def read_manifest(folder: Folder) -> dict[str, Any]:
    """The manifest of a folder; raises UserError where there is none, or none that this version reads."""
    path, found = folder.path, folder.scan()
    pickles = sorted(name for name in found if name.endswith(PICKLES))
    if MANIFEST not in found and MOMENTS in found:
        raise UserError(f"store {path}: holds moments ({MOMENTS}), which keep no rows, and is no store; open it with "
                        "workbench.load_moments")  # fmt: skip
    if MANIFEST not in found:
        more = f" ({pickles[0]} in it is a pickle, which is never loaded)" if pickles else ""
        raise UserError(f"store {path}: has no {MANIFEST}, so it is no store{more}; give one that `workbench profile` "
                        "made")  # fmt: skip
    if pickles:
        raise _pickled(folder, pickles[0])
    if not stat.S_ISREG(found[MANIFEST].st_mode):
        raise UserError(f"store {path}: {MANIFEST} is not a regular file; refused")
    if found[MANIFEST].st_size > MANIFEST_BYTES:
        raise UserError(f"store {path}: its {MANIFEST} has {found[MANIFEST].st_size} bytes, more than any store's "
                        f"({MANIFEST_BYTES}); refused")  # fmt: skip
    with os.fdopen(folder.open(MANIFEST), "rb") as stream:
        text = stream.read(MANIFEST_BYTES)
    try:
        manifest = json.loads(text.decode("utf-8"), object_pairs_hook=_once_each, parse_constant=_no_constant,
                              parse_float=_finite)  # fmt: skip
        check_depth(manifest)
    except _Refused as err:
        raise UserError(f"store {path}: its {MANIFEST} {err}; refused") from None
    except RecursionError:
        raise UserError(f"store {path}: its {MANIFEST} is nested too deep; refused") from None
    except ValueError as err:
        raise UserError(f"store {path}: its {MANIFEST} is damaged (not JSON); profile again") from err
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"store {path}: its {MANIFEST} is not that of a store (format {FORMAT!r})")
    schema = manifest.get("schema")
    if type(schema) is not int or schema < 1:
        raise UserError(f"store {path}: schema version {_short(schema)} is not a version; profile again")
    if schema > SCHEMA:
        raise UserError(f"store {path}: was made by a later version (schema {_short(schema)}, this one reads {SCHEMA});"
                        " update the workbench")  # fmt: skip
    if schema < SCHEMA:
        raise UserError(f"store {path}: was made by an earlier version (schema {schema}, this one reads {SCHEMA}); "
                        "profile again")  # fmt: skip
    return manifest


class _Refused(Exception):
    """Something that JSON allows and no manifest has."""


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _Refused(f"has {next(key for key in keys if keys.count(key) > 1)!r:.80} twice")
    return found


def _no_constant(name: str) -> Any:
    raise _Refused(f"holds {name}, which is no number of a manifest")


def _finite(text: str) -> float:
    found = float(text)
    return found if math.isfinite(found) else _no_constant(f"{text:.20}")


def _short(value: Any) -> str:
    return f"{value!r:.40}"


def _pickled(folder: Folder, name: str) -> UserError:
    return UserError(f"store {folder.path}: {name} is a pickle, which can run code and is never loaded; a store has "
                     "safetensors and parquet alone: remove it")  # fmt: skip


def files_of(manifest: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name and the entry (bytes, sha256) of every file but the manifest."""
    yield from manifest["tables"].items()
    for shard in manifest["shards"]:
        yield shard["file"], shard


def check_manifest(where: str, manifest: dict[str, Any]) -> Layout:
    """How the shards of this manifest are laid out; raises UserError, beginning with `where`, for one that is damaged,
    names files outside the folder, or does not agree with itself."""

    def refuse(why: str) -> UserError:
        return UserError(f"{where}: {why}")

    def count(what: str, value: Any, low: int = 0, high: int = _MOST) -> int:
        if type(value) is not int or not low <= value <= high:
            raise refuse(f"its {MANIFEST} is damaged ({what} is {_short(value)}); profile again")
        return value

    if manifest["dtype"] not in DTYPES:
        raise refuse(f"unknown dtype {_short(manifest['dtype'])}; allowed: {', '.join(DTYPES)}")
    if set(manifest["tables"]) != set(TABLES):
        raise refuse(f"its {MANIFEST} names other tables than {', '.join(TABLES)}")
    n_rows, n_layers = count("n_rows", manifest["n_rows"], 1), count("n_layers", manifest["model"]["n_layers"], 1)
    count("the count of prompts", manifest["prompts"]["count"], 1)
    words = {"tokens": manifest["tokens"], "model.name": manifest["model"]["name"], **{
        f"prompts.{key}": manifest["prompts"][key] for key in ("name", "hash", "rendered_hash")}}  # fmt: skip
    for what, value in words.items():
        if not isinstance(value, str):
            raise refuse(f"its {MANIFEST} is damaged ({what} is {_short(value)}); profile again")
    if not isinstance(manifest["model"]["fingerprint"], dict):
        raise refuse(f"its {MANIFEST} is damaged (the fingerprint of its model is none); profile again")
    widths: dict[str, int] = {}
    for name, entry in manifest["sites"].items():
        try:
            site = Site.parse(name, n_layers) if len(name) < 32 else None
        except UserError as err:
            raise refuse(f"its {MANIFEST} names a site that is none: {err}") from None
        if str(site) != name:
            raise refuse(f"its {MANIFEST} names the site {_short(name)} otherwise than it is called; profile again")
        widths[name] = count(f"the width of {name}", entry["width"], 1, 1 << 32)
    if not widths:
        raise refuse(f"its {MANIFEST} names no sites; profile again")
    layout, total, seen = Layout(widths, manifest["dtype"]), 0, set()
    for name, entry in files_of(manifest):
        if not isinstance(name, str) or (name not in TABLES and not _SHARD_NAME.fullmatch(name)) or name in seen:
            raise refuse(f"shard name {_short(name)} is not allowed: it must lie in shards/, be a .safetensors file, "
                         "and be there once")  # fmt: skip
        seen.add(name)
        count(f"the size of {name}", entry["bytes"], 1)
        if not isinstance(entry["sha256"], str) or not _SHA256.fullmatch(entry["sha256"]):
            raise refuse(f"its {MANIFEST} is damaged (the sha256 of {name} is {_short(entry['sha256'])}); "
                         "profile again")  # fmt: skip
    for shard in manifest["shards"]:
        total += count(f"the rows of {shard['file']}", shard["rows"], 1, n_rows)
        if shard["nonfinite"].keys() != widths.keys():
            raise refuse(f"its {MANIFEST} counts values that are not finite at other sites than it has "
                         f"({shard['file']}); profile again")  # fmt: skip
        bad = shard["nonfinite"].values()
        if any(bad) or set(map(type, bad)) != {int}:
            for site, one in shard["nonfinite"].items():
                count(f"nonfinite of {site} in {shard['file']}", one, 0, shard["rows"] * widths[site])
    if total != n_rows:
        raise refuse(f"its shards do not add up to {n_rows} rows but to {total}")
    return layout


def check_folder(folder: Folder, manifest: dict[str, Any]) -> Layout:
    """How the shards are laid out; raises UserError where the files are not those that the manifest describes."""
    layout = check_manifest(f"store {folder.path}", manifest)
    found = folder.scan()
    found |= {f"shards/{name}": entry for name, entry in folder.scan("shards").items()}
    pickles = sorted(name for name in found if name.endswith(PICKLES))
    if pickles:
        raise _pickled(folder, pickles[0])
    for name, entry in files_of(manifest):
        if name not in found:
            raise folder.gone(name)
        if not stat.S_ISREG(found[name].st_mode):
            raise UserError(f"store {folder.path}: {name} is not a regular file; refused")
        if found[name].st_size != entry["bytes"]:
            raise UserError(f"store {folder.path}: {name} has {found[name].st_size} bytes, its {MANIFEST} says "
                            f"{entry['bytes']}; profile again or restore it from a copy")  # fmt: skip
    for shard in manifest["shards"]:
        expected = layout.header(shard["rows"])
        handle = folder.open(shard["file"])
        try:
            head = os.pread(handle, len(expected), 0)
        finally:
            os.close(handle)
        if head != expected or shard["bytes"] != layout.size(shard["rows"]):
            raise _wrong_header(folder, shard, layout, head)
    return layout


def _wrong_header(folder: Folder, shard: dict[str, Any], layout: Layout, head: bytes) -> UserError:
    """What is wrong with a shard that begins otherwise than its manifest says."""
    where = f"store {folder.path}: {shard['file']}"
    if head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")):
        return UserError(f"{where} is a pickle or a zip archive under another name, which is never loaded; refused")
    length = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else -1
    with os.fdopen(folder.open(shard["file"]), "rb") as stream:
        stream.seek(8)
        text = stream.read(length) if 0 < length <= min(shard["bytes"] - 8, 1 << 20) else b""
    try:
        header = {name: one for name, one in json.loads(text).items() if name != "__metadata__"}
        said = {name: (one["dtype"], one["shape"], one["data_offsets"]) for name, one in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return UserError(f"{where} is not a safetensors file; refused")
    wanted = json.loads(layout.header(shard["rows"])[8:])
    meant = {name: (one["dtype"], one["shape"], one["data_offsets"]) for name, one in wanted.items()}
    for name in sorted({*said, *meant}):
        if said.get(name) != meant.get(name):
            return UserError(f"{where}: its header says {said.get(name, 'nothing')!s:.80} of {name:.40}, the manifest "
                             f"means {meant.get(name, 'nothing')!s:.80}; refused")  # fmt: skip
    return UserError(f"{where}: its header is not the one that the manifest means, or is followed by other bytes; "
                     "refused")  # fmt: skip
