"""How an adapter of a finished run is tried: how strongly, at which layers, where and for how long; and the job of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapters.adapter import Adapter
from .adapters.blend import Blend, Schedule
from .backends.torch_hooks import check_policy
from .errors import UserError
from .summary import get, number

if TYPE_CHECKING:
    from .jobs import Job


@dataclass(frozen=True)
class PasteSettings:
    """What is changed of an adapter to try it; the default changes nothing.

    >>> from workbench.adapters import vector
    >>> from workbench.sites import Site
    >>> import torch
    >>> PasteSettings(0.5, positions="all", schedule="linear:8").of(vector(Site(2), torch.ones(4)))
    Blend(strength 0.5 at all linear:8)
    """

    strength: float = 1.0
    """a factor on the adapter's own"""
    layers: tuple[int, ...] | None = None
    """of those that the adapter edits; None: all"""
    positions: str | None = None
    """in place of the adapter's own"""
    schedule: str = "constant"
    """over the generated tokens, as `adapters.blend.Schedule` reads it"""

    def of(self, adapter: Adapter) -> Adapter | Blend:
        """The adapter under these settings.

        Raises UserError for layers that it does not edit, positions or a schedule that are not known, a schedule over
        positions that hold no generated token, and positions for an adapter that acts differently at several.
        """
        made = adapter if self.layers is None else adapter.only(self.layers)
        if self.positions is not None and self.positions != made.positions:
            if made.terms:
                raise UserError(f"this adapter acts differently at {made.positions}; take one of its terms to move it")
            made = replace(made, positions=check_policy(self.positions))
        made = made if self.strength == 1 else made * self.strength
        return made if Schedule(self.schedule).constant else Blend([made], self.schedule)

    @property
    def not_in_a_job(self) -> list[str]:
        """What of these settings a job has no place for, in words."""
        said = []
        if self.layers is not None:
            said.append("the layers: a job pastes every layer of the donor's adapter, at the layers that it forecasts")
        if self.positions is not None:
            said.append("the positions: a job takes those of the donor's adapter")
        if not Schedule(self.schedule).constant:
            said.append("the schedule: a job's paste acts throughout")
        return said


def job_of_settings(
    job: Job,
    metrics: Mapping[str, Any],
    behaviour: str,
    settings: PasteSettings,
    *,
    name: str,
    out: str | Path,
    max_new_tokens: int | None = None,
) -> Job:
    """The job of one behaviour of a finished one, at the strength of `settings`; all else is the finished job's.

    The strength is that which the finished job chose, times the factor of the settings, as a fixed number; where it chose
    a ridge converter, so is its alpha. What a job has no place for is in `settings.not_in_a_job`.
    Raises UserError for a behaviour that the job does not have, for metrics without a choice, and for a name that is none.
    """
    from .jobs import Job

    kept = [table for table in job.behaviours if table.name == behaviour]
    if not kept:
        known = ", ".join(table.name for table in job.behaviours)
        raise UserError(f"the job has no behaviour {behaviour[:80]!r}; it has {known}")
    chosen = get(metrics, "behaviours", behaviour, "forecast", "chosen")
    strength = number(get(chosen, "strength"))
    if strength is None:
        raise UserError(f"the metrics do not say which strength was chosen for {behaviour!r}; run the job to its end")
    made = job.model_dump(exclude_none=True) | {"name": name, "out": str(out)}
    made["behaviours"] = [kept[0].model_dump(exclude_none=True)]
    made["paste"] = {**made["paste"], "strength": strength * settings.strength}
    if chosen.get("method") == "ridge" and number(chosen.get("alpha")) is not None and job.paste.methods is None:
        made["paste"]["alphas"] = [chosen["alpha"]]
    if max_new_tokens is not None:
        made["evaluate"] = {**made["evaluate"], "max_new_tokens": max_new_tokens}
    return Job.parse(made, "these settings")
