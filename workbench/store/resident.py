"""Rows of a store that are looked at again and again: kept on a GPU, site by site, memory-mapped where there is none."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from ..sites import Site
from .arguments import index_of, span_of
from .store import Rows, Store

SHARE = 0.5
"""of the free memory of a GPU that one store takes, unless told otherwise"""
BATCH = 16_384


class ResidentRows:
    """The rows of an open store, on a device.

    On a GPU a site that is asked for stays there, in the store's dtype, until the budget is needed for others (the one
    asked for longest ago goes first); a site larger than the budget is read anew each time. On a CPU nothing is kept:
    the files are mapped, and the system's page cache does the rest. Safe to use from several threads.

    Args:
        store: stays open until `close`.
        device: None: a GPU where there is one.
        budget: bytes on the device; None: half of what is free there when the first site is loaded.
        keep: whether sites are kept on the device; None: where it is no CPU.
    """

    def __init__(
        self,
        store: Store,
        device: torch.device | str | None = None,
        *,
        budget: int | None = None,
        keep: bool | None = None,
    ) -> None:
        chosen = device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
        self.store, self.device, self.budget = store, torch.device(chosen), budget
        self.keep = self.device.type != "cpu" if keep is None else keep
        self._kept: dict[Site, Tensor] = {}  # the one asked for last comes last
        self._lock = threading.RLock()

    @property
    def n_bytes(self) -> int:
        """Bytes of what is kept on the device."""
        return sum(h.nbytes for h in list(self._kept.values()))

    @property
    def sites(self) -> list[Site]:
        """The sites that are kept on the device."""
        return list(self._kept)

    def take(self, site: Site | str | int, rows: Rows = None) -> Float[Tensor, "n d"]:
        """Rows of a site on the device, in the store's dtype; see `Store.read`, which also says what it raises."""
        kept = self._load(site)
        if kept is None:
            return self.store.read(site, rows, device=self.device)
        if (span := span_of(rows, self.store.n_rows)) is not None:
            return kept[span.start : span.stop]
        return kept[index_of(rows, self.store.n_rows, self.store.path).to(self.device)]

    def some(self, site: Site | str | int, rows: Rows) -> Float[Tensor, "n d"]:
        """A few rows of a site: from the device where the site is kept there, else from the files.

        A look at some rows loads no whole site; what goes over all rows is `batches`.
        """
        with self._lock:
            kept = self._kept.get(self._site(site))
        if kept is None:
            return self.store.read(site, rows)
        return kept[index_of(rows, self.store.n_rows, self.store.path).to(self.device)]

    def batches(self, site: Site | str | int, size: int = BATCH) -> Iterator[Float[Tensor, "n d"]]:
        """All rows of a site in order, batch by batch, on the device; a batch is good until the next is asked for."""
        kept = self._load(site)
        if kept is not None:
            yield from kept.split(size)
            return
        target = None if self.device.type == "cpu" else self.device
        yield from self.store.iter_batches(site, size, device=target)

    def release(self) -> None:
        """Lets go of what is kept on the device; it is loaded again when it is asked for."""
        with self._lock:
            self._kept.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Lets go of everything, the store too."""
        self.release()
        self.store.close()

    def _load(self, site: Site | str | int) -> Tensor | None:
        """The rows of a site on the device; None where they are not kept there."""
        if not self.keep:
            return None
        with self._lock:
            place = self._site(site)
            if place in self._kept:
                self._kept[place] = self._kept.pop(place)
                return self._kept[place]
            if self.budget is None:
                free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else sys.maxsize
                self.budget = int(SHARE * free)
            first = self.store.read(place, slice(0, 1))
            needed = first.element_size() * first.shape[1] * self.store.n_rows
            if needed > self.budget:
                return None
            while self._kept and self.n_bytes + needed > self.budget:
                del self._kept[next(iter(self._kept))]
            self._kept[place] = self.store.read(place, device=self.device)
            return self._kept[place]

    def _site(self, site: Site | str | int) -> Site:
        return Site.parse(site, self.store.manifest["model"]["n_layers"])
