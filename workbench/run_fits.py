"""What a transfer run fitted its converters on, opened again: its paired profiles, and the layers that its forecast chose."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .convert import ConverterFits
from .errors import UserError
from .jobs import Job
from .sites import Site
from .store import Store
from .summary import get

SIDES = ("donor", "recipient")


def fits_of_run(folder: str | Path) -> ConverterFits:
    """The fits between the two profiles of a transfer run, with its holdout, seed and pairing; nothing is factorised yet.

    No model is loaded. Raises UserError where the run has no profiles, or no job that can be read.

    >>> fits_of_run("runs/demo").converter(Site(3), Site(2)).quality_to_donor.r2_weighted         # doctest: +SKIP
    """
    folder = Path(folder)
    job = Job.load(folder / "job.toml")
    lacking = [side for side in SIDES if not (folder / "profiles" / side).is_dir()]
    if lacking:
        raise UserError(
            f"{folder} has no profile of the {lacking[0]}; run its job (again): workbench run {folder}/job.toml"
        )
    donor, recipient = (Store.open(folder / "profiles" / side) for side in SIDES)
    return ConverterFits(donor, recipient, job.profile.holdout, job.seed, pairing=job.profile.pairing)


def forecast_matching(metrics: Mapping[str, Any], behaviour: str) -> dict[int, int]:
    """{donor layer: recipient layer} that the forecast of a behaviour chose; {} where it has none."""
    chosen = get(metrics, "behaviours", behaviour, "forecast", "chosen")
    pairs = get(chosen, "pairs") or ([[chosen["donor_site"], chosen["recipient_site"]]] if chosen else [])
    return {Site.parse(donor).layer: Site.parse(recipient).layer for donor, recipient in pairs}
