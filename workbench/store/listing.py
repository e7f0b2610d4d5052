"""What stores there are and what they hold, read from their manifests: for people (`workbench stores ls`) and programs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..sites import Site
from ..small_files import read_json
from .checks import FORMAT, MANIFEST, MANIFEST_BYTES, MOMENTS, MOMENTS_FORMAT, TABLES
from .leftovers import size_of, target_of
from .locks import is_held
from .store import Store


@dataclass(frozen=True)
class Listed:
    """A line of `find_stores`. `state`: whole (it opens; checksums are for `verify`), unfinished, damaged, or moments."""

    path: Path
    state: str
    note: str = ""
    """What is wrong with it, or how far it has come."""
    model: str = ""
    prompts: str = ""
    rows: int = 0
    sites: list[str] = field(default_factory=list)
    tokens: str = ""
    dtype: str = ""
    n_bytes: int = 0
    age: float = 0.0
    """Seconds since it was finished, or last written to."""


def compact_sites(sites: Iterable[Site | str | int]) -> str:
    """Sites as people read them: runs of layers, point by point.

    >>> compact_sites(["resid_post.0", "resid_post.1", "resid_post.2", "mlp_out.7", "resid_post.5"])
    'mlp_out.7, resid_post.0-2,5'
    """
    layers: dict[str, list[int]] = {}
    for site in sorted({Site.parse(s) for s in sites}, key=lambda s: (s.point, s.layer)):
        layers.setdefault(site.point, []).append(site.layer)
    return ", ".join(f"{point}.{_runs(found)}" for point, found in layers.items())


def _runs(layers: list[int]) -> str:
    cuts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(layers)) if b != a + 1), len(layers)]
    runs = [layers[a:b] for a, b in pairwise(cuts)]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def find_stores(folder: str | Path = ".") -> list[Listed]:
    """The stores below a folder, by path; also unfinished and damaged ones, and folders of moments. Links are not followed.

    Raises UserError where there is no such folder.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the one that holds your stores")
    found = []
    for root, folders, files in os.walk(folder):
        listed = listed_at(Path(root), set(folders) | set(files))
        if listed is not None:
            found.append(listed)
            folders.clear()
        folders.sort()
    return sorted(found, key=lambda one: one.path)


def listed_at(path: Path, names: set[str]) -> Listed | None:
    """The store, unfinished store or moments in this very folder, which holds `names`; None where it is none of them."""
    target = target_of(path)
    if target is not None:
        return _unfinished(path, target)
    if MANIFEST not in names and MOMENTS in names:
        return _moments(path)
    if MANIFEST not in names:
        if {"shards", *TABLES} <= names:
            return Listed(path, "damaged", f"has no {MANIFEST}", n_bytes=size_of(path), age=_age(path))
        return None
    try:
        manifest = read_json(path / MANIFEST, MANIFEST_BYTES)
    except (ValueError, OSError):
        manifest = {"format": FORMAT} if names & {"shards", *TABLES} else None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return None
    try:
        store = Store.open(path)
    except UserError as err:
        note = str(err).removeprefix(f"store {path}: ")
        return Listed(path, "damaged", note, n_bytes=size_of(path), age=_age(path / MANIFEST))
    return Listed(
        path, "whole", "", store.name, str(store.manifest["prompts"]["name"]), store.n_rows,
        [str(s) for s in store.sites], store.tokens, store.dtype, size_of(path), _age(path / MANIFEST),
    )  # fmt: skip


def _moments(path: Path) -> Listed | None:
    """A folder of `profile_moments`; None where its file says that it is something else."""
    try:
        about = read_json(path / MOMENTS, MANIFEST_BYTES)
        if about["format"] != MOMENTS_FORMAT:
            return None
        told = (str(about["model"]["name"]), str(about["prompts"]["name"]), int(about["n_rows"]),
                sorted(map(str, about["sites"])), str(about["tokens"]), "moments")  # fmt: skip
    except (ValueError, OSError, KeyError, TypeError, OverflowError):
        return None
    return Listed(path, "moments", "open it with workbench.load_moments", *told, size_of(path), _age(path / MOMENTS))


def _unfinished(path: Path, target: Path) -> Listed:
    journal = path / "journal.jsonl"
    blocks = max(0, len(journal.read_bytes().splitlines()) - 1) if journal.is_file() else 0
    note = f"{blocks} block{'' if blocks == 1 else 's'} of {target.name}"
    if is_held(path):
        note += ", being written"
    elif (path / "old").exists() and not target.exists():
        note += f"; stopped while it replaced {target.name}: run `workbench stores repair {target}`"
    else:
        note += "; run the same profile again to go on"
    return Listed(path, "unfinished", note, n_bytes=size_of(path), age=_age(journal if blocks else path))


def _age(path: Path) -> float:
    return max(0.0, time.time() - path.stat().st_mtime)


def describe_store(path: str | Path, *, prompt: int | None = None, rows: int = 5) -> dict[str, Any]:
    """What a store holds, as plain values: `manifest` (without its lists of files and the text of the template),
    `n_bytes`, `n_shards`, `nonfinite` (how many values of each site are NaN or infinite) and `rows`, the first few or
    those of one prompt (then also `prompt`).

    prompt: the index of a prompt. rows: the most rows to show.
    Raises UserError for what `Store.open` refuses, and for a prompt that the store does not have.
    """
    with Store.open(path) as store:
        hidden = ("shards", "tables", "checksum", "format", "template")
        manifest = {k: v for k, v in store.manifest.items() if k not in hidden}
        template = store.manifest.get("template")
        manifest["template"] = None if template is None else template["sha256"]
        nonfinite = {str(site): 0 for site in store.sites}
        for shard in store.shards:
            for site, count in shard["nonfinite"].items():
                nonfinite[site] += count
        shown: dict[str, Any] = {
            "path": str(store.path), "manifest": manifest, "n_bytes": store.n_bytes, "n_shards": len(store.shards),
            "nonfinite": nonfinite,
        }  # fmt: skip
        if prompt is not None:
            shown["prompt"] = _prompt(store, prompt)
        return {**shown, "rows": _rows(store, prompt, rows)}


def _prompt(store: Store, prompt: int) -> dict[str, Any]:
    count = store.manifest["prompts"]["count"]
    if not 0 <= prompt < count:
        raise UserError(f"store {store.path} has prompts 0 to {count - 1}; got {prompt}")
    return _lines(store, TABLES[1], range(prompt, prompt + 1))[0]


def _rows(store: Store, prompt: int | None, most: int) -> list[dict[str, Any]]:
    return _lines(store, TABLES[0], (range(store.n_rows) if prompt is None else store.rows_of(prompt))[:most])


def _lines(store: Store, table: str, lines: range) -> list[dict[str, Any]]:
    size = max(len(lines), 1)
    batches = store.tables.batches(table, size=size, start=lines.start, stop=lines.stop) if lines else ()
    return [dict(line) for batch in batches for line in batch.to_pylist()]
