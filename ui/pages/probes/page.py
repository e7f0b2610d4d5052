"""A probe trained on a label of a store: its curve over the layers beside its controls, and what it says of a text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamlit as st

from probes.labels import MOST_CLASSES, TOKENS, class_counts, label_columns
from probes.linear import train_probes
from probes.probe_curve import ProbeCurve, ProbeLine
from probes.solvers import KINDS, OF_QUANTITIES
from ui import text
from ui.held import rows_of
from ui.opened import pick_store
from ui.pages.probes import parts
from ui.panels import panel
from ui.picks import choice
from ui.settings import settings
from ui.stamps import Stamp, store_stamp
from workbench.probe_plots import SCORE_WORDS, probe_calibration, probe_layers
from workbench.store import Store

POSITIONS = {"all": "every row", "last": "the last row of each prompt", "first": "the first row of each prompt",
             "first:4": "the first 4 rows", "last:4": "the last 4 rows", "every:4": "every 4th row"}  # fmt: skip
KIND_WORDS = {"logistic": "logistic", "ridge": "ridge", "mass_mean": "difference of means",
              "mass_mean_cov": "difference of means, whitened", "sparse": "sparse (L1)"}  # fmt: skip
ROWS = (2_000, 5_000, 10_000, 20_000)
AT_ONCE = 100_000_000
"""numbers that are read and fitted without being asked for: rows x width x sites"""
ONE_OF = "a token is one of …"


@dataclass(frozen=True)
class Asked:
    """What is trained: the store, and the arguments of `train_probes`."""

    path: Path
    stamp: Stamp
    label: str
    kind: str
    positions: str
    classes: tuple[str, ...]
    quantity: bool | None
    rows: int

    def arguments(self) -> dict[str, Any]:
        """Those that are not the default."""
        given: dict[str, Any] = {"kind": self.kind, "positions": self.positions, "max_rows": self.rows}
        if self.classes:
            given["classes"] = list(self.classes)
        if self.quantity is not None:
            given["quantity"] = self.quantity
        return given

    def code(self, *imports: str) -> str:
        """The lines of a snippet that train the same probes."""
        options = ", ".join(f"{key}={value!r}" for key, value in self.arguments().items())
        device = f", device={settings().device!r}" if settings().device else ""
        lines = ["import workbench", "from probes.linear import train_probes", *imports, "",
                 f"store = workbench.Store.open({str(self.path)!r})",
                 f"curve = train_probes(store, {self.label!r}, {options}{device})"]  # fmt: skip
        return "\n".join(lines) + "\n"


def page() -> None:
    st.title("Probes")
    store = pick_store()
    if store is None:
        return
    asked = _asked(store)
    if asked is None or not _wanted(store, asked):
        return
    curve = _trained(asked, settings().device)
    line = _curve(curve, asked)
    _quality(curve, line, asked)
    parts.strip(store, line, asked)
    parts.steering(curve, line, asked)


def _asked(store: Store) -> Asked | None:
    """The picks; None, and a line on why, where they name nothing that can be trained."""
    columns = label_columns(store)
    a, b, c, d, e = st.columns(5)
    with a:
        label = str(choice("Label", [*columns, ONE_OF], "label"))
    if label == ONE_OF:
        said = b.text_input("Tokens, with commas between them", key="tokens", bind="query-params", max_chars=400)
        if not said.strip(" ,"):
            text.remark("Type the tokens that are told from all others, such as plus, minus.")
            return None
        label = TOKENS + said
    stamp = store_stamp(store)
    quantity: bool | None = None
    classes: tuple[str, ...] = ()
    counts = _counts(str(store.path), stamp, label)
    if label in ("position", "token_id") and b.toggle(
        "As a quantity", label == "position", key="quantity", bind="query-params"
    ):
        quantity = True
    elif not label.startswith(TOKENS):
        names = list(counts)[:MOST_CLASSES]
        shown = {name: text.shown(name, 60) for name in names}
        picked = b.multiselect("Classes", names, key="classes", bind="query-params", placeholder=f"all {len(counts):,}",
                               format_func=lambda name: shown[name], help="one alone stands against all others")  # fmt: skip
        classes = tuple(picked)
    with c:
        kinds = {name: KIND_WORDS[name] for name in (OF_QUANTITIES if quantity else KINDS)}
        kind = choice("Kind", kinds, "kind", help="; ".join(f"{KIND_WORDS[k]}: {KINDS[k]}" for k in kinds))
    with d:
        positions = choice("Rows", POSITIONS, "rows")
    with e:
        most = choice("At most", {n: f"{n:,} rows" for n in ROWS}, "most", 5_000)
    return Asked(store.path, stamp, label, kind, positions, classes, quantity, most)


def _wanted(store: Store, asked: Asked) -> bool:
    """Whether to train: at once where that is short work, else when it is asked for."""
    rows = min(asked.rows, store.n_rows)
    work = rows * sum(store.width(site) for site in store.sites)
    if work <= AT_ONCE:
        return True
    key = f"trained-{asked!r}"
    if not st.session_state.get(key):
        text.remark(f"{len(store.sites)} sites of {rows:,} rows: this may take a minute or more.")
        st.session_state[key] = st.button("Train", type="primary")
    return bool(st.session_state[key])


@st.cache_resource(max_entries=8, show_spinner="Training …")
def _trained(asked: Asked, device: str) -> ProbeCurve:
    return train_probes(rows_of(asked.path), asked.label, **asked.arguments())


@st.cache_data(max_entries=32, show_spinner=False)
def _counts(path: str, stamp: Stamp, label: str) -> dict[str, int]:
    return class_counts(rows_of(path).store, label)


def _curve(curve: ProbeCurve, asked: Asked) -> ProbeLine:
    """The curve over the layers; returns the line of the picked site."""
    table = curve.frame()
    left, right = st.columns(2)
    with left:
        names = {name: SCORE_WORDS[name] for name in SCORE_WORDS if name in table}
        score = choice("Figure", names, "figure")
    best = curve.best
    with right:
        places = [str(site) for site in curve.sites]
        site = str(choice("Probe at", places, "site", str(best.site)))
    controls = {"token": "a label drawn for each token type", "prompt": "a label drawn for each prompt"}[
        curve.control_of
    ]
    said = (f"{best.n_train:,} rows to train on, {best.score.n:,} of {best.score.n_groups:,} other prompts to test on; 95 % "
            f"intervals over prompts; the control task is {controls}")  # fmt: skip
    code = (
        asked.code("from workbench.probe_plots import probe_layers")
        + f"figure = probe_layers(curve.frame(), {score!r})"
    )
    panel(probe_layers(table, score), key="layers", data=curve.frame, remark=". ".join([said, *curve.notes]), code=code)
    return curve.at(site)


def _quality(curve: ProbeCurve, line: ProbeLine, asked: Asked) -> None:
    """Calibration and confusion of one probe."""
    if not curve.classes:
        return
    st.subheader("How sure, and how often right")
    score = line.score
    figure = probe_calibration(score.reliability, score.ece, score.confusion, curve.classes)
    code = asked.code("from workbench.probe_plots import probe_calibration")
    code += (f"score = curve.at({str(line.site)!r}).score\n"
             "figure = probe_calibration(score.reliability, score.ece, score.confusion, curve.classes)")  # fmt: skip
    panel(figure, key="calibration", code=code, data=lambda: parts.confusion_frame(curve, line),
          remark=f"{line.site}: accuracy {score.accuracy}, AUROC {score.auroc}, Brier score {score.brier}")  # fmt: skip
