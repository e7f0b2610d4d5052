"""What lies in a folder of work: its runs, stores and adapters, with their state and age, read from their small files."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .adapters.adapter_files import ADAPTER
from .errors import UserError
from .runs import LOCK
from .small_files import read_json, read_toml
from .store.listing import listed_at
from .store.locks import is_locked

MOST_FOLDERS = 20_000
"""folders that are looked at: a folder that holds more is no folder of work, and nobody waits for its end"""
LENS, LENS_KEY = "config.json", "workbench"
"""the file that tells of a fitted lens, ours or tuned-lens's (`probes.lens_files`), and the key in it that is ours"""
PROBE = "probe.json"
"""of a saved probe (`probes.probe`)"""
RUN_KINDS = {
    "job.toml": "run", "transport.toml": "transport", "probe.toml": "probe", "similarity.toml": "similarity",
    "geometry.toml": "geometry", "depth.toml": "depth",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One artefact of `catalogue`."""

    kind: str
    """run (a transfer job), transport, probe (a run of probes), similarity, geometry, depth, saved probe, store, moments,
    unfinished (a store), adapter or lens"""
    name: str
    """its path from the folder, with slashes"""
    path: Path
    state: str
    """done, running, stopped, whole, moments, unfinished or damaged"""
    note: str = ""
    age: float = 0.0
    """seconds since it was last written to"""
    facts: dict[str, Any] = field(default_factory=dict)
    """what its small files say of it: model, rows, sites, ... by kind"""


@dataclass(frozen=True)
class Catalogue:
    """What `catalogue` found, by name."""

    folder: Path
    entries: tuple[Entry, ...]
    cut: bool = False
    """whether there were more folders than are looked at"""

    def of(self, *kinds: str) -> list[Entry]:
        """The entries of some kinds, in the order of their names."""
        return [entry for entry in self.entries if entry.kind in kinds]

    def get(self, name: str) -> Entry:
        """The entry of that name; UserError, which names those there are, for any other: also for a path that leads out."""
        for entry in self.entries:
            if entry.name == name:
                return entry
        known = ", ".join(entry.name for entry in self.entries[:8]) or "nothing"
        raise UserError(f"no artefact {name[:80]!r} in {self.folder}; there is {known}")


def catalogue(folder: str | Path, most: int = MOST_FOLDERS) -> Catalogue:
    """The runs, stores and adapters below a folder; hidden folders and links are not followed.

    A damaged artefact is an entry that says so. Raises UserError where there is no such folder.
    """
    root = Path(folder).expanduser().resolve()
    if not root.is_dir():
        raise UserError(f"{folder}: no such folder; give the one that holds your runs and stores")
    found, seen = list[Entry](), 0
    for path, folders, files in os.walk(root):
        seen += 1
        if seen > most:
            break
        here = Path(path)
        folders[:] = sorted(f for f in folders if not f.startswith(".") or f.endswith(".partial"))
        one = next(_entries(root, here, set(folders) | set(files)), None)
        if one is not None:
            found.append(one)
        if one is not None and one.kind not in RUN_KINDS.values():
            folders.clear()
    return Catalogue(root, tuple(sorted(found, key=lambda entry: entry.name)), seen > most)


def _entries(root: Path, path: Path, names: set[str]) -> Iterator[Entry]:
    name = path.relative_to(root).as_posix()
    for marker, kind in RUN_KINDS.items():
        if marker in names:
            yield _run(kind, name, path, path / marker)
    if ADAPTER in names:
        yield _adapter(name, path)
    if LENS in names and ("params.safetensors" in names or ("params.pt" in names and _is_tuned_lens(path / LENS))):
        yield _lens(name, path)
    if PROBE in names:
        yield _probe(name, path)
    if (listed := listed_at(path, names)) is not None:
        kind = "store" if listed.state in ("whole", "damaged") else listed.state
        facts = {"model": listed.model, "prompts": listed.prompts, "rows": listed.rows, "sites": listed.sites,
                 "tokens": listed.tokens, "dtype": listed.dtype, "bytes": listed.n_bytes}  # fmt: skip
        yield Entry(kind, name, path, listed.state, listed.note, listed.age, facts)


def _run(kind: str, name: str, path: Path, marker: Path) -> Entry:
    state, note = "stopped", "run the same job again to go on"
    if (path / "metrics.json").is_file():
        state, note = "done", ""
    if is_locked(path / LOCK):
        state, note = "running", ""
    facts: dict[str, Any] = {}
    try:
        facts = {"job": read_toml(marker)}
    except (OSError, ValueError) as err:
        state, note = "damaged", f"{marker.name} cannot be read: {err}"
    facts["steps"] = sorted(p.stem for p in (path / "steps").glob("*.json"))
    files = [path / "metrics.json", path / "log.txt", marker]
    return Entry(kind, name, path, state, note, _age(files), facts)


def _adapter(name: str, path: Path) -> Entry:
    try:
        about = read_json(path / ADAPTER)
        facts = {"model": about.get("base", {}).get("name", ""), "title": about.get("name", ""), "about": about}
        return Entry("adapter", name, path, "whole", age=_age([path / ADAPTER]), facts=facts)
    except (OSError, ValueError, AttributeError) as err:
        return Entry("adapter", name, path, "damaged", f"{ADAPTER} cannot be read: {err}")


def _lens(name: str, path: Path) -> Entry:
    """A fitted lens; its own key holds what tuned-lens's config does not know, the fingerprint of its model say."""
    file = path / LENS
    try:
        about = read_json(file)
        own = about.get(LENS_KEY) or {}
        base = own.get("base") or {"name": about["base_model_name_or_path"]}
        base = {str(key): str(value) for key, value in base.items()}
        facts = {"model": base.get("name", ""), "lens": str(about.get("lens_type", "linear_tuned_lens")), "base": base,
                 "layers": about["num_hidden_layers"]}  # fmt: skip
        return Entry("lens", name, path, "whole", age=_age([file]), facts=facts)
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as err:
        return Entry("lens", name, path, "damaged", f"{LENS} cannot be read: {err}")


def _is_tuned_lens(config: Path) -> bool:
    """Whether the config.json beside a params.pt is that of tuned-lens: other programs use both names too."""
    try:
        about = read_json(config)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(about, dict) and {"base_model_name_or_path", "d_model", "num_hidden_layers"} <= set(about)


def _probe(name: str, path: Path) -> Entry:
    file = path / PROBE
    try:
        about = read_json(file)
        base = {str(key): str(value) for key, value in about["base"].items()}
        facts = {"model": base.get("name", ""), "base": base, "site": str(about["site"]), "label": str(about["label"]),
                 "classes": [str(one) for one in about["classes"]]}  # fmt: skip
        return Entry("saved probe", name, path, "whole", age=_age([file]), facts=facts)
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as err:
        return Entry("saved probe", name, path, "damaged", f"{PROBE} cannot be read: {err}")


def _age(files: Iterable[Path]) -> float:
    times = [file.stat().st_mtime for file in files if file.exists()]
    return max(0.0, time.time() - max(times)) if times else 0.0
