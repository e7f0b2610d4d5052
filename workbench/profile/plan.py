"""What a profile will do, known before any forward pass: which tokens, which rows, which blocks, and how many bytes."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..anatomy import check as check_sites
from ..errors import UserError
from ..hashes import json_hash, json_list_hash
from ..progress import progress
from ..prompts import PromptSet
from ..rendering import CHUNK, encode_spans, leading_ids, render, special_ids
from ..sites import Site
from ..store.checks import DTYPES, FORMAT, SCHEMA
from ..tokens import Policy, choose, policy_name
from .arguments import check_arguments
from .spool import Spool, windows

if TYPE_CHECKING:
    from ..models import Model

log = logging.getLogger("workbench")
ROW_DTYPES = {**DTYPES, "float64": torch.float64}  # of the rows of a model that runs in float64, on their way to sums
BLOCK_ROWS = 16384
BLOCK_BYTES = 512 << 20  # of one block, all sites together: what is held in memory, twice
CHUNK_CHARACTERS = 1 << 22  # of the texts that are tokenised at once


@dataclass(frozen=True)
class Block:
    """Sequences [first, last) whose rows [start, start + n) are computed, written and resumed together."""

    first: int
    last: int
    start: int
    n: int


@dataclass(frozen=True, eq=False)
class Plan:
    """A profile before it is run; `n_rows`, `n_tokens` (run through the model) and `n_bytes` say what it costs.

    What it runs are sequences: the prompts, or with a `stride` the windows of those that are too long; see `Spool`.
    Two plans of equal `hash` give equal bytes, so that one can go on where the other stopped.
    """

    prompts: PromptSet
    spool: Spool
    sites: list[Site]
    widths: dict[Site, int]
    dtype: str
    batch_tokens: int
    manifest: dict[str, Any]

    @property
    def hash(self) -> str:
        return str(self.manifest["plan"])

    @property
    def n_rows(self) -> int:
        return self.spool.n_rows

    @property
    def n_tokens(self) -> int:
        return int(self.spool.lengths[self.spool.sequences["n_rows"] > 0].sum())

    @property
    def n_bytes(self) -> int:
        return self.n_rows * self.row_bytes

    @property
    def row_bytes(self) -> int:
        return sum(self.widths.values()) * ROW_DTYPES[self.dtype].itemsize

    @cached_property
    def blocks(self) -> list[Block]:
        limit = max(1, min(BLOCK_ROWS, BLOCK_BYTES // self.row_bytes))
        blocks: list[Block] = []
        first = start = n = 0
        rows = self.spool.sequences["n_rows"].tolist()
        for i, kept in enumerate(rows):
            if n and n + kept > limit:
                blocks.append(Block(first, i, start, n))
                first, start, n = i, start + n, 0
            n += kept
        return [*blocks, Block(first, len(rows), start, n)]

    def batches(self, block: Block) -> Iterator[list[int]]:
        """The sequences of a block in batches of like length, longest first, each padded to at most `batch_tokens`."""
        part = slice(block.first, block.last)
        rows = self.spool.sequences["n_rows"][part].tolist()
        return self.cut([i for i, kept in enumerate(rows, block.first) if kept], self.batch_tokens)

    def cut(self, sequences: list[int], tokens: int) -> Iterator[list[int]]:
        """Sequences in batches of like length, longest first, each padded to at most so many tokens, or of one alone."""
        lengths = dict(zip(sequences, self.spool.lengths[sequences].tolist(), strict=True))
        batch: list[int] = []
        for i in sorted(sequences, key=lambda i: (-lengths[i], i)):
            if batch and (len(batch) + 1) * lengths[batch[0]] > tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def tokens_of(self, block: Block) -> int:
        """The tokens of a block that are run through the model, padding aside."""
        part = slice(block.first, block.last)
        return int(self.spool.lengths[part][self.spool.sequences["n_rows"][part] > 0].sum())

    def prompts_of(self, block: Block) -> np.ndarray:
        """The prompt that each row of a block comes from."""
        part = slice(block.first, block.last)
        return np.repeat(self.spool.sequences["prompt"][part], self.spool.sequences["n_rows"][part])

    def prompt_of(self, row: int) -> int:
        """The prompt that a row comes from."""
        sequence = int(np.searchsorted(self.spool.sequences["first_row"], row, side="right")) - 1
        return int(self.spool.sequences["prompt"][sequence])


def make_plan(
    model: Model,
    prompts: Any,
    *,
    sites: Sequence[Site | str | int] | None = None,
    tokens: Policy = "last",
    batch_tokens: int = 8192,
    dtype: str = "float32",
    max_length: int | None = None,
    stride: int | None = None,
    for_store: bool = True,
) -> Plan:
    """Reads, renders and encodes the prompts and chooses the rows; see `profile_model` for the arguments and errors.

    for_store: False allows rows of float64, which no store holds.
    """
    prompts = PromptSet.load(prompts)
    allowed = DTYPES if for_store else ROW_DTYPES
    check_arguments(sites=sites, tokens=tokens, dtype=dtype, batch_tokens=batch_tokens, dtypes=tuple(allowed))
    if not len(prompts):
        raise UserError(f"{prompts.name}: no prompts to profile; give at least one")
    context = model.max_length
    if max_length is not None and not 1 <= max_length <= context:
        raise UserError(f"max_length={max_length} is not within the model's context of 1 to {context} tokens")
    wanted = range(model.n_layers) if sites is None else sites
    chosen = sorted({model.site(s) for s in wanted}, key=lambda s: (s.point, s.layer))
    if not chosen:
        raise UserError("no sites to profile; give at least one, or leave sites out for every resid_post")
    check_sites(model, chosen)  # before the prompts are read
    dtype = _auto(model, allowed) if dtype == "auto" else dtype
    spool, rendered_hash = _spool(model, prompts, tokens, max_length or context, stride)
    lost = int((spool.prompts["cut"] > 0).sum())
    if lost:
        log.warning("%d of %d prompts are longer than %d tokens and were cut on the left (a chat: of its last turn); "
                    "stride=N (--stride) keeps every token", lost, len(prompts), max_length or context)  # fmt: skip
    if not spool.n_rows:
        raise UserError(
            f"tokens={policy_name(tokens)!r} keeps no token of any prompt in {prompts.name}; choose another policy"
        )
    widths = {site: model.width_of(site) for site in chosen}
    about = {"name": prompts.name, "count": len(prompts), "hash": prompts.hash, "rendered_hash": rendered_hash,
             "max_length": max_length, "truncated": lost}  # fmt: skip
    options = {"tokens": policy_name(tokens), "max_length": max_length, "stride": stride, "batch_tokens": batch_tokens,
               "backend": model.backend.name}  # fmt: skip
    manifest = _manifest(model, about, widths, dtype, options, spool.n_rows)
    # by what the model is: where its files lie, or how their path is spelt, is no other profile
    known = {**manifest, "model": model.fingerprint_id}
    manifest["plan"] = json_hash([known, spool.hash, model.device.type, BLOCK_ROWS, BLOCK_BYTES])
    return Plan(prompts, spool, chosen, widths, dtype, batch_tokens, manifest)


def _auto(model: Model, allowed: Mapping[str, torch.dtype]) -> str:
    name = str(model.dtype).removeprefix("torch.")
    if name in allowed:
        return name
    log.warning("the model is in %s, which a store cannot hold: its rows are kept in float32", name)
    return "float32"


def _spool(model: Model, prompts: PromptSet, tokens: Policy, max_length: int, stride: int | None) -> tuple[Spool, str]:
    """The prompts' tokens and rows, and the hash of their rendered texts; texts are held only while they are read."""
    tokenizer = model.tokenizer
    special, leading, bos = special_ids(tokenizer), leading_ids(tokenizer), tokenizer.bos_token_id
    if stride is not None and not 1 <= stride <= max_length - 1:
        raise UserError(f"stride={stride} is not within 1 to max_length - 1 = {max_length - 1}; give a part of "
                        f"max_length, {max(1, max_length // 2)} say")  # fmt: skip
    spool = Spool()

    def texts() -> Iterator[str]:
        with progress(total=len(prompts), desc="reading the prompts", unit="prompt") as bar:
            for part, rendered in _chunks(prompts, tokenizer):
                encoded = encode_spans(part, tokenizer, max_length=None if stride else max_length, rendered=rendered)
                for prompt, text, one in zip(part, rendered, encoded, strict=True):
                    head = max(len(leading), int(one.ids[0] == bos))
                    if stride is not None and len(one.ids) > max_length and stride > max_length - head:
                        raise UserError(f"stride={stride} leaves tokens out: a window of max_length={max_length} begins "
                                        f"with {head} special tokens; give at most {max_length - head}")  # fmt: skip
                    kept = choose(tokens, one, prompt, text, special)
                    spool.add(one, text, kept, head, windows(len(one.ids), head, max_length, stride))
                    yield text
                bar.update(len(part))

    rendered_hash = json_list_hash(texts())
    return spool, rendered_hash


def _chunks(prompts: PromptSet, tokenizer: Any) -> Iterator[tuple[PromptSet, list[str]]]:
    """Runs of prompts with their rendered texts: not too many of them, and not too long."""
    first, size, rendered = 0, 0, list[str]()
    for i, prompt in enumerate(prompts):
        rendered += render([prompt], tokenizer)
        size += len(rendered[-1])
        if len(rendered) == CHUNK or size >= CHUNK_CHARACTERS or i + 1 == len(prompts):
            yield prompts[first : i + 1], rendered
            first, size, rendered = i + 1, 0, []


def _manifest(
    model: Model, prompts: dict[str, Any], widths: dict[Site, int], dtype: str, options: dict[str, Any], n_rows: int
) -> dict[str, Any]:
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
        "prompts": prompts,
        "template": None if text is None else {"sha256": hashlib.sha256(text.encode()).hexdigest(), "text": text},
        "tokens": options["tokens"],
        "options": options,
        "dtype": dtype,
        "n_rows": n_rows,
        "sites": {str(site): {"width": width} for site, width in widths.items()},
        "versions": {name: version(name) for name in ("torch", "transformers", "safetensors")},
    }  # fmt: skip
