"""Hashes of values and files: what artefacts and steps are known by."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from .atomic import write_json
from .errors import UserError
from .small_files import read_json

LARGE = 256 << 20
"""bytes of a file of weights that is not read again each time"""
SETTLED = 2.0
"""seconds"""


def json_hash(value: Any) -> str:
    """The sha256 (hex) of a value's canonical JSON: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def json_list_hash(values: Iterable[Any]) -> str:
    """`json_hash(list(values))`, without holding the list's JSON.

    >>> json_list_hash(["a", "b"]) == json_hash(["a", "b"])
    True
    """
    digest = hashlib.sha256(b"[")
    for i, value in enumerate(values):
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        digest.update((("," if i else "") + text).encode("utf-8", "surrogatepass"))
    digest.update(b"]")
    return digest.hexdigest()


def short_hash(value: Any) -> str:
    """The first 12 hex digits of `json_hash`."""
    return json_hash(value)[:12]


def file_hash(path: Path) -> str:
    """The sha256 (hex) of a file. A hub cache names its large files by it, so those are not read again."""
    target = path.resolve()
    if target.parent.name == "blobs" and len(target.name) == 64:
        return target.name
    with target.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def weights_hash(path: Path) -> str:
    """The sha256 (hex) of a file of weights: of a large one that is as it was when it was last read, what was found then.

    What is known stands in `workbench/hashes.json` of the user's cache (XDG_CACHE_HOME): size, inode, and the times of the
    last write and of the last change of the inode, which no program sets back. A file that was written less than
    `SETTLED` seconds before it was read is not kept, since it could change again within one tick of the clock.
    """
    target = path.resolve()
    found = target.stat()
    if found.st_size < LARGE:
        return file_hash(path)
    seen = [found.st_size, found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "workbench" / "hashes.json"
    known = _kept_hashes(kept)
    entry = known.get(str(target))
    if entry and entry[:-1] == seen:
        return str(entry[-1])
    begun = time.time_ns()
    value = file_hash(path)
    if begun - max(found.st_mtime_ns, found.st_ctime_ns) > SETTLED * 1e9:
        with suppress(OSError, UserError):  # a home that cannot be written: it is read again the next time
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, {**_kept_hashes(kept), str(target): [*seen, value]})
    return value


def _kept_hashes(kept: Path) -> dict[str, list[Any]]:
    try:
        known = read_json(kept)
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {path: entry for path, entry in known.items() if isinstance(entry, list) and len(entry) == 6}


def tensor_bytes(value: Any) -> Iterator[bytes]:
    """The bytes of an entry of a state dict: a tensor of any dtype, a packed or quantised one by the tensors that it
    holds, anything else as text. Raises UserError for weights that are not in memory."""
    import torch

    if not isinstance(value, torch.Tensor):
        yield repr(value).encode()
    elif hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield name.encode()
            yield from tensor_bytes(getattr(value, name))
    elif value.is_meta:
        raise UserError(
            "the model's weights are offloaded and cannot be hashed; load it from its folder, whose files are"
        )
    else:
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
