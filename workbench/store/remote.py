"""Stores at a URL (S3, GCS, whatever fsspec reaches): written block by block, committed by their manifest, fetched whole.

An object store has no rename, so that a store there is whole once its manifest.json is, which is written last. It is not
read in place: `fetch_store` copies it into a folder, where rows are memory-mapped.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..hashes import file_hash
from .checks import MANIFEST, MANIFEST_BYTES, TABLES, check_manifest, manifest_text, read_manifest
from .folder import Folder
from .parts import ENTRY
from .shards import write_shard
from .store import Store
from .writer import StoreWriter, shard_name

if TYPE_CHECKING:
    from torch import Tensor


class UrlParts:
    """Blocks at a URL, where they stay; their entries lie in `.partial/PLAN` until the manifest is written."""

    def __init__(self, url: str, plan_hash: str) -> None:
        self.url = url.rstrip("/")
        self.fs, self.root = _opened(self.url)
        self.partial = f"{self.root}/.partial/{plan_hash[:16]}"

    def write(self, number: int, rows: Mapping[str, Tensor], nonfinite: Mapping[str, int]) -> dict[str, Any]:
        """See `parts.Parts.write`. The shard is made in a temporary file and sent whole."""
        with _told(self.url), tempfile.TemporaryDirectory(prefix="workbench-") as folder:
            entry = {**write_shard(Path(folder) / "shard", rows), "nonfinite": dict(nonfinite)}
            self._put(Path(folder) / "shard", shard_name(number))
            self.fs.makedirs(self.partial, exist_ok=True)
            self.fs.pipe_file(f"{self.partial}/{number:05d}.json", json.dumps(entry).encode())
        return entry

    def entries(self) -> dict[int, dict[str, Any]]:
        """See `parts.Parts.entries`."""
        with _told(self.url):
            self.fs.invalidate_cache()
            if not self.fs.exists(self.partial):
                return {}
            found: dict[int, dict[str, Any]] = {}
            for path in self.fs.ls(self.partial, detail=False):
                if match := ENTRY.fullmatch(path.rpartition("/")[2]):
                    number, entry = int(match[1]), json.loads(self.fs.cat_file(path))
                    shard = f"{self.root}/{shard_name(number)}"
                    if self.fs.exists(shard) and self.fs.size(shard) == entry["bytes"]:
                        found[number] = entry
            return found

    def begin(self, *, overwrite: bool) -> None:
        """Raises UserError where a store is there already; with `overwrite` that one is no store from now on."""
        with _told(self.url):
            self.fs.invalidate_cache()
            there = f"{self.root}/{MANIFEST}"
            if self.fs.exists(there):
                if not overwrite:
                    raise UserError(
                        f"{self.url} exists already; choose another URL or pass overwrite=True (--overwrite)"
                    )
                self.fs.rm_file(there)

    def commit(self, manifest: dict[str, Any], entries: Mapping[int, dict[str, Any]],
               write_tables: Callable[[Path], None]) -> dict[str, Any]:  # fmt: skip
        """Writes the tables, removes what is not the store's, and writes the manifest, which is returned."""
        keys = ("rows", "bytes", "sha256", "nonfinite")
        shards = [{"file": shard_name(i), **{key: entries[i][key] for key in keys}} for i in sorted(entries)]
        with _told(self.url), tempfile.TemporaryDirectory(prefix="workbench-") as name:
            folder = Path(name)
            write_tables(folder)
            tables = {t: {"bytes": (folder / t).stat().st_size, "sha256": file_hash(folder / t)} for t in TABLES}
            whole = {**manifest, "shards": shards, "tables": tables}
            check_manifest(f"cannot write {self.url}", whole)
            for table in TABLES:
                self._put(folder / table, table)
            for path in self.fs.ls(f"{self.root}/shards", detail=False):
                if f"shards/{path.rpartition('/')[2]}" not in {shard["file"] for shard in shards}:
                    self.fs.rm_file(path)
            self.fs.pipe_file(f"{self.root}/{MANIFEST}", manifest_text(whole).encode())
            self.fs.rm(f"{self.root}/.partial", recursive=True)
        return whole

    def _put(self, file: Path, name: str) -> None:
        target = f"{self.root}/{name}"
        self.fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        self.fs.put_file(str(file), target)


def fetch_store(url: str, out: str | Path, *, overwrite: bool = False) -> Store:
    """Copies the store at a URL into the folder `out` and opens it.

    Every file must have the size and the sha256 that the manifest says. Stopped and run again it goes on where it was;
    `out` is there once it is whole. Raises UserError where there is no store, a file is missing or another, and where `out`
    exists (unless `overwrite`) or cannot be written.

    `fetch_store("s3://bucket/profile", "profile")`
    """
    url = url.rstrip("/")
    fs, root = _opened(url)
    with tempfile.TemporaryDirectory(prefix="workbench-") as name:
        manifest = _manifest(url, fs, root, Path(name))
    with StoreWriter(Path(out).expanduser(), manifest["checksum"], overwrite=overwrite) as writer:
        for number in range(len(writer.blocks), len(manifest["shards"])):
            shard = manifest["shards"][number]
            if shard["file"] != shard_name(number):
                raise UserError(
                    f"store {url}: {shard['file']} is not the name of its shard {number}; nothing was fetched"
                )
            beside = writer.partial / "fetched"
            _get(url, fs, root, shard["file"], shard, beside)
            writer.adopt(beside, shard)

        def tables(folder: Path) -> None:
            for table in TABLES:
                _get(url, fs, root, table, manifest["tables"][table], folder / table)

        writer.finish({k: v for k, v in manifest.items() if k not in ("shards", "tables", "checksum")}, tables)
    return Store.open(Path(out).expanduser())


def _manifest(url: str, fs: Any, root: str, folder: Path) -> dict[str, Any]:
    with _told(url):
        if not fs.exists(f"{root}/{MANIFEST}"):
            raise UserError(
                f"store {url}: has no {MANIFEST}: it is no store, or its profile is not finished; run that again"
            )
        if fs.size(f"{root}/{MANIFEST}") > MANIFEST_BYTES:
            raise UserError(f"store {url}: its {MANIFEST} is larger than any store's; refused")
        fs.get_file(f"{root}/{MANIFEST}", str(folder / MANIFEST))
    manifest = read_manifest(Folder(folder))
    check_manifest(f"store {url}", manifest)
    return manifest


def _get(url: str, fs: Any, root: str, name: str, entry: dict[str, Any], to: Path) -> None:
    with _told(url):
        fs.get_file(f"{root}/{name}", str(to))
    if to.stat().st_size != entry["bytes"] or file_hash(to) != entry["sha256"]:
        raise UserError(
            f"store {url}: {name} is not what its manifest says (size or checksum); fetch again, or profile again"
        )


def _opened(url: str) -> tuple[Any, str]:
    """The file system and the path on it."""
    from fsspec.core import url_to_fs

    try:
        fs, root = url_to_fs(url)
    except (ImportError, ValueError) as err:  # a protocol that nobody speaks, or whose package is not there
        raise UserError(f"cannot reach {url}: {err}; give s3://, gs:// or file:// and install what it names") from err
    return fs, str(root).rstrip("/")


@contextmanager
def _told(url: str) -> Iterator[None]:
    """Tells what a file system says, whose errors are OSErrors (those of S3 and GCS too), in one line."""
    try:
        yield
    except OSError as err:
        reason = " ".join(str(err).split())[:200] or type(err).__name__
        raise UserError(f"{url}: {reason}; check the address and the credentials, and run the same again") from err


def numbers_left(entries: Iterable[int], count: int) -> list[int]:
    """The blocks that are not there yet.

    >>> numbers_left([0, 2], 4)
    [1, 3]
    """
    there = set(entries)
    return [i for i in range(count) if i not in there]
