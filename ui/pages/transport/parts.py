"""The parts of the Transport page that a run may lack: efficiency, features, causal figures and shortcuts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import streamlit as st

from probes.transport_job import TransportJob, command_of, job_of
from probes.transport_results import TransportResults
from probes.verdicts import VERDICTS, Thresholds, judge_frame
from ui import text
from ui.panels import lines, panel
from workbench.catalogue import Entry
from workbench.errors import UserError
from workbench.transport_pair_plots import MOST_FEATURES, efficiency_of_pair, features_of_pair, subspace_sizes
from workbench.transport_plots import causal_points, shortcut_points, verdict_bars

if TYPE_CHECKING:
    import pandas as pd

MOST_LINES = 5_000
"""of the table of features"""
SHOWN = ("feature", "verdict", "fires on", "count", "r2", "r2_low", "r2_high", "identity_carries", "control_r2", "f1")


def efficiency(run: TransportResults, entry: Entry, source: str, target: str) -> None:
    """Efficiency against rank, and the size of the subspace three ways."""
    st.subheader("Efficiency by rank")
    table, size = run.of_pair("efficiency", source, target), run.size_of(source, target)
    if table is None:
        _lacks(run, entry, "The efficiency of this pair is", "efficiency of", {})
        return
    code = snippet(entry, "from workbench.transport_pair_plots import efficiency_of_pair",
                 f"figure = efficiency_of_pair(run.of_pair('efficiency', {source!r}, {target!r}))")  # fmt: skip
    panel(efficiency_of_pair(table), key="efficiency", code=code, data=lambda: table, notes=entry.path,
          remark="Solid, dashed and dotted: on held-out rows; the efficiency is a share of the dotted bound. The ceiling is of "
          "the training rows, in sample, and counts their noise.")  # fmt: skip
    if size is None:
        return
    st.subheader("Size of the transport subspace")
    code = snippet(entry, "from workbench.transport_pair_plots import subspace_sizes",
                 f"figure = subspace_sizes(run.size_of({source!r}, {target!r}))")  # fmt: skip
    panel(subspace_sizes(size), key="size", code=code, data=lambda: _one_line(size), notes=entry.path,
          remark="From the canonical correlations ρ of source and target over all rows, and by cross-fitting. Grey ticks: "
          "independent rows of this shape.")  # fmt: skip


def features(run: TransportResults, entry: Entry, source: str, target: str) -> None:
    """The verdicts of a dictionary's features, under thresholds that can be moved."""
    st.subheader("Features")
    table = run.of_pair("features", source, target)
    if table is None:
        _lacks(run, entry, "No dictionary was read at this target, so its features are", "",
               {"dictionaries": (*job_of(entry.facts["job"]).dictionaries, f"{target}=FOLDER")})  # fmt: skip
        return
    _verdicts(table, entry, source, target)


@st.fragment
@text.told
def _verdicts(table: pd.DataFrame, entry: Entry, source: str, target: str) -> None:
    try:
        limits = _thresholds()
        judged = judge_frame(table, limits)
    except UserError as err:
        text.problem(err)
        return
    call = f"judge_frame(run.of_pair('features', {source!r}, {target!r}), {limits!r})"
    imports = "from probes.verdicts import Thresholds, judge_frame\nfrom workbench.transport_pair_plots import features_of_pair"
    code = snippet(entry, imports, f"figure = features_of_pair({call}, {source!r}, {target!r})")
    counts = {verdict: int((judged["verdict"] == verdict).sum()) for verdict in VERDICTS}
    bars_code = snippet(
        entry, "from probes.verdicts import VERDICTS, Thresholds, judge_frame\n"
        "from workbench.transport_plots import verdict_bars", f"table = {call}\n"
        f"counts = {{verdict: int((table['verdict'] == verdict).sum()) for verdict in VERDICTS}}\n"
        f"figure = verdict_bars([{{'source': {source!r}, 'target': {target!r}, **counts}}])")  # fmt: skip
    panel(verdict_bars([{"source": source, "target": target, **counts}]), key="verdicts", code=bars_code, notes=entry.path,
          data=lambda: _one_line(counts))  # fmt: skip
    panel(features_of_pair(judged, source, target), key="features", code=code, data=lambda: judged, notes=entry.path,
          remark=f"Each point is a feature, over the held-out tokens on which it fires; at most {MOST_FEATURES:,} are drawn, "
          "each verdict in its share. Up: the map predicts how strongly it fires; right: it lay there already.")  # fmt: skip
    _feature_table(judged)


def _thresholds() -> Thresholds:
    """The thresholds, in the open and in the address."""
    plain, of = Thresholds(), {"min_value": -1.0, "max_value": 1.0, "step": 0.05, "bind": "query-params"}
    with st.expander("Thresholds of the verdicts", expanded=True):
        one, two, three, four, five = st.columns(5, vertical_alignment="bottom")
        predicted = one.number_input("predicted", value=plain.predicted, key="predicted", **of,
                                     help="R² of the map from which a feature is predicted")  # fmt: skip
        margin = two.number_input("margin", value=plain.margin, key="margin", **of,
                                  help="... and by how much it must exceed the shuffled control")  # fmt: skip
        carried = three.number_input("carried", value=plain.carried, key="carried", **of,
                                     help="share that the identity carries from which a feature is in place")  # fmt: skip
        unpredicted = four.number_input("unpredicted", value=plain.unpredicted, key="unpredicted", **of,
                                        help="R² of the map below which a feature is synthesised")  # fmt: skip
        count = five.number_input("count", 1, 100_000, plain.count, key="count", bind="query-params",
                                  help="tokens on which a feature must fire; one that fires on fewer is rare")  # fmt: skip
    return Thresholds(predicted, margin, carried, unpredicted, int(count))


def _feature_table(judged: pd.DataFrame) -> None:
    wanted = st.multiselect("Verdicts", VERDICTS, key="verdict", bind="query-params", placeholder="all")
    names = judged["name"] if "name" in judged else [""] * len(judged)
    table = judged.assign(**{"fires on": [text.shown(name, 200) for name in names]})
    table = table[table["verdict"].isin(wanted)] if wanted else table
    table = table.sort_values("count", ascending=False, kind="stable").astype({"count": int})
    lines(table[[name for name in SHOWN if name in table]].head(MOST_LINES), "feature-table", wide="fires on")
    text.remark(f"{min(len(table), MOST_LINES):,} of {len(judged):,} features, those that fire on most tokens first; fires on: "
                "the tokens of the profile on which it fires hardest; count: held-out tokens.")  # fmt: skip


def causal(run: TransportResults, entry: Entry, source: str, target: str) -> None:
    """What the pair's map is worth to the model."""
    st.subheader("Causal figures")
    table = run.of_pair("causal", source, target)
    if table is None:
        _lacks(run, entry, "The causal figures of this pair are", "causal", {"causal": "all"})
        return
    code = snippet(entry, "from workbench.transport_plots import causal_points",
                 f"figure = causal_points(run.of_pair('causal', {source!r}, {target!r}))")  # fmt: skip
    panel(causal_points(table), key="causal", code=code, data=lambda: table, notes=entry.path,
          remark="The state at the target is replaced, at every token but BOS, by what each arm makes of the source.",
          )  # fmt: skip
    about = run.metrics.get("causal") or {}
    if about.get("prompts"):
        text.write(f"{about.get('sequences')} prompts of {about['prompts']}, {about.get('tokens')} predicted tokens")
    lines(table.drop(columns=["source", "target"]), "causal-table")


def shortcuts(run: TransportResults, entry: Entry) -> None:
    """Blocks left out and replaced by a map."""
    st.subheader("Shortcuts")
    parts = run.shortcuts()
    if parts is None:
        _lacks(run, entry, "Shortcuts are", "block", {"causal": "all"})
        return
    code = snippet(entry, "from workbench.transport_plots import shortcut_points",
                 "figure = shortcut_points(*run.shortcuts())")  # fmt: skip
    panel(shortcut_points(*parts), key="shortcut", code=code, data=lambda: run.shortcut, notes=entry.path,
          remark="Names stand where there is room; every point says which blocks it leaves out when it is pointed at.",
          )  # fmt: skip


def _lacks(run: TransportResults, entry: Entry, what: str, about: str, more: dict[str, object]) -> None:
    """Says that a part is not in the run, what the run said of it, and the command that adds it."""
    job: TransportJob = replace(job_of(entry.facts["job"]), grid_only=False, **more)  # type: ignore[arg-type]
    text.missing(
        f"{what} not in this run; this adds what is missing and keeps what is done:", command_of(job, entry.path)
    )
    for warning in run.metrics.get("warnings", []):
        if about and about in str(warning):
            text.write(warning)


def _one_line(values: dict[str, object]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame([values])


def snippet(entry: Entry, imports: str, last: str) -> str:
    """The code of a panel: the run in `run`, then the figure."""
    return f"""
from probes.transport_results import load_transport
{imports}

run = load_transport({str(entry.path)!r})
{last}
"""
