"""What a probe is worth elsewhere: on other prompts, at another layer or in another model, through a map, and what was lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from workbench.errors import UserError
from workbench.evaluate.statistics import Interval
from workbench.fingerprint import difference_of
from workbench.maps.linear_map import LinearMap
from workbench.sites import Site
from workbench.store import Store
from workbench.store.resident import ResidentRows

from .held_out_scores import HeldOut, class_scores, difference, quantity_scores
from .labels import Labels, labels_of
from .linear import MOST_ROWS, _Task
from .probe import Probe
from .solvers import PENALTY, Solver

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Transfer:
    """A probe away from home, on rows of prompts that neither it nor the probe trained there has seen."""

    probe: Probe
    """as it reads there: through the map, where there is one"""
    moved: HeldOut
    native: HeldOut
    """of a probe of the same kind trained there"""
    unmapped: HeldOut | None
    """of the probe as it was, without the map, where the widths agree"""
    lost: Interval
    """native less moved (accuracy, or R2), resampled together"""
    home: Interval | None
    """where it was trained, on prompts held out there"""

    def __repr__(self) -> str:
        return (f"Transfer({self.probe.label!r} at {self.probe.site}: {self.moved.headline}, trained there "
                f"{self.native.headline}, lost {self.lost})")  # fmt: skip

    def frame(self) -> pd.DataFrame:
        """One line each for home, moved, unmapped and native."""
        import pandas as pd

        name = "accuracy" if self.probe.classes else "r2"
        lines: list[dict[str, Any]] = []
        if self.home is not None:
            lines.append(
                {"arm": "home", name: self.home.value, f"{name}_low": self.home.low, f"{name}_high": self.home.high}
            )
        arms = {"moved": self.moved, "unmapped": self.unmapped, "native": self.native}
        lines += [{"arm": arm, **found.line()} for arm, found in arms.items() if found is not None]
        return pd.DataFrame(lines).set_index("arm")

    def _repr_html_(self) -> str:
        from html import escape

        return f"<p>{escape(repr(self))}</p>" + self.frame().to_html(float_format=lambda v: f"{v:.3f}")


def probe_score(
    probe: Probe, store: Store | ResidentRows, label: Any = None, *, positions: str = "", max_rows: int = MOST_ROWS,
    allow_mismatch: bool = False, seed: int = 0,
) -> HeldOut:  # fmt: skip
    """A probe's figures on a store of its own model, over the prompts that it has not seen.

    label, positions: those that it was trained on unless given. Raises UserError for a store of another model, one whose
    every prompt it has seen, and classes that it does not know.
    """
    rows = store if isinstance(store, ResidentRows) else ResidentRows(store, keep=False)
    check_base(probe, rows.store.fingerprint, rows.store.name, allow_mismatch)
    task = _task(probe, rows, label, positions, 0.5, max_rows, seed)
    fresh = np.flatnonzero(~np.isin(task.labels.groups, probe.seen.numpy()))
    if not len(fresh):
        raise UserError(f"the probe was trained on every prompt of store {rows.store.path}; score it on others")
    known = task.labels.take(fresh)
    x = rows.take(probe.site, torch.from_numpy(known.rows)).float()
    return _figures(probe, x, known, None, seed)


def transfer_probe(
    probe: Probe, store: Store | ResidentRows, label: Any = None, operator: LinearMap | None = None, *,
    site: Site | str | int | None = None, positions: str = "", holdout: float = 0.25, max_rows: int = MOST_ROWS,
    allow_mismatch: bool = False, seed: int | None = None,
) -> Transfer:  # fmt: skip
    """A probe at a site of another store, beside one trained there.

    Args:
        label, positions: those of the probe unless given.
        operator: a map from `site` to where the probe reads: of a TransportGrid, or a converter's `to_donor`; None: the rows
            as they are, for another data set of the same model.
        site: where the rows are taken; the probe's own unless given.
        holdout, seed: of the split there; the probe's seed unless given, which holds out the same prompts.

    Raises UserError for widths that do not fit, another model without a map, or where no prompt is unseen by both.
    """
    rows = store if isinstance(store, ResidentRows) else ResidentRows(store, keep=False)
    place = Site.parse(probe.site if site is None else site)
    if operator is None:
        check_base(probe, rows.store.fingerprint, rows.store.name, allow_mismatch)
    there = probe if operator is None else probe.through(operator, place, rows.store.fingerprint)
    number = int(probe.meta.get("seed", 0)) if seed is None else seed
    task = _task(probe, rows, label, positions, holdout, max_rows, number)
    test = task.test & ~np.isin(task.labels.groups, probe.seen.numpy())
    if not test.any():
        raise UserError(f"no prompt of store {rows.store.path} is unseen by both the probe and the one trained there; give "
                        "more prompts")  # fmt: skip
    x = rows.take(place, torch.from_numpy(task.labels.rows)).float()
    if x.shape[1] != there.width:
        raise UserError(f"{place} of store {rows.store.path} has width {x.shape[1]} and the probe reads width {there.width}; "
                        "give a map from there to it")  # fmt: skip
    whole = torch.isfinite(x).all(1).cpu().numpy()
    learn, test = ~task.test & whole, test & whole
    solver = Solver(probe.kind, len(probe.classes), float(probe.meta.get("penalty", PENALTY[probe.kind])), rows.device)
    made = solver.fit(x[torch.from_numpy(learn).to(x.device)], task.labels.values[learn])
    native_probe = Probe(
        torch.from_numpy(made.weight).float(), torch.from_numpy(made.bias).float(), probe.classes, place
    )
    mine, tested = task.labels.take(np.flatnonzero(test)), x[torch.from_numpy(test).to(x.device)]
    mean = float(task.labels.values[learn].mean())
    moved, native = (_figures(p, tested, mine, mean, number) for p in (there, native_probe))
    unmapped = None
    if operator is not None and operator.d_in == operator.d_out:
        unmapped = _figures(probe, tested, mine, mean, number)
    home = probe.meta.get("held_out", {})
    known = {"value", "low", "high"} <= set(home)
    return Transfer(there, moved, native, unmapped, difference(native, moved),
                    Interval(home["value"], home["low"], home["high"]) if known else None)  # fmt: skip


def check_base(probe: Probe, fingerprint: Mapping[str, str], name: str, allow_mismatch: bool = False) -> None:
    """UserError where the probe is of another model than the one of this fingerprint, naming both."""
    why = None if allow_mismatch or not probe.base or not fingerprint else difference_of(probe.base, fingerprint)
    if why:
        raise UserError(f"this probe belongs to {probe.base.get('name', 'another model')}, not to {name}: {why}; give a map, "
                        "or pass allow_mismatch=True")  # fmt: skip


def _task(probe: Probe, rows: ResidentRows, label: Any, positions: str, holdout: float, most: int, seed: int) -> _Task:
    wanted = probe.label if label is None else label
    known = labels_of(rows.store, wanted, classes=probe.classes or None, quantity=not probe.classes)
    if known.classes != probe.classes:
        lacking = [c for c in probe.classes if c not in known.classes]
        raise UserError(f"store {rows.store.path} has too few prompts of {', '.join(map(repr, lacking))[:120]} to score this "
                        "probe on")  # fmt: skip
    return _Task.of(rows, known, positions or str(probe.meta.get("positions", "all")), holdout, most, seed)


def _figures(probe: Probe, x: torch.Tensor, known: Labels, mean: float | None, seed: int) -> HeldOut:
    y = known.values
    if not probe.classes:
        centre = float(y.mean()) if mean is None else mean
        return quantity_scores(probe.score(x).double().cpu().numpy(), y, known.groups, centre, seed=seed)
    chance = float(np.bincount(y).max() / len(y))
    return class_scores(probe.probabilities(x).double().cpu().numpy(), y, known.groups, chance, seed=seed)
