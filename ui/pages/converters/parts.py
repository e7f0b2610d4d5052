"""The panels of one pair of the Converters page: spectra, predicted against actual, capture of the adapter, forecasts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from ui import held, text
from ui.opened import contents
from ui.panels import lines, panel
from ui.picks import choice
from ui.stamps import Stamp, adapter_stamp, fits_stamp
from workbench.adapters.adapter import Adapter
from workbench.captures import MapCapture, capture_of_maps
from workbench.catalogue import Entry
from workbench.convert import Converter
from workbench.converter_files import quality_rows
from workbench.converter_plots import capture_curves, map_spectra, predicted_against_actual
from workbench.errors import UserError
from workbench.maps.agreement import Agreement, agreement_of
from workbench.paste import capture
from workbench.plots import candidates, forecast
from workbench.sites import Site
from workbench.summary import Metrics, get

if TYPE_CHECKING:
    import pandas as pd

SPECS = (
    "ridge:0.01",
    "ridge:0.1",
    "ridge:1",
    "ridge:cv",
    "pinv",
    "procrustes",
    "rrr:16",
    "pls:32",
    "whitened",
    "cycle:1",
)
WAYS = ("to_donor", "to_recipient")
WAITED, PACE = 2e11, 2e10
"""FLOPs of factorising that are done without being asked for, and what a slow core does in a second"""
COLUMNS = ("method", "alpha", "strength", "on", "measured_on", "off", "kl", "sigma", "chosen")


def snippet(entry: Entry, imports: str, last: str, also: str = "") -> str:
    """The code of a panel: the fits of the run in `fits`, then the figure; also: another name of workbench.run_fits."""
    imported = sorted([f"from workbench.run_fits import fits_of_run{also and f', {also}'}", *imports.splitlines()])
    return "\n".join([*imported, "", f"fits = fits_of_run({str(entry.path)!r})", last])


def asked_for(work: float, run: Path, key: str, what: str) -> bool:
    """Whether work of so many FLOPs is done: at once where it takes seconds, else when its button, `key`, was pressed."""
    asked = f"_{key}-{run}"
    if work <= WAITED or st.session_state.get(asked):
        return True
    text.remark(f"{what} takes about {max(1, work / PACE / 60):,.0f} minutes of one core.")
    if st.button("Go ahead", key=key):
        st.session_state[asked] = True
    return bool(st.session_state.get(asked))


def spectra(entry: Entry, metrics: Metrics, behaviour: str, donor: str, recipient: str) -> str:
    """The pick of a converter, its quality and the spectra of its maps; returns its spec, empty where it is not fitted."""
    chosen = get(metrics, "behaviours", behaviour, "forecast", "chosen") or {}
    used = f"ridge:{chosen['alpha']:g}" if chosen.get("method") == "ridge" else str(chosen.get("method", ""))
    spec = str(choice("Converter", list(dict.fromkeys([*([used] if used else []), *SPECS])), "converter", used))
    with held.held_fits(entry.path).alone() as fits:
        work = fits.flops([(Site.parse(donor), Site.parse(recipient), 0)])
    if not asked_for(work, entry.path, "fit", "To fit the converter of the pair"):
        return ""
    made = converter(entry.path, donor, recipient, spec)
    lines(quality_table([made]), "quality")
    text.remark("On the prompts that the run held out. r2_identity_bias: the state itself plus a constant, where widths agree; "
                "cycle error: 0 is perfect, 1 no better than the mean.")  # fmt: skip
    st.subheader("Spectrum of the maps")
    code = snippet(entry, "from workbench.converter_plots import map_spectra\nfrom workbench.sites import Site",
                   f"{_fit(donor, recipient, spec)}\nfigure = map_spectra(made)")  # fmt: skip
    panel(map_spectra(made), key="spectrum", code=code, data=lambda: _values(made), notes=entry.path,
          remark="Singular values up to the numerical rank of each map.")  # fmt: skip
    return spec


def against(entry: Entry, donor: str, recipient: str, spec: str) -> None:
    """Predicted against actual, of the prompts that were held out."""
    st.subheader("Predicted against actual")
    way = choice("Map", WAYS, "way", help="to_donor: what an adapter is read through; to_recipient: the way back")
    try:
        found = _agreement(str(entry.path), fits_stamp(entry.path), donor, recipient, spec, way)
    except UserError as err:
        text.problem(err)
        return
    code = snippet(entry, "from workbench.converter_plots import predicted_against_actual\n"
                   "from workbench.maps.agreement import agreement_of\nfrom workbench.sites import Site",
                   f"{_fit(donor, recipient, spec)}\n"
                   f"donor = fits.states('donor', Site.parse({donor!r}), held=True)\n"
                   f"recipient = fits.states('recipient', Site.parse({recipient!r}), held=True)\n"
                   f"figure = predicted_against_actual(agreement_of(made.{way}, {_order(way)}))")  # fmt: skip
    panel(predicted_against_actual(found), key="against", code=code, data=lambda: _cells(found), notes=entry.path,
          remark=f"All {int(found.counts.sum()):,} values are counted in cells: {found.n_rows:,} held-out rows x "
          f"{found.n_outputs:,} dimensions; {found.outside:,} lie beyond {found.edges[-1]:g} standard deviations and are in "
          f"the outermost cells. R² {found.r2_uniform:.3f} (mean over dimensions), {found.r2_weighted:.3f} (weighted by "
          "variance).")  # fmt: skip


def captured(entry: Entry, behaviour: str, donor: str, recipient: str, spec: str) -> None:
    """How much of the donor's adapter lies in what the converter carries."""
    st.subheader("Read and write capture of the adapter")
    path = entry.path / "adapters" / behaviour / "donor"
    if not behaviour or path not in {adapter.path for adapter in contents().of("adapter")}:
        text.missing("The run has no adapter of the donor for a behaviour; its job makes one:",
                     f"workbench run {entry.path}/job.toml")  # fmt: skip
        return
    try:
        terms = _adapter(str(path), adapter_stamp(path)).split()
    except UserError as err:
        text.problem(err)
        return
    places = {f"{site}{f', {term.positions}' if len(terms) > 1 else ''}": (i, site) for i, term in enumerate(terms)
              for site in term.parts}  # fmt: skip
    mine = [name for name, (_, site) in places.items() if str(site) == donor]
    if not mine:
        text.write(
            f"The donor's adapter of {behaviour} edits {', '.join(places)}, not {donor}: pick a donor layer that it edits."
        )
        return
    i = places[mine[0]][0]
    part = terms[i].parts[Site.parse(donor)]
    made = converter(entry.path, donor, recipient, spec)
    found: MapCapture = capture_of_maps(part, made.to_donor, made.to_recipient)
    with held.held_fits(entry.path).alone() as fits:
        span = capture(part, fits.states("donor", Site.parse(donor)))
    code = snippet(entry, "from workbench.adapters.adapter import Adapter\nfrom workbench.captures import capture_of_maps\n"
                   "from workbench.converter_plots import capture_curves\nfrom workbench.sites import Site",
                   f"{_fit(donor, recipient, spec)}\n"
                   f"part = Adapter.load({str(path)!r}).split()[{i}].parts[Site.parse({donor!r})]\n"
                   "figure = capture_curves(capture_of_maps(part, made.to_donor, made.to_recipient))")  # fmt: skip
    panel(capture_curves(found), key="capture", code=code, data=found.frame, notes=entry.path,
          remark="Share of the length of the adapter's V (read) and U (write) in the leading directions of the map to the "
          "donor and of the map back; grey: an adapter of this rank without structure. In the span of the donor's profile lie "
          f"{span.read:.3f} (read) and {span.write:.3f} (write).")  # fmt: skip
    if span.warning:
        text.remark(span.warning)


def forecasts(entry: Entry, metrics: Metrics, behaviour: str, donor: str, recipient: str) -> None:
    """Forecast beside measured, per candidate."""
    one = {"behaviours": {behaviour: get(metrics, "behaviours", behaviour)}} if behaviour else {}
    if not candidates(one):
        text.missing("This run has no candidates that were forecast; in its job, set match = \"forecast\" and run it again:",
                     f"workbench run {entry.path}/job.toml")  # fmt: skip
        return
    code = f"""
from workbench.plots import forecast
from workbench.summary import load_metrics

metrics = load_metrics({str(entry.path)!r})
figure = forecast({{"behaviours": {{{behaviour!r}: metrics["behaviours"][{behaviour!r}]}}}})
"""
    table = candidate_table(one)
    panel(forecast(one), key="forecast", code=code, data=lambda: table, notes=entry.path,
          remark="One point for each candidate that was measured; the ring: what was pasted.")  # fmt: skip
    here = table[(table["donor_site"] == donor) & (table["recipient_site"] == recipient)]
    if here.empty:
        text.write(f"No candidate pastes {donor} to {recipient}.")
        return
    lines(here[[name for name in COLUMNS if name in here]], "candidates")
    text.remark("The candidates of this pair. on, off: forecast change of log-odds (nats); measured_on: as measured on "
                "validation prompts, where it was; sigma: length in standard deviations of the recipient's profile."
                )  # fmt: skip


def candidate_table(metrics: Metrics) -> pd.DataFrame:
    """The candidates of a run, one line each."""
    import pandas as pd

    lines = [{k: v for k, v in c.items() if not isinstance(v, dict | list)} for c in candidates(metrics)]
    return pd.DataFrame(lines)


def quality_table(converters: list[Converter]) -> pd.DataFrame:
    """The quality of both maps of some converters, a line each."""
    import pandas as pd

    return pd.DataFrame(quality_rows(converters))


def converter(run: Path, donor: str, recipient: str, spec: str) -> Converter:
    """The converter of a pair, fitted once for all sessions."""
    return _converter(str(run), fits_stamp(run), donor, recipient, spec)


@st.cache_resource(max_entries=32, show_spinner="Fitting the converter …")
def _converter(path: str, stamp: Stamp, donor: str, recipient: str, spec: str) -> Converter:
    with held.held_fits(Path(path)).alone() as fits:
        return fits.converter(Site.parse(donor), Site.parse(recipient), spec)


@st.cache_data(max_entries=32, show_spinner="Counting the held-out rows …")
def _agreement(path: str, stamp: Stamp, donor: str, recipient: str, spec: str, way: str) -> Agreement:
    made = converter(Path(path), donor, recipient, spec)
    with held.held_fits(Path(path)).alone() as fits:
        rows = [
            fits.states("donor", Site.parse(donor), held=True),
            fits.states("recipient", Site.parse(recipient), held=True),
        ]
    return agreement_of(getattr(made, way), *(rows[::-1] if way == "to_donor" else rows))


@st.cache_resource(max_entries=16, show_spinner=False)
def _adapter(path: str, stamp: Stamp) -> Adapter:
    return Adapter.load(path)


def _fit(donor: str, recipient: str, spec: str) -> str:
    return f"made = fits.converter(Site.parse({donor!r}), Site.parse({recipient!r}), {spec!r})"


def _order(way: str) -> str:
    return "recipient, donor" if way == "to_donor" else "donor, recipient"


def _values(made: Converter) -> pd.DataFrame:
    import pandas as pd

    return pd.concat([pd.DataFrame({"map": side, "direction": range(1, len(values) + 1), "singular_value": values})
                      for side in WAYS for values in [getattr(made, side).singular_values.tolist()]])  # fmt: skip


def _cells(found: Agreement) -> pd.DataFrame:
    import pandas as pd

    low, counts = found.edges[:-1].tolist(), found.counts
    lines: list[dict[str, Any]] = [{"actual_from": low[i], "predicted_from": low[j], "values": int(counts[i, j])}
                                   for i, j in counts.nonzero().tolist()]  # fmt: skip
    return pd.DataFrame(lines)
