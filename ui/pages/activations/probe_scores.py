"""Rows coloured by what a probe says of them: one that was saved in the opened folder, or one that is trained here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamlit as st
import torch

from probes.labels import label_columns
from probes.linear import train_probes
from probes.probe import Probe
from probes.row_scores import RowScores, score_rows
from ui import text
from ui.held import rows_of
from ui.opened import contents
from ui.picks import choice
from ui.settings import settings
from ui.stamps import Stamp, probe_stamp, store_stamp
from workbench.catalogue import Entry
from workbench.errors import UserError
from workbench.fingerprint import difference_of
from workbench.sites import Site
from workbench.store import Store

SCORE = "a probe's score"
"""what stands among the colours"""
MOST_ROWS = 2_000
"""rows that a probe trained here sees, those held out among them: it is for a look, the Probes page for figures"""
NOT_CLASSES = ("token_id", "text")


@dataclass(frozen=True)
class Reader:
    """A probe at a site, and the class that its score is of."""

    store: Path
    stamp: Stamp
    """of the store"""
    site: str
    label: str
    """what it is trained on here; "" for a saved one"""
    saved: Path | None = None
    saved_stamp: Stamp = ()
    target: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Those of `train_probes`."""
        found: dict[str, Any] = {"sites": [self.site], "controls": (), "words": False, "max_rows": MOST_ROWS}
        return found | ({"quantity": True, "kind": "ridge"} if self.label == "position" else {})

    @property
    def imports(self) -> str:
        """The lines of a snippet that import what `code` needs."""
        probe = "from probes.probe import Probe" if self.saved else "from probes.linear import train_probes"
        return f"{probe}\nfrom probes.row_scores import score_rows\n"

    @property
    def code(self) -> str:
        """The lines of a snippet that make `scores` of the rows in `rows` of the store in `store`."""
        made = f"probe = Probe.load({str(self.saved)!r})"
        if self.saved is None:
            options = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
            device = f", device={settings().device!r}" if settings().device else ""
            made = f"probe = train_probes(store, {self.label!r}, {options}{device}).at({self.site!r}).probe"
        return f"{made}\nscores = score_rows(store, probe, rows, target={self.target!r})\n"


def picked(store: Store, site: str) -> Reader | None:
    """The picks of a probe that reads a site; None, and a line on why, where there is none."""
    saved = {_group(entry, site): entry for entry in contents().of("saved probe") if _fits(entry, store, site)}
    trained = [name for name in label_columns(store) if name not in NOT_CLASSES]
    options = {("saved", name): f"{name} ({entry.facts['label']})" for name, entry in saved.items()}
    options |= {("label", name): f"trained here on {name}" for name in trained}
    left, right, _ = st.columns([5, 3, 7])
    with left:
        if not options:
            text.missing("No probe of this site, and no label to train one on.",
                         f"workbench probe {store.path} --label LABEL --out {settings().folder}/probe")  # fmt: skip
            return None
        how, name = choice("Probe", options, "probe")
    stamp = store_stamp(store)
    found = Reader(store.path, stamp, site, name)
    if how == "saved":
        found = Reader(store.path, stamp, site, "", saved[name].path, probe_stamp(saved[name].path))
    try:
        probe = probe_of(found)
    except UserError as err:
        text.problem(err)
        return None
    if not probe.classes:
        return found
    with right:
        target = choice("Score of", reversed(probe.classes), "class")
    return Reader(found.store, stamp, site, found.label, found.saved, found.saved_stamp, str(target))


def scored(reader: Reader, rows: torch.Tensor) -> RowScores:
    """The score of rows of the store."""
    return score_rows(rows_of(reader.store), probe_of(reader), rows, target=reader.target)


def told(reader: Reader) -> str:
    """How well the probe reads, on prompts that it has not seen, and what to mind."""
    probe = probe_of(reader)
    known = probe.meta.get("held_out")
    figure = ""
    if isinstance(known, dict) and isinstance(known.get("value"), float):
        word = "accuracy" if probe.classes else "R²"
        figure = f"; {word} {known['value']:.3f} on {known.get('prompts', '?')} prompts that it has not seen"
    return (f"Coloured by a {probe.kind} probe of {probe.label} at {probe.site}{figure}. Rows of prompts that it learned from "
            "are among those drawn.")  # fmt: skip


def probe_of(reader: Reader) -> Probe:
    """The probe, loaded or trained once for all classes; UserError for one that is damaged or cannot be trained."""
    return _probe(Reader(reader.store, reader.stamp, reader.site, reader.label, reader.saved, reader.saved_stamp))


@st.cache_resource(max_entries=16, show_spinner="Training a probe …")
def _probe(reader: Reader) -> Probe:
    if reader.saved is not None:
        return Probe.load(reader.saved)
    return train_probes(rows_of(reader.store), reader.label, **reader.options).at(reader.site).probe


def _group(entry: Entry, site: str) -> str:
    """The name without the site: a run of probes has one at each, and another site takes that of the same run."""
    return entry.name.removesuffix(f"/{site}")


def _fits(entry: Entry, store: Store, site: str) -> bool:
    """Whether a saved probe is of the store's model and reads the site."""
    if entry.state != "whole" or entry.facts["site"] != str(Site.parse(site)):
        return False
    return difference_of(entry.facts["base"], store.fingerprint) is None
