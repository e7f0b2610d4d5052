"""The verdict on each feature: transported, rotated or synthesised, with its evidence and its thresholds in the open."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import UserError
from workbench.maps.linear_map import LinearMap

from .dictionaries import Dictionary
from .features import Batch, FeatureMetrics, measure_features

if TYPE_CHECKING:
    import pandas as pd

VERDICTS = ("transported", "rotated", "synthesised", "mixed", "rare")


@dataclass(frozen=True)
class Thresholds:
    """What a verdict is decided by. All are shares of a feature's variance, but for `count`."""

    predicted: float = 0.5
    """the operator predicts a feature where its R2 is at least this ..."""
    margin: float = 0.1
    """... and exceeds that of the shuffled-pairs operator by this"""
    carried: float = 0.5
    """the identity carries it where the squared Pearson correlation of <x, u> with <y, u> is at least this"""
    unpredicted: float = 0.3
    """a feature is synthesised where the operator's R2 is below this; in between, it is mixed"""
    count: int = 20
    """a feature that fires on fewer tokens is rare: nothing is said of it"""
    tokens: str = "active"
    """`active`: R2 and correlation are taken over the tokens where the feature fires; `all`: over all"""

    def __post_init__(self) -> None:
        if not self.unpredicted <= self.predicted:
            raise UserError(f"unpredicted={self.unpredicted} must not exceed predicted={self.predicted}")
        if self.tokens not in ("active", "all"):
            raise UserError(f"tokens must be 'active' or 'all'; got {self.tokens!r}")


@dataclass(frozen=True, eq=False)
class FeatureVerdicts:
    """One verdict per feature, and what it rests on."""

    verdict: tuple[str, ...]
    thresholds: Thresholds
    operator: FeatureMetrics
    identity: FeatureMetrics
    control: FeatureMetrics | None

    def __repr__(self) -> str:
        return "FeatureVerdicts(" + ", ".join(f"{n} {name}" for name, n in self.counts.items()) + ")"

    @property
    def counts(self) -> dict[str, int]:
        """How many features got each verdict."""
        return {name: self.verdict.count(name) for name in VERDICTS}

    def frame(self) -> pd.DataFrame:
        """One line per feature: its verdict, the evidence (`r2`, `identity_r2`, `control_r2`), then the operator's
        figures. The thresholds lie in `.attrs`."""
        found = self.operator.frame()
        suffix = "" if self.thresholds.tokens == "active" else "_all"
        found.insert(0, "verdict", self.verdict)
        found.insert(1, "identity_carries", _carried(self.identity, suffix).numpy())
        found.insert(2, "identity_r2", getattr(self.identity, "r2" + suffix).numpy())
        missing = torch.full_like(self.operator.r2, torch.nan)
        control = missing if self.control is None else getattr(self.control, "r2" + suffix)
        found.insert(3, "control_r2", control.numpy())
        found.attrs["thresholds"] = asdict(self.thresholds)
        return found


def feature_verdicts(
    operator: LinearMap,
    dictionary: Dictionary,
    batches: Iterable[Batch],
    *,
    control: LinearMap | None = None,
    thresholds: Thresholds | None = None,
    features: Sequence[int] | Int[Tensor, " f"] | None = None,
    firing: float = 1e-6,
    shards: int = 20,
) -> FeatureVerdicts:
    """Says of each feature whether it was carried to its layer linearly, and whether in place.

    - transported: the operator predicts it, and so does <x, u_f> itself, the read-out of the source along the feature's
      own decoder direction (up to a scale and an offset, which are not counted against it): it lay there already;
    - rotated: the operator predicts it from other directions of the source;
    - synthesised: no linear prediction: it was made on the way, or is not linear in the source;
    - mixed: predicted in part; rare: too few firing tokens to tell.

    control: the operator fitted to shuffled pairs; what it predicts is no evidence. For the other arguments see
    `measure_features`. Raises UserError as that does, and where source and target differ in width: the identity then
    says nothing.
    """
    if operator.d_in != operator.d_out:
        raise UserError(f"verdicts compare an operator with the identity, so its widths must be equal; got "
                        f"{operator.d_in} -> {operator.d_out}")  # fmt: skip
    arms = {"operator": operator, "identity": LinearMap.identity(operator.d_in)}
    if control is not None:
        arms["control"] = control
    made = measure_features(arms, dictionary, batches, features=features, firing=firing, shards=shards)
    return judge(made["operator"], made["identity"], made.get("control"), thresholds)


def judge(
    operator: FeatureMetrics,
    identity: FeatureMetrics,
    control: FeatureMetrics | None = None,
    thresholds: Thresholds | None = None,
) -> FeatureVerdicts:
    """The verdicts from figures that are there already, so that other thresholds cost nothing."""
    limits = thresholds or Thresholds()
    suffix = "" if limits.tokens == "active" else "_all"
    r2, carried = getattr(operator, "r2" + suffix), _carried(identity, suffix)
    by_chance = torch.full_like(r2, torch.nan) if control is None else getattr(control, "r2" + suffix)
    return FeatureVerdicts(
        _decided(r2, by_chance, carried, operator.count, limits), limits, operator, identity, control
    )


def judge_frame(table: pd.DataFrame, thresholds: Thresholds | None = None) -> pd.DataFrame:
    """A table of verdicts (`FeatureVerdicts.frame()`, or lines of a transport run's features.parquet) under other
    thresholds: the same lines with the column `verdict` anew, the thresholds in `.attrs`.

    The table must have been made over the tokens that the thresholds name; those of a run are over the firing ones.
    Raises UserError where a column is missing.
    """
    limits = thresholds or Thresholds()
    columns = ("r2", "control_r2", "identity_carries", "count")
    if missing := [name for name in columns if name not in table]:
        raise UserError(f"this is no table of verdicts: it has no column {', '.join(missing)}")
    r2, by_chance, carried, count = (torch.tensor(table[name].to_numpy(dtype="float64")) for name in columns)
    made = table.assign(verdict=_decided(r2, by_chance, carried, count, limits))
    made.attrs["thresholds"] = asdict(limits)
    return made


def _decided(r2: Tensor, by_chance: Tensor, carried: Tensor, count: Tensor, limits: Thresholds) -> tuple[str, ...]:
    """by_chance: R2 of the control, NaN where there is none."""
    by_chance = by_chance.clamp_min(0).nan_to_num(0)
    predicted = (r2 >= limits.predicted) & (r2 - by_chance >= limits.margin)
    absent = (r2 < limits.unpredicted) | (r2 - by_chance < limits.margin)
    rare = (count < limits.count) | r2.isnan()
    place = torch.where(predicted, torch.where(carried >= limits.carried, 0, 1), torch.where(absent, 2, 3))
    return tuple(VERDICTS[i] for i in torch.where(rare, 4, place).tolist())


def _carried(identity: FeatureMetrics, suffix: str) -> Float[Tensor, " f"]:
    """The share of the truth's variance that <x, u> predicts with a slope of its own; 0 where the slope is negative."""
    return getattr(identity, "pearson" + suffix).clamp_min(0).square()
