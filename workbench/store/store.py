"""Activations on disk: a folder that opens fast, is read lazily, and refuses whatever is not what its manifest says."""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import UserError
from ..sites import Site
from .arguments import device_of, dtype_of, index_of, number_of, span_of
from .batches import Batches
from .checks import MANIFEST, TABLES, check_folder, read_manifest
from .damage import damaged_files
from .folder import Folder
from .locks import hold
from .rows import RowFiles
from .tables import Tables

if TYPE_CHECKING:
    import pandas as pd

    from ..prompts import PromptSet

Rows = slice | range | Sequence[int] | Tensor | None
SiteName = Site | str | int
SiteNames = Sequence[Site] | Sequence[int] | list[str] | tuple[str, ...]


class Store:
    """A profile on disk, opened by `Store.open`. Nothing of the activations is read before it is asked for.

    Attributes: `path`, `manifest` (see docs for its fields), `sites`, `n_rows`, `dtype` (a name), `prompt_hash`,
    `rendered_hash`, `fingerprint` (of the model), `tokens` (the policy that chose the rows).
    """

    def __init__(self, folder: Folder, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = folder.path, manifest
        self._remove: weakref.finalize[Any, Any] | None = None
        self.n_rows: int = manifest["n_rows"]
        self.dtype: str = manifest["dtype"]
        self.tokens: str = manifest["tokens"]
        self.shards: list[dict[str, Any]] = manifest["shards"]
        self.prompt_hash: str = manifest["prompts"]["hash"]
        self.rendered_hash: str = manifest["prompts"]["rendered_hash"]
        self.fingerprint: dict[str, str] = manifest["model"]["fingerprint"]
        layout = check_folder(folder, manifest)
        self.sites: list[Site] = sorted(map(Site.parse, layout.widths), key=lambda s: (s.point, s.layer))
        self._folder, self._files = folder, RowFiles(folder, layout, self.shards)
        self._tables = Tables(folder, manifest)

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Opens the store in folder `path`; checks every shard's name, size and header, and reads no activation.

        Raises UserError, each with its own message, for: a missing folder; a folder that is no store; a manifest that
        is damaged or of another version; a shard that is missing, is named outside the folder, has not the size that
        the manifest says, or whose header says other than the manifest; a pickle. A store that is replaced while it is
        open keeps its own rows, or says that it was replaced.
        """
        if "://" in str(path):
            raise UserError(f"store {path}: is at a URL, and a store is read from a folder; fetch it first: `workbench stores "
                            f"fetch {path} FOLDER`")  # fmt: skip
        while True:
            folder = Folder(Path(path).expanduser())
            try:
                return cls(folder, read_manifest(folder))
            except UserError:
                if not (folder.replaced() and folder.path.exists()):
                    raise  # otherwise it was replaced while it was being opened: the new one is opened
            except (KeyError, TypeError, AttributeError, ValueError) as err:
                what = f"{type(err).__name__}: {err}"
                raise UserError(f"store {path}: its {MANIFEST} is damaged ({what:.120}); profile again") from err

    def __reduce__(self) -> tuple[Any, ...]:
        return Store.open, (self.path,)  # another process opens it for itself

    def __repr__(self) -> str:
        layers = f"{self.sites[0]}..{self.sites[-1]}" if len(self.sites) > 1 else str(self.sites[0])
        return f"Store({str(self.path)!r}, {self.n_rows} rows, {len(self.sites)} sites ({layers}), {self.dtype})"

    def __len__(self) -> int:
        return self.n_rows

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def name(self) -> str:
        """The name of the model."""
        return str(self.manifest["model"]["name"])

    @property
    def n_bytes(self) -> int:
        return sum(shard["bytes"] for shard in self.shards)

    def width(self, site: Site | str | int) -> int:
        """The width d of a site's rows."""
        return self._files.layout.widths[str(self._site(site))]

    def read(
        self,
        site: Site | str | int,
        rows: Rows = None,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
    ) -> Float[Tensor, "n d"]:
        """The rows of a site: all, or those of a slice, a range, indices, or a boolean mask, in the order given.

        Rows that lie in one shard, taken by a slice, are memory-mapped (writing to them changes no file); others are
        copied. dtype (of torch, or its name), device: converted where given. Raises UserError for a site or a row that
        the store does not have, and a device that is not there.
        """
        name, kind, target = str(self._site(site)), dtype_of(dtype, self.dtype), device_of(device)
        if (span := span_of(rows, self.n_rows)) is not None:
            return self._files.slice(name, span.start, span.stop, kind, target)
        return self._files.gather(name, index_of(rows, self.n_rows, self.path), kind, target)

    @overload
    def iter_batches(
        self, sites: SiteName, size: int, rows: Rows = None, *, dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None, seed: int | None = None,
    ) -> Iterator[Tensor]: ...  # fmt: skip
    @overload
    def iter_batches(
        self, sites: SiteNames, size: int, rows: Rows = None, *, dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None, seed: int | None = None,
    ) -> Iterator[dict[Site, Tensor]]: ...  # fmt: skip
    def iter_batches(
        self,
        sites: SiteName | SiteNames,
        size: int,
        rows: Rows = None,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        seed: int | None = None,
    ) -> Iterator[Tensor] | Iterator[dict[Site, Tensor]]:
        """Rows `size` at a time (the last batch may be smaller), the next ones read while the present one is in use.

        sites: one site gives tensors [n, d]; a list gives dicts from `Site` (not its name) to them, row for row
            beside one another.
        rows: as in `read`; all unless given. seed: shuffles them, the same way every time.
        dtype, device: converted where given; a GPU is fed from pinned memory, beside what it computes.
        Memory stays flat. Closing the iterator, or an exception, ends the reading. Raises UserError as `read` does.

        `for x in store.iter_batches("resid_post.5", 4096, device="cuda"): moments.update(x)`
        """
        size = number_of(size, "the size of a batch")
        if size < 1:
            raise UserError(f"size={size}: a batch has at least one row")
        chosen = self._site(sites) if isinstance(sites, (Site, str, int)) else [self._site(s) for s in sites]
        if not chosen:
            raise UserError(f"no sites to iterate; store {self.path} has {', '.join(map(str, self.sites))}")
        span = span_of(rows, self.n_rows)
        index: range | Tensor = index_of(rows, self.n_rows, self.path) if span is None else span
        if seed is not None:
            order = torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))
            index = index[order] if isinstance(index, Tensor) else order.add_(index.start)
        return iter(Batches(self._files, chosen, size, index, dtype_of(dtype, self.dtype), device_of(device)))

    def rows(self, columns: list[str] | None = None) -> pd.DataFrame:
        """One line per row: row, prompt (index), position, token_id, text, char_start, char_end (of the prompt)."""
        return self._tables.read(TABLES[0], columns).to_pandas()

    def prompts(self, columns: list[str] | None = None) -> pd.DataFrame:
        """One line per prompt: index, id, text (rendered), label, content and meta (JSON), n_tokens, cut (tokens lost)."""
        return self._tables.read(TABLES[1], columns).to_pandas()

    def prompt_set(self) -> PromptSet:
        """The prompts (content, id, label, meta) that were profiled, as they were given."""
        return self._tables.prompt_set()

    @property
    def tables(self) -> Tables:
        """rows.parquet and prompts.parquet, batch by batch; whatever reads them reads them here."""
        return self._tables

    @cached_property
    def prompt_index(self) -> Int[Tensor, " n"]:
        """The index of the prompt that each row comes from; it never falls."""
        return torch.from_numpy(self._tables.prompt_index.copy())

    def rows_of(self, prompt: int) -> range:
        """The rows of a prompt (its index in the set): none, one or many. Reads no more of the table than it needs.

        `store.read(site, store.rows_of(3))` are its activations. Raises UserError for a prompt that is not there.
        """
        return self._tables.rows_of(number_of(prompt, "the index of a prompt"))

    def verify(self) -> None:
        """Recomputes every checksum; raises UserError naming what is damaged, missing or not the store's own."""
        damaged, missing, foreign = damaged_files(self._folder, self.manifest)
        bad = [*damaged, *missing, *foreign]
        if bad:
            more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
            raise UserError(f"store {self.path}: {len(bad)} damaged, missing or foreign files "
                            f"({', '.join(bad[:5])}{more}); profile again or restore them from a copy")  # fmt: skip

    def close(self) -> None:
        """Removes the folder of a profile that was made without one; any other store needs no closing."""
        if self._remove is not None:
            self._remove()

    def keep_until_closed(self, folder: Path | None) -> Store:
        """This store, with `folder` removed once it is closed, forgotten, or the program ends."""
        if folder is not None:
            handle = hold(folder)  # so that others can tell a store that is used from one that was left behind
            self._remove = weakref.finalize(self, _drop, folder, handle, os.getpid())
        return self

    def _site(self, site: Site | str | int) -> Site:
        parsed = Site.parse(site, self.manifest["model"]["n_layers"])
        if str(parsed) not in self._files.layout.widths:
            raise UserError(f"store {self.path} has no {parsed}; it has {', '.join(map(str, self.sites))}")
        return parsed


def _drop(folder: Path, handle: int | None, owner: int) -> None:
    if os.getpid() != owner:
        return  # a fork that ends; the store is its parent's
    shutil.rmtree(folder, ignore_errors=True)
    if handle is not None:
        os.close(handle)


def check_pair(a: Store, b: Store) -> None:
    """Raises UserError, naming both stores and what differs, unless row i of `a` and row i of `b` belong together.

    They do when both hold the same prompts in the same order, by the same token policy; one that keeps more than the
    last token pairs rows only between models of one tokenizer and one template.
    """
    differ, advice = [], "profile both models over the same prompts with the same options"
    if a.prompt_hash != b.prompt_hash:
        names = [f"{s.manifest['prompts']['name']}, {s.prompt_hash[:12]}" for s in (a, b)]
        differ.append(f"prompts ({names[0]} and {names[1]})")
    if a.tokens != b.tokens:
        differ.append(f"tokens ({a.tokens} and {b.tokens})")
    if a.n_rows != b.n_rows:
        differ.append(f"rows ({a.n_rows} and {b.n_rows})")
    if a.manifest["basis"] != b.manifest["basis"]:
        differ.append(f"basis ({a.manifest['basis']} and {b.manifest['basis']})")
    if not differ and a.tokens != "last":
        if a.fingerprint.get("tokenizer") != b.fingerprint.get("tokenizer"):
            differ.append(f"tokenizers, with tokens={a.tokens}: their rows do not answer one to one")
            advice = "take the rows that do with workbench.alignment.pair_rows(a, b)"
        elif a.rendered_hash != b.rendered_hash or not torch.equal(a.prompt_index, b.prompt_index):
            differ.append(f"rendered prompts, with tokens={a.tokens}")
        elif not _same_tokens(a, b):
            differ.append(f"rows, with tokens={a.tokens}: row i of one is not the token of row i of the other")
    if differ:
        raise UserError(f"stores {a.path} and {b.path} do not pair: they differ in {'; '.join(differ)}; {advice}")


def _same_tokens(a: Store, b: Store) -> bool:
    """Whether row i is the same token of the same prompt in both; read in batches."""
    from .staging import row_groups

    if a.manifest["tables"][TABLES[0]]["sha256"] == b.manifest["tables"][TABLES[0]]["sha256"]:
        return True
    columns = ["prompt", "position", "token_id"]
    groups = zip(row_groups(a, TABLES[0], columns), row_groups(b, TABLES[0], columns), strict=True)
    return all(x.equals(y) for x, y in groups)
