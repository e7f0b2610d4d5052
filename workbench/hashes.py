"""Hashes of values and files: what artefacts and steps are known by."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def json_hash(value: Any) -> str:
    """The sha256 (hex) of a value's canonical JSON: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


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
