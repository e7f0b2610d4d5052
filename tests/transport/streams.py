"""Stores of made-up residual streams, whose transport is known."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from workbench.prompts import PromptSet
from workbench.sites import Site
from workbench.store import Store
from workbench.store.staging import write_store


def write_stream(path: Path, values: Mapping[Site, Tensor], per_prompt: int, *, start: int = 1) -> Store:
    """A store of rows [n, d] at each site: n / per_prompt prompts, positions from `start` on."""
    import pyarrow as pa

    n = len(next(iter(values.values())))
    n_prompts = n // per_prompt
    prompts = PromptSet.load([f"w{i}" for i in range(n_prompts)])
    rows = pa.table({
        "row": pa.array(range(n), pa.int64()), "prompt": pa.array([i // per_prompt for i in range(n)], pa.int64()),
        "position": pa.array([start + i % per_prompt for i in range(n)], pa.int32()),
        "token_id": pa.array([7] * n, pa.int32()), "text": ["t"] * n,
    })  # fmt: skip
    lines = [{"index": i, "id": p.id, "text": p.user, "label": p.label, "meta": "{}", "content": json.dumps(p.content)}
             for i, p in enumerate(prompts)]  # fmt: skip
    schema = pa.schema([("index", pa.int64()), *((k, pa.string()) for k in ("id", "text", "label", "meta", "content"))])
    layers = 1 + max(site.layer for site in values)
    manifest = {
        "format": "workbench.store", "schema": 2, "basis": "raw", "dtype": "float32", "tokens": "all", "n_rows": n,
        "model": {"name": "m", "family": "f", "n_layers": layers, "width": 8, "fingerprint": {"tokenizer": "t"}},
        "prompts": {"name": "p", "count": n_prompts, "hash": prompts.hash, "rendered_hash": "r"},
        "sites": {str(site): {"width": x.shape[1]} for site, x in values.items()},
    }  # fmt: skip
    tables = iter([rows]), iter([pa.Table.from_pylist(lines, schema)])
    return write_store(path, "k", manifest, iter([dict(values)]), tables, count=0)


def stream(n: int = 4000, d: int = 8, layers: int = 3, *, noise: float = 0.5, seed: int = 0) -> dict[Site, Tensor]:
    """h_0 standard normal, h_(l+1) = h_l A + noise e with A orthogonal.

    R2 of l to m is (1 + l noise^2) / (1 + m noise^2).
    """
    g = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(d, d, generator=g)).Q
    h = [torch.randn(n, d, generator=g)]
    for _ in range(layers - 1):
        h.append(h[-1] @ turn + noise * torch.randn(n, d, generator=g))
    return {Site(layer): x for layer, x in enumerate(h)}
