"""Hashes of values and files: what artefacts and steps are known by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .errors import UserError


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
