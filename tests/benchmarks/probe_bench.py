"""Probes of every layer of a store against one pass of reading its rows, and against scikit-learn in a loop."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from probes.linear import train_probes
from workbench.store import Store
from workbench.store.resident import ResidentRows

from .explorer_store import make_explorer_store
from .timing import in_turns, spread

LABEL: dict[str, Any] = {"label": "label", "classes": ["river"]}
ALONE: dict[str, Any] = {"controls": (), "words": False}


def probes(
    folder: Path, layers: int = 8, width: int = 4096, rows: int = 20_000, loop: int = 2, repeats: int = 3
) -> dict[str, Any]:
    """Seconds for each layer: of reading its rows once, of each kind of probe without and with its controls, and of
    scikit-learn's LogisticRegression after its StandardScaler, each layer anew, as a script would (on `loop` layers)."""
    store = make_explorer_store(folder / "store", rows, width, layers)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    held = ResidentRows(store, device)

    def arm(kind: str, **more: Any) -> Callable[[], Any]:
        return lambda: train_probes(held, **LABEL, kind=kind, **{**ALONE, **more})

    ways: dict[str, tuple[Callable[[], Any], int]] = {
        "reading": (lambda: _read(store), layers),
        "mass-mean": (arm("mass_mean"), layers),
        "logistic": (arm("logistic"), layers),
        "logistic with both controls": (arm("logistic", controls=("control", "shuffled")), layers),
        "scikit-learn in a loop": (lambda: _loop(store, loop), loop),
    }
    taken = {name: [s / ways[name][1] for s in turns]
             for name, turns in in_turns({name: way for name, (way, _) in ways.items()}, repeats).items()}  # fmt: skip
    found = {name: statistics.median(turns) for name, turns in taken.items()}
    best = arm("logistic")().best.score.headline
    return {"layers": layers, "width": width, "rows": rows, "device": str(device), "threads": os.cpu_count(),
            "seconds": found,
            "spread": {name: spread(turns) for name, turns in taken.items()}, "repeats": repeats,
            "accuracy": {"probe": best.value, "loop": _loop(store, 1)}}  # fmt: skip


def _read(store: Store) -> None:
    for batch in store.iter_batches(list(store.sites), 4096):
        for x in batch.values():
            x.sum()  # every page is in memory


def _loop(store: Store, layers: int) -> float:
    """The accuracy of the last."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    prompt = store.rows(["prompt"])["prompt"].to_numpy()
    y, test = (store.prompts()["label"].to_numpy() == "river")[prompt], prompt % 4 == 0
    score = 0.0
    for site in store.sites[:layers]:
        x = store.read(site).float().numpy()
        made = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x[~test], y[~test])
        score = float(made.score(x[test], y[test]))
    return score
