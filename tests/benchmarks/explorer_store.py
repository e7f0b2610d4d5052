"""A large store to look at, written quickly: labelled prompts of a hundred tokens, rows with a plane of topics in them.

`python -m tests.benchmarks.explorer_store FOLDER [ROWS [WIDTH [SITES]]]` writes one of 10^6 rows x 2,304 in bfloat16 (4.6 GB
for each site), whole by `workbench stores verify`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from workbench.prompts import Prompt, PromptSet
from workbench.sites import Site
from workbench.store import Store
from workbench.store.staging import write_store

TOKENS = 100
"""of a prompt"""
BLOCK = 16_384
TOPICS = ("river", "market", "storm", "garden", "engine")
WORDS = 2000
ROWS_SCHEMA = pa.schema([("row", pa.int64()), ("prompt", pa.int64()), ("position", pa.int32()), ("token_id", pa.int32()),
                         ("text", pa.string()), ("char_start", pa.int32()), ("char_end", pa.int32())])  # fmt: skip
PROMPTS_SCHEMA = pa.schema([("index", pa.int64()), *((k, pa.string()) for k in ("id", "text", "label", "meta", "content")),
                            ("n_tokens", pa.int32()), ("cut", pa.int32())])  # fmt: skip


def make_explorer_store(path: Path, n_rows: int = 1_000_000, width: int = 2304, n_sites: int = 1) -> Store:
    """Writes it and opens it: rows are noise, plus a direction for each topic, plus one that rises with the position; the
    first token of a prompt has a massive activation in dimension 7, and dimension 11 is an outlier everywhere."""
    count = -(-n_rows // TOKENS)
    words = np.array([f"w{i}" for i in range(WORDS)], dtype=object)
    token = np.random.default_rng(0).zipf(1.3, n_rows) % WORDS
    texts = [" ".join(words[token[i * TOKENS : (i + 1) * TOKENS]]) for i in range(count)]
    prompts = PromptSet(
        tuple(Prompt(None, t, f"p{i}", TOPICS[i % len(TOPICS)], {"part": i % 2}) for i, t in enumerate(texts)),
        "generated",
    )
    sites = [Site(layer) for layer in range(n_sites)]
    model = {
        "name": "generated",
        "family": "none",
        "n_layers": n_sites,
        "width": width,
        "fingerprint": {"tokenizer": "t"},
    }
    manifest = {
        "format": "workbench.store", "schema": 2, "basis": "raw", "dtype": "bfloat16", "tokens": "all", "n_rows": n_rows,
        "model": model,
        "prompts": {"name": "generated", "count": count, "hash": prompts.hash, "rendered_hash": prompts.hash},
        "sites": {str(site): {"width": width} for site in sites},
    }  # fmt: skip
    tables = _row_groups(token, words), iter([_prompt_table(prompts)])
    blocks = _blocks(n_rows, width, sites)
    return write_store(
        path, f"explorer {n_rows} {width} {n_sites}", manifest, blocks, tables, count=-(-n_rows // BLOCK)
    )


def _blocks(n_rows: int, width: int, sites: list[Site]) -> Iterator[dict[Site, Tensor]]:
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(BLOCK + 512, width, generator=g).bfloat16()
    topics = (3 * torch.randn(len(TOPICS), width, generator=g) / width**0.5 * 8).bfloat16()
    rise = (torch.randn(width, generator=g) / width**0.5 / 4).bfloat16()
    for start in range(0, n_rows, BLOCK):
        row = torch.arange(start, min(start + BLOCK, n_rows))
        prompt, position = row // TOKENS, row % TOKENS
        shift = int(torch.randint(512, (), generator=g))
        x = noise[shift : shift + len(row)] + topics[prompt % len(TOPICS)]
        x += position[:, None].bfloat16() * rise
        x[:, 11] += 30
        x[position == 0, 7] = 4000.0
        yield {site: x * (1 + 0.1 * site.layer) if site.layer else x for site in sites}


def _row_groups(token: np.ndarray, words: np.ndarray) -> Iterator[Any]:
    """The lines of rows.parquet, a row group for each block."""
    length = np.array([len(word) for word in words])[token]
    prompt = np.arange(len(token)) // TOKENS
    ends = np.cumsum(length + 1)
    before = np.concatenate([[0], ends])[prompt * TOKENS]  # of the prompt's first token
    for at in range(0, len(token), BLOCK):
        s = slice(at, at + BLOCK)
        end = ends[s] - 1 - before[s]
        columns = [np.arange(len(token))[s], prompt[s], np.arange(len(token))[s] % TOKENS, token[s], words[token[s]],
                   end - length[s], end]  # fmt: skip
        yield pa.table([pa.array(c, f.type) for c, f in zip(columns, ROWS_SCHEMA, strict=True)], schema=ROWS_SCHEMA)


def _prompt_table(prompts: PromptSet) -> Any:
    return pa.Table.from_pylist(
        [{"index": i, "id": p.id, "text": p.text, "label": p.label, "meta": json.dumps(p.meta),
          "content": json.dumps(p.content), "n_tokens": TOKENS, "cut": 0} for i, p in enumerate(prompts)],
        PROMPTS_SCHEMA,
    )  # fmt: skip


if __name__ == "__main__":
    folder, *numbers = sys.argv[1:]
    made = make_explorer_store(Path(folder), *map(int, numbers))
    sys.stderr.write(f"{made}\n")
