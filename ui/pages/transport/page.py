"""Transport: how linearly a model carries its layers on; the grid of a run, and one pair of it in every way."""

from __future__ import annotations

from functools import partial

import streamlit as st

from probes.transport_job import command_of, job_of
from probes.transport_results import PARTS, TransportResults, load_transport
from ui import text
from ui.opened import contents, pick_run
from ui.pages.transport.parts import causal, efficiency, features, shortcuts, snippet
from ui.panels import lines, panel, take_pair
from ui.picks import choice
from ui.settings import settings
from ui.stamps import Stamp, stamp
from workbench.catalogue import Entry
from workbench.small_files import read_from
from workbench.transport_pair_plots import dimension_frame, r2_by_dimension
from workbench.transport_plots import METRIC_WORDS, grid_heatmap, pair_title

COMMAND = "workbench transport bundled:recipient --prompts bundled:profile --out {folder}/transport"


def page() -> None:
    st.title("Transport")
    command = COMMAND.format(folder=settings().folder)
    entry = pick_run("transport", command, "No finished transport run in the opened folder.")
    for other in contents().of("transport"):
        if other.state in ("stopped", "damaged"):
            text.write(f"{other.name}: {other.state}; {other.note}")
    if entry is None:
        return
    again = command_of(job_of(entry.facts["job"]), entry.path)
    if not (entry.path / "grid").is_dir():
        text.missing(f"{entry.name} has no grid yet.", again)
        return
    run = opened(entry)
    if entry.state == "running":
        st.info("This run is still at work; its parts appear here as they are done.")
    source, target = _grid(run, entry)
    st.header("The pair", divider="gray")
    text.write(pair_title(source, target))
    _dimensions(run, entry, source, target)
    with read_from(entry.path / "metrics.json"):
        efficiency(run, entry, source, target)
        features(run, entry, source, target)
        causal(run, entry, source, target)
        st.header("The whole run", divider="gray")
        shortcuts(run, entry)


def opened(entry: Entry) -> TransportResults:
    """The results of a run, read once for all sessions; read anew where one of its files is."""
    files = [entry.path / "grid" / "grid.json", entry.path / "metrics.json",
             *(entry.path / f"{part}.parquet" for part in PARTS)]  # fmt: skip
    return _opened(str(entry.path), stamp(*files))


@st.cache_resource(max_entries=4, show_spinner="Reading the run …")
def _opened(path: str, stamp: Stamp) -> TransportResults:
    return load_transport(path)


def _grid(run: TransportResults, entry: Entry) -> tuple[str, str]:
    """The heatmap and its picks; returns the pair."""
    left, right, third, fourth = st.columns([2, 2, 3, 2], vertical_alignment="bottom")
    pairs = [(str(a), str(b)) for a, b in run.grid.pairs]
    sources = list(dict.fromkeys(source for source, _ in pairs))
    with left:
        source = choice("Source", sources, "source")
    reached = [b for a, b in pairs if a == source]
    with right:
        target = choice("Target", reached, "target", reached[-1])
    with third:
        words = "; ".join(f"{name}: {what}" for name, what in METRIC_WORDS.items())
        metric = choice("R²", METRIC_WORDS.keys(), "metric", help=words)
    with fourth:
        bos = st.toggle("With BOS", key="bos", bind="query-params", disabled=not run.grid.has_bos,
                        help="With the rows at position 0, which are nearly alike in every prompt and lift R² whatever the "
                        "map does.")  # fmt: skip
    bos = bos and run.grid.has_bos
    picked = (source, target)
    code = snippet(entry, "from workbench.transport_plots import grid_heatmap",
                   f"figure = grid_heatmap(run.grid, {metric!r}, bos={bos!r}, picked={picked!r})")  # fmt: skip
    figure = grid_heatmap(run.grid, metric, bos=bos, picked=picked)
    panel(figure, key="grid", code=code, data=run.grid.frame, notes=entry.path, select=("points",),
          on_select=partial(take_pair, "grid", ("source", "target")),
          remark=f"{len(pairs):,} pairs; click a cell to pick its pair. R² of prompts that no map has seen"
          + ("." if bos else ", without BOS."))  # fmt: skip
    return picked


def _dimensions(run: TransportResults, entry: Entry, source: str, target: str) -> None:
    st.subheader("R² by dimension")
    code = snippet(entry, "from workbench.transport_pair_plots import r2_by_dimension",
                 f"figure = r2_by_dimension(run.grid, {source!r}, {target!r})")  # fmt: skip
    panel(r2_by_dimension(run.grid, source, target), key="dimensions", code=code, notes=entry.path,
          data=lambda: dimension_frame(run.grid, source, target),
          remark="Of the ridge map, without BOS. Lines across: what each arm scores on average over the dimensions; the "
          "baselines' own dimensions are not kept by a run.")  # fmt: skip
    lines(run.arms_of(source, target), "arms")
