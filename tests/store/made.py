"""Stores whose prompts, tokens and activations a test chose: a word is a token."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.prompts import Prompt, PromptSet
from workbench.sites import Site
from workbench.store import Store
from workbench.store.staging import write_store


def made_store(
    path: Path,
    values: Mapping[Site, Tensor],
    texts: Sequence[str],
    *,
    labels: Sequence[str | None] | None = None,
    metas: Sequence[dict[str, Any]] | None = None,
    group: int = 1 << 14,
    shard: int = 1 << 14,
    skip: int = 0,
    model: str = "m",
    tokenizer: str = "t",
) -> Store:
    """A store with a row for each word of each text (but the first `skip`), in row groups and shards of so many rows."""
    import pyarrow as pa

    prompts = PromptSet(
        tuple(Prompt(None, text, f"id{i}", labels[i] if labels else None) for i, text in enumerate(texts)), "made"
    )
    lines = [(i, j, m) for i, text in enumerate(texts) for j, m in enumerate(re.finditer(r"\S+", text)) if j >= skip]
    n = len(lines)
    words: dict[str, int] = {}
    rows = pa.table({
        "row": pa.array(range(n), pa.int64()), "prompt": pa.array([i for i, _, _ in lines], pa.int64()),
        "position": pa.array([j for _, j, _ in lines], pa.int32()),
        "token_id": pa.array([words.setdefault(m[0], len(words)) for _, _, m in lines], pa.int32()),
        "text": [m[0] for _, _, m in lines], "char_start": pa.array([m.start() for _, _, m in lines], pa.int32()),
        "char_end": pa.array([m.end() for _, _, m in lines], pa.int32()),
    })  # fmt: skip
    schema = pa.schema([("index", pa.int64()), *((k, pa.string()) for k in ("id", "text", "label", "meta", "content")),
                        ("n_tokens", pa.int32()), ("cut", pa.int32())])  # fmt: skip
    table = pa.Table.from_pylist(
        [{"index": i, "id": p.id, "text": p.text, "label": p.label, "meta": json.dumps(metas[i] if metas else {}),
          "content": json.dumps(p.content), "n_tokens": len(str(p.text).split()), "cut": 0} for i, p in enumerate(prompts)],
        schema,
    )  # fmt: skip
    dtype = str(next(iter(values.values())).dtype).removeprefix("torch.")
    manifest = {
        "format": "workbench.store", "schema": 2, "basis": "raw", "dtype": dtype, "tokens": "all", "n_rows": n,
        "model": {"name": model, "family": "f", "n_layers": 1 + max(s.layer for s in values), "width": 8,
                  "fingerprint": {"tokenizer": tokenizer}},
        "prompts": {"name": "made", "count": len(texts), "hash": prompts.hash, "rendered_hash": "r"},
        "sites": {str(site): {"width": x.shape[1]} for site, x in values.items()},
    }  # fmt: skip
    groups = (rows.slice(at, group) for at in range(0, n, group))
    return write_store(path, "made", manifest, _blocks(values, n, shard), (groups, iter([table])), count=0)


def _blocks(values: Mapping[Site, Tensor], n: int, shard: int) -> Iterator[dict[Site, Tensor]]:
    for at in range(0, n, shard):
        yield {site: x[at : min(at + shard, n)] for site, x in values.items()}


def noise(n: int, d: int, seed: int = 0) -> Tensor:
    """Standard normal rows [n, d]."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
