"""What a profile will do, known before any forward pass: which tokens, which rows, which blocks, and how many bytes."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import UserError
from .hashes import json_hash
from .prompts import PromptSet
from .rendering import CHUNK, encode_spans, render, special_ids
from .sites import Site
from .store_checks import DTYPES, FORMAT, SCHEMA
from .tokens import check_tokens, select

if TYPE_CHECKING:
    from .models import Model

log = logging.getLogger("workbench")
BLOCK_ROWS = 16384
BLOCK_BYTES = 512 << 20  # of one block, all sites together: what is held in memory, twice


@dataclass(frozen=True)
class Block:
    """Prompts [first, last) whose rows [start, start + n) are computed, written and resumed together."""

    first: int
    last: int
    start: int
    n: int


@dataclass(frozen=True, eq=False)
class Plan:
    """A profile before it is run; `n_rows`, `n_tokens` (run through the model) and `n_bytes` say what it costs."""

    prompts: PromptSet
    rendered: list[str]
    ids: list[np.ndarray]  # per prompt: its token ids
    positions: list[np.ndarray]  # per prompt: the positions that are kept
    spans: list[np.ndarray]  # per prompt: the characters of those [kept, 2]
    cut: list[int]  # per prompt: tokens lost to truncation
    sites: list[Site]
    width: int
    dtype: str
    batch_tokens: int
    device: str
    manifest: dict[str, Any]

    @property
    def n_rows(self) -> int:
        return sum(len(p) for p in self.positions)

    @property
    def n_tokens(self) -> int:
        return sum(len(i) for i in self.ids)

    @property
    def n_bytes(self) -> int:
        return self.n_rows * self.row_bytes

    @property
    def row_bytes(self) -> int:
        return len(self.sites) * self.width * DTYPES[self.dtype].itemsize

    @property
    def hash(self) -> str:
        """Two runs of equal hash give equal bytes, so that one can go on where the other stopped."""
        return json_hash([self.manifest, self.batch_tokens, self.device, BLOCK_ROWS, BLOCK_BYTES])

    @cached_property
    def blocks(self) -> list[Block]:
        limit = max(1, min(BLOCK_ROWS, BLOCK_BYTES // self.row_bytes))
        blocks: list[Block] = []
        first = start = n = 0
        for i, kept in enumerate(self.positions):
            if n and n + len(kept) > limit:
                blocks.append(Block(first, i, start, n))
                first, start, n = i, start + n, 0
            n += len(kept)
        return [*blocks, Block(first, len(self.positions), start, n)]

    def batches(self, block: Block) -> Iterator[list[int]]:
        """The prompts of a block in batches of like length, longest first, each padded to at most `batch_tokens`."""
        order = [i for i in range(block.first, block.last) if len(self.positions[i])]
        order.sort(key=lambda i: (-len(self.ids[i]), i))
        batch: list[int] = []
        for i in order:
            if batch and (len(batch) + 1) * len(self.ids[batch[0]]) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch


def make_plan(
    model: Model,
    prompts: Any,
    *,
    sites: Sequence[Site | str | int] | None = None,
    tokens: str = "last",
    batch_tokens: int = 8192,
    dtype: str = "float32",
    max_length: int | None = None,
) -> Plan:
    """Reads, renders and encodes the prompts and chooses the rows; see `profile` for the arguments and errors."""
    prompts = PromptSet.load(prompts)
    check_tokens(tokens)
    if not len(prompts):
        raise UserError(f"{prompts.name}: no prompts to profile; give at least one")
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r} of a profile; allowed: auto, {', '.join(DTYPES)}")
    if batch_tokens < 1:
        raise UserError(f"batch_tokens={batch_tokens}: give at least 1 (8192, say)")
    context = model.max_length
    if max_length is not None and not 1 <= max_length <= context:
        raise UserError(f"max_length={max_length} is not within the model's context of 1 to {context} tokens")
    wanted = range(model.n_layers) if sites is None else sites
    chosen = sorted({model.site(s) for s in wanted}, key=lambda s: (s.point, s.layer))
    if not chosen:
        raise UserError("no sites to profile; give at least one, or leave sites out for every resid_post")
    dtype = str(model.dtype).removeprefix("torch.") if dtype == "auto" else dtype
    rendered = render(prompts, model.tokenizer)
    ids, positions, spans, cut = _choose(model, prompts, rendered, tokens, max_length or context)
    lost = sum(c > 0 for c in cut)
    if lost:
        log.warning("%d of %d prompts are longer than %d tokens; the left of their last turn was cut", lost,
                    len(prompts), max_length or context)  # fmt: skip
    n_rows = sum(len(p) for p in positions)
    if not n_rows:
        raise UserError(f"tokens={tokens!r} keeps no token of any prompt in {prompts.name}; choose another policy")
    manifest = _manifest(model, prompts, rendered, chosen, dtype, tokens, n_rows, max_length, lost)
    return Plan(prompts, rendered, ids, positions, spans, cut, chosen, model.width, dtype, batch_tokens,
                model.device.type, manifest)  # fmt: skip


def _choose(model: Model, prompts: PromptSet, rendered: list[str], tokens: str, max_length: int) -> tuple[Any, ...]:
    special = special_ids(model.tokenizer)
    ids, positions, spans, cut = [], [], [], []
    for start in range(0, len(prompts), CHUNK):
        part = slice(start, start + CHUNK)
        for one in encode_spans(prompts[part], model.tokenizer, max_length=max_length, rendered=rendered[part]):
            kept = select(tokens, one.ids, [i in special for i in one.ids])
            ids.append(np.array(one.ids, dtype=np.int32))
            positions.append(np.array(kept, dtype=np.int32))
            spans.append(np.array([one.spans[i] for i in kept], dtype=np.int32).reshape(-1, 2))
            cut.append(one.cut)
    return ids, positions, spans, cut


def _manifest(
    model: Model, prompts: PromptSet, rendered: list[str], sites: list[Site], dtype: str, tokens: str, n_rows: int,
    max_length: int | None, lost: int,
) -> dict[str, Any]:  # fmt: skip
    template = getattr(model.tokenizer, "chat_template", None)
    text = template if isinstance(template, str) or template is None else json.dumps(template, sort_keys=True)
    return {
        "format": FORMAT,
        "schema": SCHEMA,
        "basis": "raw",
        "model": {
            "name": model.name, "family": model.family, "n_layers": model.n_layers, "width": model.width,
            "fingerprint": dict(model.fingerprint), "fingerprint_id": model.fingerprint_id,
        },
        "prompts": {
            "name": prompts.name, "count": len(prompts), "hash": prompts.hash, "rendered_hash": json_hash(rendered),
            "max_length": max_length, "truncated": lost,
        },
        "template": None if text is None else {"sha256": hashlib.sha256(text.encode()).hexdigest(), "text": text},
        "tokens": tokens,
        "dtype": dtype,
        "n_rows": n_rows,
        "sites": {str(site): {"width": model.width} for site in sites},
        "versions": {name: version(name) for name in ("torch", "transformers", "safetensors")},
    }  # fmt: skip


def write_tables(plan: Plan, tokenizer: Any, folder: Path) -> None:
    """Writes rows.parquet and prompts.parquet, a row group for each block."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = _TokenText(tokenizer)
    rows = pa.schema([("row", pa.int64()), ("prompt", pa.int64()), ("position", pa.int32()), ("token_id", pa.int32()),
                      ("text", pa.string()), ("char_start", pa.int32()), ("char_end", pa.int32())])  # fmt: skip
    with pq.ParquetWriter(folder / "rows.parquet", rows) as writer:
        for block in plan.blocks:
            part = range(block.first, block.last)
            prompt = np.concatenate([np.full(len(plan.positions[i]), i) for i in part])
            position = np.concatenate([plan.positions[i] for i in part])
            token = np.concatenate([plan.ids[i][plan.positions[i]] for i in part])
            span = np.concatenate([plan.spans[i] for i in part])
            where = zip(prompt.tolist(), token.tolist(), span.tolist(), strict=True)
            text = [texts(plan.rendered[i], t, start, end) for i, t, (start, end) in where]
            row = np.arange(block.start, block.start + block.n)
            columns = [row, prompt, position, token, text, span[:, 0], span[:, 1]]
            arrays = [pa.array(c, type=kind) for c, kind in zip(columns, rows.types, strict=True)]
            writer.write_table(pa.table(arrays, schema=rows))
    prompts = pa.schema([("index", pa.int64()), ("id", pa.string()), ("text", pa.string()), ("label", pa.string()),
                         ("meta", pa.string()), ("content", pa.string()), ("n_tokens", pa.int32()),
                         ("cut", pa.int32())])  # fmt: skip
    with pq.ParquetWriter(folder / "prompts.parquet", prompts) as writer:
        for block in plan.blocks:
            lines = [_prompt_row(plan, i) for i in range(block.first, block.last)]
            writer.write_table(pa.Table.from_pylist(lines, prompts))


def _prompt_row(plan: Plan, i: int) -> dict[str, Any]:
    prompt = plan.prompts[i]
    meta = json.dumps(prompt.meta, sort_keys=True, ensure_ascii=False)
    content = json.dumps(prompt.content, ensure_ascii=False)
    return {"index": i, "id": prompt.id, "text": plan.rendered[i], "label": prompt.label, "meta": meta,
            "content": content, "n_tokens": len(plan.ids[i]), "cut": plan.cut[i]}  # fmt: skip


class _TokenText:
    """The text of a token: the characters that it covers, or what it decodes to where it covers none."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.known = tokenizer, dict[int, str]()

    def __call__(self, rendered: str, token: int, start: int, end: int) -> str:
        if end > start >= 0:
            return rendered[start:end]
        if token not in self.known:
            self.known[token] = self.tokenizer.decode([token])
        return self.known[token]
