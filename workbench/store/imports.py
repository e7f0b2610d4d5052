"""Stores made of activations that others saved: what their files do not say is marked unknown, never guessed."""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..hashes import file_hash, json_hash
from ..prompts import PromptSet
from ..sites import Site
from .checks import FORMAT, MANIFEST, MOMENTS, SCHEMA
from .shards import DTYPES
from .staging import GROUP_ROWS, TARGET_BYTES, write_store
from .store import Store

log = logging.getLogger("workbench")
UNKNOWN = "unknown"
PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".joblib")
FORMATS = ("auto", "command-v", "saelens")
LAYER = re.compile(r"model\.layers\.(\d+)")


@dataclass(frozen=True)
class Source(ABC):
    """Activations in somebody's file: what it says of them, and how to read them. Row i is of prompt i // per_prompt."""

    kind: str
    path: Path
    widths: dict[Site, int]
    n_prompts: int
    dtype: str
    hash: str
    """Of the source's files."""
    per_prompt: int = 1
    model: str = UNKNOWN
    n_layers: int | None = None
    basis: str = UNKNOWN
    tokens: str = UNKNOWN
    positions: tuple[int, ...] | None = None
    """Of the rows of each prompt, where they are known."""
    notes: dict[str, Any] = field(default_factory=dict)

    @abstractmethod
    def read(self, start: int, stop: int) -> dict[Site, Tensor]:
        """The rows [(stop - start) * per_prompt, d] of prompts [start, stop) at each site."""

    def token_ids(self, start: int, stop: int) -> list[int] | None:
        """The token of each of those rows, where they are known."""
        return None


def import_store(
    source: str | Path,
    out: str | Path,
    *,
    format: str = "auto",
    prompts: Any = None,
    model: str | None = None,
    overwrite: bool = False,
) -> Store:
    """A store at `out` of activations that another program saved; rows are streamed, memory stays flat.

    format: `command-v`, a profile of Command-V (safetensors with a tensor `model.layers.i` [prompts, d] for each layer:
        the last token of each prompt at resid_post.i); `saelens`, a folder of SAELens' CacheActivationsRunner (a
        Hugging Face dataset with a column [context, d] named by its hook, and `token_ids` in newer ones: every
        context is a prompt of the store); `auto` tells them apart.
    prompts: the prompts of a Command-V profile, in order, as `PromptSet.load` reads them; without them the store has
        rows but no texts, and pairs with no other.
    model: the name of the model, where the source does not say it.
    What the source does not say stays unknown: the model's fingerprint is empty, `source.unknown` in the manifest
    lists the rest. Values that are NaN or infinite are counted and kept.
    Raises UserError for a source of no such format, for pickles and archives (never loaded, whatever they are called),
    for tensors that do not fit together, and where `out` exists (unless `overwrite`) or cannot be written.
    """
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r} of activations; allowed: {', '.join(FORMATS)}")
    path = Path(source).expanduser()
    kind = _kind(path) if format == "auto" else format
    if kind == "saelens":
        from .saelens import open_saelens

        if prompts is not None:
            raise UserError("prompts belong to a Command-V profile: a SAELens cache holds contexts cut from a stream of "
                            "text; leave them out")  # fmt: skip
        found: Source = open_saelens(path)
    else:
        from .command_v import open_command_v

        found = open_command_v(path)
    known = None if prompts is None else PromptSet.load(prompts)
    if known is not None and len(known) != found.n_prompts:
        raise UserError(f"{path} holds {found.n_prompts} prompts and {known.name} {len(known)}; give the prompts that "
                        "it was made of, in their order")  # fmt: skip
    return _write(found, out, known, model or found.model, overwrite)


def _kind(path: Path) -> str:
    if path.is_dir():
        _check_folder(path)
        return "saelens"
    check_no_pickle(path)
    if path.suffix == ".safetensors":
        return "command-v"
    raise UserError(f"{path}: is neither a .safetensors file (a Command-V profile) nor a folder (a SAELens cache); give "
                    "one of these")  # fmt: skip


def _check_folder(path: Path) -> None:
    """Says of a folder that holds no dataset what it is instead."""
    names = sorted(entry.name for entry in path.iterdir())
    tensors = [name for name in names if name.endswith(".safetensors")]
    if "state.json" in names:
        return
    if MANIFEST in names or MOMENTS in names:
        what, do = ("a store", "Store.open") if MANIFEST in names else ("a folder of moments", "load_moments")
        raise UserError(f"{path}: is {what} already, as its {MANIFEST if MANIFEST in names else MOMENTS} says; open it "
                        f"with workbench.{do}")  # fmt: skip
    if tensors:
        more = f" and {len(tensors) - 3} more" if len(tensors) > 3 else ""
        raise UserError(f"{path}: is a folder of {', '.join(tensors[:3])}{more}; a Command-V profile is one such file: "
                        f"give {path / tensors[0]}")  # fmt: skip
    raise UserError(f"{path}: has no state.json, so it is no dataset that SAELens saved, and holds no .safetensors file; "
                    "give the folder or the file that holds the activations")  # fmt: skip


def check_no_pickle(path: Path) -> None:
    """Raises UserError for a file that is missing, or is a pickle or an archive whatever it is called."""
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder; give the activations to import")
    with path.open("rb") as stream:
        head = stream.read(9)
    # a safetensors file whose header has 640 bytes begins as a pickle does
    safe = head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size
    pickled = (head[:1] == b"\x80" and head[1:2] <= b"\x05") or head[:2] == b"PK"
    if path.suffix.lower() in PICKLED or (pickled and not safe):
        raise UserError(f"{path}: is a pickle or an archive, which can run code and is never loaded; save its tensors "
                        "with safetensors and import that")  # fmt: skip


def _write(source: Source, out: str | Path, prompts: PromptSet | None, model: str, overwrite: bool) -> Store:
    row_bytes = sum(source.widths.values()) * DTYPES[source.dtype].itemsize * source.per_prompt
    step = max(1, min(TARGET_BYTES // row_bytes, GROUP_ROWS // source.per_prompt))
    starts = range(0, source.n_prompts, step)
    spans = [(start, min(start + step, source.n_prompts)) for start in starts]
    manifest = _manifest(source, prompts, model)
    key = json_hash([source.kind, source.hash, manifest["prompts"]["hash"], model, step])
    tables = _row_tables(source, spans), _prompt_tables(source, spans, prompts)
    blocks = (source.read(*span) for span in spans)
    store = write_store(out, key, manifest, blocks, tables, count=len(spans), overwrite=overwrite, doing="importing")
    bad = {site: sum(s["nonfinite"][site] for s in store.shards) for site in map(str, store.sites)}
    for site, count in bad.items():
        if count:
            log.warning("%s: %d values of %s are NaN or infinite", store.path, count, site)
    return store


def _manifest(source: Source, prompts: PromptSet | None, model: str) -> dict[str, Any]:
    unknown = ["fingerprint", "template", "versions"]
    unknown += [name for name, value in (("model", model), ("basis", source.basis), ("tokens", source.tokens))
                if value == UNKNOWN]  # fmt: skip
    unknown += [name for name, value in (("n_layers", source.n_layers), ("prompts", prompts)) if value is None]
    # a hash of nothing that is known is equal to no other, so that such a store pairs with none but itself
    nothing = f"{UNKNOWN}:{source.hash}"
    n_layers = source.n_layers or max(site.layer for site in source.widths) + 1
    return {
        "format": FORMAT,
        "schema": SCHEMA,
        "basis": source.basis,
        "model": {
            "name": model, "family": UNKNOWN, "n_layers": n_layers, "width": max(source.widths.values()),
            "fingerprint": {}, "fingerprint_id": UNKNOWN,
        },
        "prompts": {
            "name": source.path.name if prompts is None else prompts.name, "count": source.n_prompts,
            "hash": nothing if prompts is None else prompts.hash, "rendered_hash": nothing, "max_length": None,
            "truncated": 0,
        },
        "template": None,
        "tokens": source.tokens,
        "dtype": source.dtype,
        "n_rows": source.n_prompts * source.per_prompt,
        "sites": {str(site): {"width": width} for site, width in source.widths.items()},
        "versions": {name: version(name) for name in ("torch", "safetensors")},
        "plan": None,
        "options": {},
        "source": {"kind": source.kind, "name": source.path.name, "sha256": source.hash, "unknown": sorted(unknown),
                   **source.notes},
    }  # fmt: skip


def _row_tables(source: Source, spans: list[tuple[int, int]]) -> Iterator[Any]:
    import numpy as np
    import pyarrow as pa

    schema = pa.schema([("row", pa.int64()), ("prompt", pa.int64()), ("position", pa.int32()), ("token_id", pa.int32()),
                        ("text", pa.string()), ("char_start", pa.int32()), ("char_end", pa.int32())])  # fmt: skip
    for start, stop in spans:
        prompt = np.repeat(np.arange(start, stop), source.per_prompt)
        row = np.arange(start * source.per_prompt, stop * source.per_prompt)
        nothing = [None] * len(row)
        position = nothing if source.positions is None else list(source.positions) * (stop - start)
        columns = [row, prompt, position, source.token_ids(start, stop) or nothing, nothing, nothing, nothing]
        yield pa.table([pa.array(c, type=f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)


def _prompt_tables(source: Source, spans: list[tuple[int, int]], prompts: PromptSet | None) -> Iterator[Any]:
    import json

    import pyarrow as pa

    schema = pa.schema([("index", pa.int64()), ("id", pa.string()), ("text", pa.string()), ("label", pa.string()),
                        ("meta", pa.string()), ("content", pa.string()), ("n_tokens", pa.int32()),
                        ("cut", pa.int32())])  # fmt: skip
    for start, stop in spans:
        lines = []
        for i in range(start, stop):
            line: dict[str, Any] = {"index": i, "id": str(i), "meta": "{}"}
            if prompts is not None:
                meta = json.dumps(prompts[i].meta, sort_keys=True, ensure_ascii=False)
                content = json.dumps(prompts[i].content, ensure_ascii=False)
                line |= {"id": prompts[i].id, "label": prompts[i].label, "meta": meta, "content": content}
            lines.append(line)
        yield pa.Table.from_pylist(lines, schema)


def source_hash(files: list[Path]) -> str:
    """The sha256 of a file, or of those of several files."""
    hashes = [file_hash(file) for file in files]
    return hashes[0] if len(hashes) == 1 else json_hash(hashes)
