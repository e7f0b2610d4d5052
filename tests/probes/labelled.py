"""Stores of made-up activations with labels that are known: by prompt, by token, by nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.sites import Site
from workbench.store import Store
from workbench.store.staging import write_store


def write_labelled(
    path: Path, values: Mapping[Site, Tensor], *, prompt: Sequence[int] | None = None, contents: Sequence[str] | None = None,
    label: Sequence[str | None] | None = None, meta: Sequence[Mapping[str, Any]] | None = None,
    tokens: Sequence[int] | None = None, texts: Sequence[str] | None = None, weights: str = "w",
) -> Store:  # fmt: skip
    """A store of rows [n, d] at each site.

    prompt: the prompt of each row (each its own unless given); contents, label, meta: of each prompt; tokens, texts: of each
    row; weights: what the model's fingerprint says of its weights.
    """
    import pyarrow as pa

    n = len(next(iter(values.values())))
    of = list(range(n)) if prompt is None else list(prompt)
    count = 1 + max(of)
    said = [f"prompt {i}" for i in range(count)] if contents is None else list(contents)
    ids = [0] * n if tokens is None else list(tokens)
    place = [i - of.index(p) for i, p in enumerate(of)]
    rows = pa.table({
        "row": pa.array(range(n), pa.int64()), "prompt": pa.array(of, pa.int64()), "position": pa.array(place, pa.int32()),
        "token_id": pa.array(ids, pa.int32()), "text": [f"t{i}" for i in ids] if texts is None else list(texts),
    })  # fmt: skip
    lines = [{"index": i, "id": str(i), "text": said[i], "label": None if label is None else label[i],
              "meta": json.dumps({} if meta is None else dict(meta[i])), "content": json.dumps(said[i])}
             for i in range(count)]  # fmt: skip
    schema = pa.schema([("index", pa.int64()), *((k, pa.string()) for k in ("id", "text", "label", "meta", "content"))])
    manifest = {
        "format": "workbench.store", "schema": 2, "basis": "raw", "dtype": "float32", "tokens": "all", "n_rows": n,
        "model": {"name": "m", "family": "f", "n_layers": 1 + max(s.layer for s in values), "width": 8,
                  "fingerprint": {"name": "m", "weights": weights}},
        "prompts": {"name": "p", "count": count, "hash": f"h{count}", "rendered_hash": "r"},
        "sites": {str(site): {"width": x.shape[1]} for site, x in values.items()},
    }  # fmt: skip
    tables = iter([rows]), iter([pa.Table.from_pylist(lines, schema)])
    return write_store(path, "k", manifest, iter([dict(values)]), tables, count=0)


def planted(n: int, d: int, *, gap: float = 2.0, seed: int = 0, classes: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [n, d] of unit noise moved by `gap` along a direction of their class; the classes [n]; the directions [k, d],
    orthonormal (of two classes, the rows of the second are moved along the second and the first stay)."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(d, classes, generator=g)).Q.T
    y = torch.arange(n) % classes
    push = directions[y] if classes > 2 else directions[1] * y[:, None]
    return torch.randn(n, d, generator=g) + gap * push, y, directions
