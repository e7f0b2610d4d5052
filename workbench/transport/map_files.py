"""The maps of a grid on disk: one file each, written as they are fitted and read when they are asked for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import UserError
from ..maps.linear_map import LinearMap
from ..sites import Site, depth
from ..small_files import plain_file, reason

if TYPE_CHECKING:
    from .pairs import SitePair

BETWEEN, SUFFIX = "_to_", ".safetensors"


class MapFolder(Mapping["SitePair", LinearMap]):
    """A folder of maps by pair of sites: no more than the one that is asked for is in memory.

    >>> MapFolder("maps").file((Site(0), Site(3))).name
    'resid_post.0_to_resid_post.3.safetensors'
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def file(self, pair: SitePair) -> Path:
        return self.folder / f"{pair[0]}{BETWEEN}{pair[1]}{SUFFIX}"

    def keep(self, pair: SitePair, fitted: LinearMap) -> None:
        """Writes a map, whole or not at all, over what was there."""
        fitted.save(self.file(pair), overwrite=True)

    def __getitem__(self, pair: SitePair) -> LinearMap:
        file = self.file(pair)
        if not file.is_file():
            raise KeyError(pair)
        try:
            plain = plain_file(file)
        except (OSError, ValueError) as err:
            raise UserError(f"{file}: {reason(err)}") from err
        return LinearMap.load(plain)

    def __contains__(self, pair: object) -> bool:
        return isinstance(pair, tuple) and len(pair) == 2 and self.file(pair).is_file()

    def __iter__(self) -> Iterator[SitePair]:
        names = (file.name.removesuffix(SUFFIX).split(BETWEEN) for file in self.folder.glob(f"*{BETWEEN}*{SUFFIX}"))
        pairs = [(Site.parse(a), Site.parse(b)) for a, b in names]
        return iter(sorted(pairs, key=lambda pair: (depth(pair[0]), depth(pair[1]))))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"MapFolder({len(self)} maps in {self.folder})"


def copy_maps(maps: Mapping[SitePair, LinearMap], folder: Path) -> None:
    """Puts maps into a folder, one after the other; those that are files already are linked where that can be done."""
    folder.mkdir()
    target = MapFolder(folder)
    for pair in maps:
        if not isinstance(maps, MapFolder):
            target.keep(pair, maps[pair])
            continue
        try:
            os.link(maps.file(pair), target.file(pair))
        except OSError:  # another disk, or one that has no links
            shutil.copyfile(maps.file(pair), target.file(pair))


def maps_bytes(pairs: Collection[SitePair], widths: Mapping[Site, int]) -> int:
    """Bytes that the maps of some pairs take on disk: float32 weights and biases.

    >>> maps_bytes([(Site(0), Site(1))], {Site(0): 2304, Site(1): 2304}) / 2**20
    20.2587890625
    """
    return sum(4 * (widths[a] + 1) * widths[b] for a, b in pairs)


def check_disk(folder: str | Path, needed: int, said: str) -> None:
    """Raises UserError where `needed` bytes, those of `said`, do not fit on the disk of a folder that may yet be made."""
    free = disk_free(folder)
    if needed > free:
        raise UserError(f"{said} take {needed / 2**20:.1f} MiB and {folder} has {free / 2**20:.1f} MiB free; make room, "
                        "choose another folder, or keep fewer maps (--keep-maps needed, --causal neighbours or none)"
                        )  # fmt: skip


def disk_free(folder: str | Path) -> int:
    """Bytes that are free on the disk of a folder that may yet be made."""
    path = Path(folder).expanduser().absolute()
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.is_dir())).free


@dataclass(frozen=True, eq=False)
class KeptMaps:
    """Which maps of which arm are kept as they are fitted, and where: in memory, or in a folder."""

    pairs: Mapping[str, frozenset[SitePair]]
    maps: Mapping[str, dict[SitePair, LinearMap] | MapFolder]

    @classmethod
    def of(
        cls, keep: Mapping[str, bool | Sequence[SitePair]], pairs: Sequence[SitePair], widths: Mapping[Site, int],
        folder: str | Path | None,
    ) -> KeptMaps:  # fmt: skip
        """keep: by arm, all pairs, none, or those given. Raises UserError for others, or where the disk is too full."""
        chosen = {arm: _chosen(some, pairs) for arm, some in keep.items()}
        if folder is None:
            return cls(chosen, {arm: {} for arm in chosen})
        check_disk(folder, sum(maps_bytes(some, widths) for some in chosen.values()), "the maps to keep")
        return cls(chosen, {arm: MapFolder(Path(folder) / arm) for arm in chosen})

    def add(self, arm: str, pair: SitePair, fitted: LinearMap) -> None:
        """Keeps a map in float32, where it was asked for."""
        if pair not in self.pairs.get(arm, ()):
            return
        where, made = self.maps[arm], fitted.to(torch.float32)
        if isinstance(where, MapFolder):
            where.keep(pair, made)
        else:
            where[pair] = made


def _chosen(keep: bool | Sequence[SitePair], pairs: Sequence[SitePair]) -> frozenset[SitePair]:
    if isinstance(keep, bool):
        return frozenset(pairs) if keep else frozenset()
    unknown = sorted(set(keep) - set(pairs))
    if unknown:
        a, b = unknown[0]
        raise UserError(f"the map of {a} to {b} cannot be kept: that pair is not fitted; choose among the grid's pairs")
    return frozenset(keep)
