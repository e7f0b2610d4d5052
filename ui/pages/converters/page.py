"""Converters: which layer answers to which between two models, and the converter of one pair of layers in every way."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import streamlit as st

from ui import held, text
from ui.opened import contents, pick_run
from ui.pages.converters.parts import against, asked_for, captured, forecasts, snippet, spectra
from ui.panels import panel, take_pair
from ui.picks import choice
from ui.settings import settings
from ui.stamps import Stamp, fits_stamp
from workbench.catalogue import Entry
from workbench.errors import UserError
from workbench.layer_matching import BY_SCORE, MATCHES, layer_scores, matched_sites
from workbench.plots import correspondence
from workbench.run_fits import SIDES, forecast_matching
from workbench.sites import Site
from workbench.summary import Metrics, get, load_metrics

if TYPE_CHECKING:
    import pandas as pd


COMMAND = "workbench demo --out {folder}"
SCORES = {"r2": "held-out R²", "cka": "CKA (debiased)", "svcca": "SVCCA"}
MATCHINGS = ("forecast", *MATCHES, "none")


def page() -> None:
    st.title("Converters")
    entry = pick_run("run", COMMAND.format(folder=settings().folder), "No finished transfer run in the opened folder.")
    for other in contents().of("run"):
        if other.state in ("stopped", "damaged"):
            text.write(f"{other.name}: {other.state}; {other.note}")
    if entry is None or not _has_profiles(entry):
        return
    metrics: Metrics = load_metrics(entry.path) if entry.state == "done" else {}
    with held.held_fits(entry.path).alone() as fits:
        donors, recipients = ([str(site) for site in store.sites] for store in (fits.donor, fits.recipient))
    donor, recipient, behaviour = _pair(metrics, donors, recipients)
    _heatmap(entry, metrics, behaviour, Site.parse(donor), Site.parse(recipient))
    st.header("The pair", divider="gray")
    spec = spectra(entry, metrics, behaviour, donor, recipient)
    if spec:
        against(entry, donor, recipient, spec)
        captured(entry, behaviour, donor, recipient, spec)
    st.header("Forecast and measurement", divider="gray")
    forecasts(entry, metrics, behaviour, donor, recipient)


def _has_profiles(entry: Entry) -> bool:
    """Whether both profiles lie in the run, as stores of the opened folder: a link that leads out of it is none."""
    there = {store.path for store in contents().of("store")}
    lacking = [side for side in SIDES if entry.path / "profiles" / side not in there]
    if lacking:
        text.missing(f"{entry.name} has no profile of the {lacking[0]}; the job makes it again:",
                     f"workbench run {entry.path}/job.toml")  # fmt: skip
    return not lacking


def _pair(metrics: Metrics, donors: list[str], recipients: list[str]) -> tuple[str, str, str]:
    """The picks of the page's pair: (donor site, recipient site, behaviour)."""
    behaviours = list(get(metrics, "behaviours") or {})
    left, right, third = st.columns(3)
    with third:
        behaviour = str(choice("Behaviour", behaviours, "behaviour")) if behaviours else ""
    chosen = get(metrics, "behaviours", behaviour, "forecast", "chosen") or {}
    with left:
        donor = choice("Donor", donors, "donor", str(chosen.get("donor_site")))
    with right:
        recipient = choice("Recipient", recipients, "recipient", str(chosen.get("recipient_site")))
    return donor, recipient, behaviour


def _heatmap(entry: Entry, metrics: Metrics, behaviour: str, donor: Site, recipient: Site) -> None:
    left, right, _ = st.columns(3)
    with left:
        by = choice("Score", SCORES.keys(), "score", help="; ".join(f"{name}: {what}" for name, what in SCORES.items()))
    with right:
        offered = [name for name in MATCHINGS if name != "forecast" or forecast_matching(metrics, behaviour)]
        match = choice("Matching drawn over it", offered, "match", help=(
            "forecast: what the run's forecast chose for the behaviour; nearest, floor, ends: by relative depth; cka, svcca, "
            "r2: the best of that score, one after the other"))  # fmt: skip
    with held.held_fits(entry.path).alone() as fits:
        work = fits.flops([*((d, fits.recipient.sites[0], 0) for d in fits.donor.sites),
                           *((fits.donor.sites[0], r, 0) for r in fits.recipient.sites)])  # fmt: skip
    if not asked_for(work, entry.path, "score-all", "To score every pair of layers"):
        return
    scores = _scores(str(entry.path), fits_stamp(entry.path), by, donor.point, recipient.point)
    matched = forecast_matching(metrics, behaviour) if match == "forecast" else None
    if match in MATCHES:
        matched = _matched(str(entry.path), fits_stamp(entry.path), match, donor.point, recipient.point)
    picked = (donor.layer, recipient.layer)
    code = _code(entry, by, match, behaviour, donor, recipient)
    panel(correspondence(scores, matched, SCORES[by], picked=picked), key="layers", code=code, notes=entry.path,
          data=lambda: _score_table(scores), select=("points",), on_select=partial(_take_layers, donor.point, recipient.point),
          remark="Click a cell to pick its pair; rings: the matching. R² is of the ridge map to the donor (alpha 0.1) on the "
          "prompts that the run held out. None of these scores says whether a paste will work.")  # fmt: skip


def _code(entry: Entry, by: str, match: str, behaviour: str, donor: Site, recipient: Site) -> str:
    """The code of the heatmap."""
    imports, line, also = "", "matched = None", ""
    if match == "forecast":
        imports, also = "from workbench.summary import load_metrics\n", "forecast_matching"
        line = f"matched = forecast_matching(load_metrics({str(entry.path)!r}), {behaviour!r})"
    elif match in MATCHES:
        imports = "from workbench.layer_matching import matched_sites\n"
        line = f"matched = matched_sites(fits, donors, recipients, {match!r})"
    return snippet(
        entry, imports + "from workbench.layer_matching import layer_scores\nfrom workbench.plots import correspondence",
        f"donors = [site for site in fits.donor.sites if site.point == {donor.point!r}]\n"
        f"recipients = [site for site in fits.recipient.sites if site.point == {recipient.point!r}]\n"
        f"scores = layer_scores(fits, donors, recipients, {by!r})\n{line}\n"
        f"figure = correspondence(scores, matched, {SCORES[by]!r}, picked={(donor.layer, recipient.layer)!r})", also,
    )  # fmt: skip


def _take_layers(donor_point: str, recipient_point: str) -> None:
    take_pair("layers", ("donor", "recipient"), lambda d, r: (f"{donor_point}.{d}", f"{recipient_point}.{r}"))


@st.cache_data(max_entries=32, show_spinner="Scoring every pair of layers …")
def _scores(path: str, stamp: Stamp, by: str, donor: str, recipient: str) -> dict[tuple[int, int], float]:
    if by not in BY_SCORE:
        raise UserError(f"unknown score of layers {by!r}")
    with held.held_fits(Path(path)).alone() as fits:
        mine, theirs = (
            [s for s in fits.donor.sites if s.point == donor],
            [s for s in fits.recipient.sites if s.point == recipient],
        )
        return layer_scores(fits, mine, theirs, by)


@st.cache_data(max_entries=32, show_spinner="Matching the layers …")
def _matched(path: str, stamp: Stamp, match: str, donor: str, recipient: str) -> dict[int, int]:
    with held.held_fits(Path(path)).alone() as fits:
        mine, theirs = (
            [s for s in fits.donor.sites if s.point == donor],
            [s for s in fits.recipient.sites if s.point == recipient],
        )
        return matched_sites(fits, mine, theirs, match)


def _score_table(scores: dict[tuple[int, int], float]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame([{"donor_layer": d, "recipient_layer": r, "score": v} for (d, r), v in scores.items()])
