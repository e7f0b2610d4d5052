"""Directions of a label in the residual stream, found in several ways, each a steering vector of one length, so that the
ways can be compared.

mean_difference: mean(+) - mean(-). pca: the leading direction of differences of pairs (representation engineering,
arXiv:2310.01405). caa: the mean difference of prompts paired one to one (arXiv:2312.06681). logistic: the weights of a
logistic probe. leace: cov(x)^-1 cov(x, z), what LEACE reads a label by (arXiv:2306.03819); what it writes along, and so its
steering vector, is cov(x, z), which of two classes is the mean difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.adapters import Adapter, vector
from workbench.errors import UserError
from workbench.evaluate.comparison import dose_response
from workbench.evaluate.statistics import Interval
from workbench.models import Model
from workbench.sites import Site
from workbench.store import Store
from workbench.store.resident import ResidentRows

from .erasers import LeaceEraser
from .held_out_scores import HeldOut, class_scores
from .labels import OTHER, _hashes, _values, labels_of
from .linear import MOST_ROWS, _site, _Task
from .solvers import PENALTY, Solver

if TYPE_CHECKING:
    import pandas as pd

METHODS = ("mean_difference", "pca", "caa", "logistic", "leace")
STRENGTHS = (0.25, 0.5, 1.0, 1.5, 2.0)


@dataclass(frozen=True, eq=False)
class Direction:
    """A unit vector [d] at a site along which `positive` lies above `negative`.

    >>> d = Direction(torch.tensor([1.0, 0.0]), Site(3), "mean_difference", "label", "yes", "no", gap=2.0, length=2.0)
    >>> d.adapter().delta(Site(3), torch.zeros(2)).tolist()
    [2.0, 0.0]
    """

    vector: Float[Tensor, " d"]
    site: Site
    method: str
    label: str
    positive: str
    negative: str
    gap: float
    """the distance of the two classes' means along it, over the training rows; small for one that reads well (logistic,
    leace), since that lies across what else varies"""
    length: float
    """the whole distance of the two means, the same for every method: the length of the steering vector"""
    held_out: HeldOut | None = None
    """how well the rows' places along it tell the classes apart, on prompts that it was not found on"""
    base: Mapping[str, str] = field(default_factory=dict)
    written: Float[Tensor, " d_w"] | None = field(default=None, repr=False)
    """the unit vector that is added where it is another than the one that is read along (leace)"""

    def __repr__(self) -> str:
        told = "" if self.held_out is None else f", AUROC {self.held_out.auroc}"
        return f"Direction({self.method} of {self.positive!r} over {self.negative!r} at {self.site}{told})"

    @property
    def auroc(self) -> Interval | None:
        return None if self.held_out is None else self.held_out.auroc

    def score(self, rows: Float[Tensor, "*batch d_in"]) -> Tensor:
        """The place of rows along it, [...]; UserError for another width."""
        if rows.shape[-1] != len(self.vector):
            raise UserError(f"this direction has width {len(self.vector)}; got rows of width {rows.shape[-1]}")
        return rows @ self.vector.to(rows)

    def cosine(self, other: Direction | Tensor) -> float:
        """The cosine with another direction of the same width."""
        v = other.vector if isinstance(other, Direction) else other
        if v.shape != self.vector.shape:
            raise UserError(f"directions of widths {len(self.vector)} and {v.numel()} have no cosine")
        return float(self.vector.double() @ v.double().to(self.vector.device) / v.double().norm())

    def adapter(self, *, strength: float = 1.0, positions: str = "all") -> Adapter:
        """The steering vector length x vector (or `written`), towards `positive`."""
        added = self.vector if self.written is None else self.written
        meta = {"kind": "steering", "method": self.method, "label": self.label, "length": self.length}
        return vector(self.site, self.length * added.float().cpu(), positions=positions, strength=strength,
                      name=f"{self.positive} ({self.method})", base=self.base, meta=meta)  # fmt: skip


@dataclass(frozen=True, eq=False)
class DirectionSet:
    """What `find_directions` found: one direction for each site and method."""

    directions: tuple[Direction, ...]
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        first = self.directions[0]
        return f"DirectionSet({len(self.directions)} directions of {first.positive!r} over {first.negative!r})"

    def __iter__(self) -> Any:
        return iter(self.directions)

    def at(self, site: Site | str | int, method: str = METHODS[0]) -> Direction:
        """One of them; UserError for one that is not there."""
        wanted = Site.parse(site)
        for one in self.directions:
            if (one.site, one.method) == (wanted, method):
                return one
        known = ", ".join(dict.fromkeys(str(d.site) for d in self.directions))
        raise UserError(f"no direction {method!r} at {wanted}; there are {', '.join(dict.fromkeys(d.method for d in self))} at "
                        f"{known}")  # fmt: skip

    def frame(self) -> pd.DataFrame:
        """One line for each: AUROC and accuracy with 95 % intervals, and the gap between the means."""
        import pandas as pd

        lines = [{"site": str(d.site), "method": d.method, "gap": d.gap, "length": d.length,
                  **({} if d.held_out is None else d.held_out.line())} for d in self.directions]  # fmt: skip
        return pd.DataFrame(lines)

    def cosines(self, site: Site | str | int) -> pd.DataFrame:
        """Of every method with every other, at a site."""
        import pandas as pd

        mine = [d for d in self.directions if d.site == Site.parse(site)]
        names = [d.method for d in mine]
        return pd.DataFrame([[a.cosine(b) for b in mine] for a in mine], index=names, columns=names)

    def _repr_html_(self) -> str:
        from html import escape

        notes = "".join(f"<br><small>{escape(note)}</small>" for note in self.notes)
        return f"<p>{escape(repr(self))}{notes}</p>" + self.frame().to_html(
            index=False, float_format=lambda v: f"{v:.3f}"
        )

    def dose(
        self, model: Model, prompts: Any, openers: Sequence[str], *, factors: Iterable[float] = STRENGTHS, texts: Any = None,
        positions: str = "all",
    ) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
        """Dose and response of each as a steering vector, by name, as `plots.dose_curves` draws them.

        openers: how an answer begins that shows the behaviour; texts: neutral ones, where the KL that it costs is wanted too;
        see `workbench.dose_response`.
        """
        steps = tuple(factors)
        given = (model, prompts, openers)
        return {f"{d.method}, {d.site}": dose_response(*given, d.adapter(positions=positions), steps, texts=texts)
                for d in self.directions}  # fmt: skip


def find_directions(
    store: Store | ResidentRows, label: Any, positive: str, negative: str | None = None, *,
    methods: Sequence[str] | None = None, sites: Sequence[Site | str | int] | None = None, positions: str = "last",
    pairs: Any = None, holdout: float = 0.25, max_rows: int = MOST_ROWS, seed: int = 0,
) -> DirectionSet:  # fmt: skip
    """Directions from `negative` (unless given, all other classes) to `positive`, at every site, by every method.

    Args:
        label: see `labels.labels_of`. methods: all of METHODS unless given, `caa` only with pairs.
        pairs: a column, or values of rows or prompts, that is the same for the two sides of a pair: `caa` and `pca` then take
            differences within pairs, and a pair is never split. Unless given, `pca` pairs at random.
        sites, positions, holdout, max_rows, seed: as of `linear.train_probes`.

    Raises UserError for unknown methods, classes that are not there, `caa` without pairs, and pairs without both sides.
    """
    rows = store if isinstance(store, ResidentRows) else ResidentRows(store, keep=False)
    wanted = tuple(m for m in METHODS if m != "caa" or pairs is not None) if methods is None else tuple(methods)
    unknown = [m for m in wanted if m not in METHODS]
    if unknown or not wanted:
        raise UserError(
            f"unknown methods {', '.join(map(repr, unknown)) or '(none given)'}; allowed: {', '.join(METHODS)}"
        )
    if "caa" in wanted and pairs is None:
        raise UserError(
            "caa takes differences of pairs; say with pairs= which prompts belong together, or leave it out"
        )
    classes = [positive] if negative is None else [negative, positive]
    known = labels_of(rows.store, label, classes=classes, quantity=False, groups=pairs)
    task = _Task.of(rows, known, positions, holdout, max_rows, seed)
    key = None if pairs is None else _hashes(_values(rows.store, pairs, "pairs"))[task.labels.rows]
    found = []
    places = rows.store.sites if sites is None else [_site(rows.store, s) for s in sites]
    for site in places:
        x = rows.take(site, torch.from_numpy(task.labels.rows)).float().cpu()
        if not bool(torch.isfinite(x).all()):
            raise UserError(f"{site} holds rows that are not finite; profile again, or leave this site out with sites=")
        learn = ~task.test
        y, mine = task.labels.values[learn], None if key is None else key[learn]
        for method in wanted:
            raw = _raw(method, x[torch.from_numpy(learn)].double(), y, mine, seed)
            found.append(
                _direction(raw, x, task, site, method, (negative or OTHER, positive), dict(rows.store.fingerprint))
            )
    return DirectionSet(tuple(found), task.labels.notes)


def _direction(
    raw: Tensor, x: Tensor, task: _Task, site: Site, method: str, names: tuple[str, str], base: dict[str, str]
) -> Direction:
    length = float(raw.norm())
    if not length > 0:
        raise UserError(f"{site}: the {method} direction of {task.labels.name!r} has no length; nothing differs there")
    learn, y = torch.from_numpy(~task.test), torch.from_numpy(task.labels.values)
    means = [x[learn & (y == k)].double().mean(0) for k in (0, 1)]
    between = means[1] - means[0]
    unit = raw / length * (1 if float(raw @ between) >= 0 else -1)
    place = x.double() @ unit
    middle, gap, apart = float((means[0] + means[1]) @ unit) / 2, float(between @ unit), float(between.norm())
    spread = float(place[learn].std()) or 1.0
    p = ((place[~learn] - middle) / spread).sigmoid().numpy()
    held = class_scores(np.stack([1 - p, p], 1), task.labels.values[task.test], task.labels.groups[task.test],
                        float(np.bincount(task.labels.values[task.test]).max() / task.test.sum()), seed=task.seed)  # fmt: skip
    return Direction(
        unit.float(),
        site,
        method,
        task.labels.name,
        names[1],
        names[0],
        gap,
        apart,
        held,
        base,
        (between / apart).float() if method == "leace" else None,
    )


def _raw(method: str, x: Tensor, y: np.ndarray, pairs: np.ndarray | None, seed: int) -> Float[Tensor, " d"]:
    """The direction of training rows x [n, d], float64, of classes y, of any length and sign."""
    hit = torch.from_numpy(y == 1)
    if method == "mean_difference":
        return x[hit].mean(0) - x[~hit].mean(0)
    if method == "leace":
        return LeaceEraser.fit(x, torch.from_numpy(y)).right[0]
    if method == "logistic":
        made = Solver("logistic", 2, PENALTY["logistic"], torch.device("cpu")).fit(x.float(), y)
        return torch.from_numpy(made.weight[:, 0])
    differences = _paired(x, y, pairs) if pairs is not None else _random_pairs(x, hit, seed)
    if method == "caa":
        return differences.mean(0)
    return torch.linalg.svd(differences, full_matrices=False).Vh[
        0
    ]  # not centred: the sign of a difference is arbitrary there


def _random_pairs(x: Tensor, hit: Tensor, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    up, down = (side[torch.randperm(len(side), generator=g)] for side in (x[hit], x[~hit]))
    count = min(len(up), len(down))
    return up[:count] - down[:count]


def _paired(x: Tensor, y: np.ndarray, pairs: np.ndarray) -> Float[Tensor, "p d"]:
    """Mean of the positive rows less mean of the negative ones, of every pair that has both."""
    names, which = np.unique(pairs, return_inverse=True)
    sums, counts = [], []
    for side in (0, 1):
        mine = torch.from_numpy(y == side)
        place = torch.from_numpy(which)[mine]
        sums.append(torch.zeros(len(names), x.shape[1], dtype=x.dtype).index_add_(0, place, x[mine]))
        counts.append(torch.bincount(place, minlength=len(names)))
    both = (counts[0] > 0) & (counts[1] > 0)
    if not bool(both.any()):
        raise UserError(
            "no pair has rows of both classes; pairs= must name the same pair for a positive and a negative prompt"
        )
    means = [total[both] / count[both, None] for total, count in zip(sums, counts, strict=True)]
    return means[1] - means[0]
