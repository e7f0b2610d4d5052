"""The tables of a store: which prompt, token and characters each row comes from, and what each prompt was."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ..store.checks import TABLES
from ..store.tables import dictionary_of
from .plan import Plan

PROMPTS_AT_ONCE = 4096  # of a row group of prompts.parquet


def write_tables(plan: Plan, tokenizer: Any, folder: Path) -> None:
    """Writes rows.parquet, a row group for each block, and prompts.parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = _TokenText(plan, tokenizer)
    rows = pa.schema([("row", pa.int64()), ("prompt", pa.int64()), ("position", pa.int32()), ("token_id", pa.int32()),
                      ("text", pa.string()), ("char_start", pa.int32()), ("char_end", pa.int32())])  # fmt: skip
    with pq.ParquetWriter(folder / TABLES[0], rows) as writer:
        for block in plan.blocks:
            prompt, position, token, span = plan.spool.rows(block.start, block.n)
            row = np.arange(block.start, block.start + block.n)
            columns = [row, prompt, position, token, texts(prompt, token, span), span[:, 0], span[:, 1]]
            arrays = [pa.array(c, type=kind) for c, kind in zip(columns, rows.types, strict=True)]
            writer.write_table(pa.table(arrays, schema=rows))
    prompts = pa.schema([("index", pa.int64()), ("id", pa.string()), ("text", pa.string()), ("label", pa.string()),
                         ("meta", pa.string()), ("content", pa.string()), ("n_tokens", pa.int32()),
                         ("cut", pa.int32())])  # fmt: skip
    with pq.ParquetWriter(
        folder / TABLES[1], prompts, use_dictionary=dictionary_of(TABLES[1], prompts.names)
    ) as writer:
        for first in range(0, len(plan.prompts), PROMPTS_AT_ONCE):
            some = range(first, min(first + PROMPTS_AT_ONCE, len(plan.prompts)))
            writer.write_table(pa.Table.from_pylist([_prompt_row(plan, i) for i in some], prompts))


def _prompt_row(plan: Plan, i: int) -> dict[str, Any]:
    prompt, about = plan.prompts[i], plan.spool.prompts
    meta = json.dumps(prompt.meta, sort_keys=True, ensure_ascii=False)
    content = json.dumps(prompt.content, ensure_ascii=False)
    return {"index": i, "id": prompt.id, "text": plan.spool.text(i), "label": prompt.label, "meta": meta,
            "content": content, "n_tokens": int(about["n_ids"][i]), "cut": int(about["cut"][i])}  # fmt: skip


class _TokenText:
    """The texts of tokens: the characters that each covers, or what it decodes to where it covers none."""

    def __init__(self, plan: Plan, tokenizer: Any) -> None:
        self.plan, self.tokenizer, self.known = plan, tokenizer, dict[int, str]()

    def __call__(self, prompt: np.ndarray, token: np.ndarray, span: np.ndarray) -> list[str]:
        found = []
        lines = zip(prompt.tolist(), token.tolist(), span.tolist(), strict=True)
        for number, mine in groupby(lines, key=lambda line: line[0]):
            text = self.plan.spool.text(number)
            found += [text[a:b] if b > a >= 0 else self._decoded(t) for _, t, (a, b) in mine]
        return found

    def _decoded(self, token: int) -> str:
        if token not in self.known:
            self.known[token] = self.tokenizer.decode([token])
        return self.known[token]
