"""Which pairs a transport run fits, which of them its causal figures are of, and whose maps it keeps."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import UserError
from workbench.maps.linear_map import LinearMap
from workbench.planning.steps import grid_steps
from workbench.planning.texts import Counted
from workbench.sites import Site, depth
from workbench.transport.map_files import disk_free, maps_bytes
from workbench.transport.pairs import SitePair, check_pairs, moment_sets, site_pairs
from workbench.transport.rows import ModelRows
from workbench.transport.sums import free_bytes, plan_sums
from workbench.work import ModelShape

from .transport_job import TransportJob, check_job, dictionaries_of

if TYPE_CHECKING:
    from workbench.models import Model
    from workbench.prompts import PromptSet

    from .dictionaries import Dictionary

log = logging.getLogger("workbench")
MANY = 28
"""pairs above which the causal figures and the shortcuts are of neighbouring sites alone, unless others are asked for"""
CAUSAL = ("auto", "all", "neighbours", "none")
KEEP = ("needed", "all")


@dataclass(frozen=True)
class PairChoice:
    """The pairs of a run, in the order in which they are fitted."""

    pairs: tuple[SitePair, ...]
    causal: tuple[SitePair, ...]
    """those of the causal figures and the shortcuts"""
    features: tuple[SitePair, ...]
    """those into a site that a dictionary reads"""
    dictionaries: tuple[Dictionary, ...]
    """those of the features, each with the target that it reads as its site"""
    keep_all: bool

    @classmethod
    def of(cls, model: Model, job: TransportJob) -> PairChoice:
        """Raises UserError for pairs that the model or the grid does not have, for unknown words, and what
        `dictionaries_of` raises."""
        pairs = _fitted(model, job)
        if job.keep_maps not in KEEP:
            raise UserError(f"unknown choice of maps to keep {job.keep_maps!r}; allowed: {', '.join(KEEP)}")
        causal = _causal(model, job.causal, pairs)
        dictionaries = dictionaries_of(model, job, {b for _, b in pairs})
        if job.grid_only or job.positions != "same":  # there, no step asks for a map
            return cls(tuple(pairs), (), (), tuple(dictionaries), job.keep_maps == "all")
        read = {Site.parse(str(d.site)) for d in dictionaries}
        features = tuple(pair for pair in pairs if pair[1] in read)
        return cls(tuple(pairs), tuple(causal), features, tuple(dictionaries), job.keep_maps == "all")

    @property
    def operators(self) -> tuple[SitePair, ...]:
        """Those whose maps are kept: all, or those that causal figures, shortcuts and features are made of."""
        needed = {*self.causal, *self.features}
        return tuple(pair for pair in self.pairs if self.keep_all or pair in needed)

    @property
    def controls(self) -> tuple[SitePair, ...]:
        """Those whose shuffled maps are kept: features are compared with them, nothing else is."""
        return self.features

    @property
    def left_out(self) -> list[str]:
        """One line where causal figures are not of every pair, and how to have the others; else nothing."""
        missing = [pair for pair in self.pairs if pair not in set(self.causal)]
        if not missing or not self.causal:
            return []
        few = ", ".join(f"{a} to {b}" for a, b in missing[:3]) + (", ..." if len(missing) > 3 else "")
        return [f"causal figures and shortcuts are of {len(self.causal)} of {len(self.pairs)} pairs; {len(missing)} are "
                f"left out ({few}): --causal all measures every pair, --causal {named(missing[0])} those that it "
                "names"]  # fmt: skip


def named(pair: SitePair) -> str:
    """As the command line takes it.

    >>> named((Site(0), Site(3)))
    'resid_post.0:resid_post.3'
    """
    return f"{pair[0]}:{pair[1]}"


def neighbours(pairs: Sequence[SitePair]) -> list[SitePair]:
    """Of each source, the nearest target of every point: block by block where every layer takes part.

    >>> [named(p) for p in neighbours([(Site(0), Site(4)), (Site(0), Site(8)), (Site(4), Site(8))])]
    ['resid_post.0:resid_post.4', 'resid_post.4:resid_post.8']
    """
    nearest: dict[tuple[Site, str], SitePair] = {}
    for a, b in sorted(pairs, key=lambda pair: depth(pair[1])):
        nearest.setdefault((a, b.point), (a, b))
    found = set(nearest.values())
    return [pair for pair in pairs if pair in found]


def _fitted(model: Model, job: TransportJob) -> list[SitePair]:
    if job.pairs and job.sites:
        raise UserError("both sites and pairs were given; give one of them")
    if job.pairs:
        return check_pairs([_parsed(model, text) for text in job.pairs])
    sites = [model.site(s) for s in job.sites] if job.sites else [Site(layer) for layer in range(model.n_layers)]
    return check_pairs(site_pairs(sites))


def _causal(model: Model, causal: str, pairs: Sequence[SitePair]) -> list[SitePair]:
    if causal == "none":
        return []
    if causal == "all" or (causal == "auto" and len(pairs) <= MANY):
        return list(pairs)
    if causal in ("auto", "neighbours"):
        return neighbours(pairs)
    if ":" not in causal:
        raise UserError(
            f"unknown choice of causal pairs {causal!r}; allowed: {', '.join(CAUSAL)}, or pairs such as 3:5,0:4"
        )
    wanted = [_parsed(model, text) for text in causal.split(",")]
    for pair in wanted:
        if pair not in set(pairs):
            raise UserError(f"the causal pair {named(pair)} is not fitted; add it with --pairs, --layers or --sites")
    return [pair for pair in pairs if pair in set(wanted)]


def _parsed(model: Model, text: str) -> SitePair:
    ends = [end.strip() for end in text.split(":")]
    if len(ends) != 2 or not all(ends):
        raise UserError(f"cannot read the pair {text!r}; write two sites, such as 3:5 or resid_pre.1:resid_post.4")
    first, second = (model.site(int(end) if end.lstrip("-").isdigit() else end) for end in ends)
    return first, second


class Jumps(Mapping[tuple[int, int], LinearMap]):
    """The maps between `resid_post` sites by (layer, blocks skipped), each read when it is asked for."""

    def __init__(self, maps: Mapping[SitePair, LinearMap], pairs: Sequence[SitePair]) -> None:
        self._maps = maps
        self._pairs = {(a.layer, b.layer - a.layer): (a, b) for a, b in pairs if a.point == b.point == "resid_post"}

    def __getitem__(self, jump: tuple[int, int]) -> LinearMap:
        return self._maps[self._pairs[jump]]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)


@dataclass(frozen=True)
class TransportCost:
    """What a transport run takes, before it is made."""

    pairs: int
    causal: int
    operators: int
    """maps that are kept"""
    controls: int
    """maps of shuffled pairs that are kept"""
    bytes: int
    """of the maps on disk; all else that a run writes is small beside them"""
    free: int
    """bytes free on the disk of the run folder"""
    passes: int
    """over the prompts: moments that do not fit into memory at once are summed in several"""
    memory: int
    """bytes that moments may take"""
    sums: float = 0.0
    """FLOPs of the passes and of the moments that they are summed into; 0 where positions are not the same"""
    fits: float = 0.0
    """FLOPs of the grid's fits, controls and scores; causal figures and features come after these"""

    def __str__(self) -> str:
        room = "" if self.bytes <= self.free else " - TOO LITTLE"
        times = "pass" if self.passes == 1 else "passes"
        return "\n".join([
            f"{_count(self.pairs, 'pair')} of sites, causal figures of {self.causal}",
            f"{_count(self.operators, 'map')} and {self.controls} of shuffled pairs to keep: {self.bytes / 2**20:.1f} MiB "
            f"to write, {self.free / 2**20:.0f} MiB free{room}",
            f"{self.passes} {times} over the prompts; {self.memory / 2**20:.0f} MiB of memory are free for moments",
            *([f"{self.sums:.3g} FLOPs of passes and sums, {self.fits:.3g} of the grid's fits"] if self.sums else []),
        ])  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def transport_cost(model: Model, prompts: PromptSet, out: str | Path, job: TransportJob) -> TransportCost:
    """What `run_transport` with the same arguments would take; nothing is run or written.

    Raises UserError as it does for sites and pairs, and where the moments of one pair do not fit into memory.
    """
    check_job(prompts, job)
    choice, rows = PairChoice.of(model, job), ModelRows(model, prompts, tokens=job.tokens)
    widths = {site: model.width_of(site) for pair in choice.pairs for site in pair}
    memory = free_bytes(model.device)
    passes = planned_passes(rows, choice.pairs, job, memory)
    size = maps_bytes(choice.operators, widths) + maps_bytes(choice.controls, widths)
    return TransportCost(len(choice.pairs), len(choice.causal), len(choice.operators), len(choice.controls), size,
                         disk_free(out), len(passes), memory, *grid_flops(rows, passes, job))  # fmt: skip


def planned_passes(rows: ModelRows, pairs: Sequence[SitePair], job: TransportJob, memory: int) -> list[list[SitePair]]:
    """The passes in which a grid sums its moments, within so many bytes."""
    return plan_sums(rows, list(pairs), positions=job.positions, control=job.positions != "shuffled",
                     copies=moment_sets(job.folds, job.shards, first=rows.has_first), memory=memory)  # fmt: skip


def grid_flops(rows: ModelRows, passes: Sequence[Sequence[SitePair]], job: TransportJob) -> tuple[float, float]:
    """FLOPs of the sums and of the fits of a grid at the same positions.

    Zeros at other positions, and where the model's configuration does not say its sizes.
    """
    if job.positions != "same":
        return 0.0, 0.0
    named = [[(str(a), str(b)) for a, b in some] for some in passes]
    widths = {str(site): rows.width(site) for some in passes for pair in some for site in pair}
    try:
        steps = grid_steps(
            ModelShape.of(rows.model), Counted(*rows.counted), named, widths, folds=job.folds, shards=job.shards,
            dtype=str(rows.model.dtype).removeprefix("torch."), alpha="cv" if job.alpha == "cv" else "given",
            bos=rows.has_first, device=rows.device.type,
        )  # fmt: skip
    except UserError as err:
        log.info("%s", err)
        return 0.0, 0.0
    return steps[0].work.flops, steps[1].work.flops
