"""docs/similarity.md: how alike the layers of the bundled pair are, from one run of `workbench similarity`.

`measure` runs it and returns the numbers as JSON values (kept in docs/similarity.json), `page` tells them. What the text says
of them in words is asserted in tests/pages/test_similarity_page.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, StrictUndefined

from probes.similarity_measures import WORDS
from probes.similarity_run import SimilarityJob, run_similarity
from workbench import similarity_plots as plots
from workbench.models import load
from workbench.profile import profile_model
from workbench.prompts import PromptSet
from workbench.summary import plain

from ..benchmarks.tables import table
from .transport import rounded

DOCS = Path(__file__).resolve().parents[2] / "docs"
KEPT, PAGE = DOCS / "similarity.json", DOCS / "similarity.md"
TEMPLATE = Path(__file__).with_name("similarity.md.jinja")
MODELS, PROMPTS, LIMIT = ("bundled:donor", "bundled:recipient"), "bundled:profile", 300
SHORT = {"cka": "CKA", "cka_debiased": "CKA, debiased", "svcca": "SVCCA", "pwcca": "PWCCA", "procrustes": "Procrustes",
         "rsa": "RSA", "knn": "mutual kNN"}  # fmt: skip
Line = dict[str, Any]


def measure(folder: Path) -> Line:
    """Profiles both models, runs the verb's function into a folder and returns what the page tells."""
    prompts = PromptSet.load(PROMPTS, limit=LIMIT)
    for name in MODELS:
        with profile_model(load(name), prompts, tokens="all", out=folder / name.partition(":")[2]):
            pass
    donor, recipient = (str(folder / name.partition(":")[2]) for name in MODELS)
    metrics = run_similarity(SimilarityJob(donor, recipient), folder / "run").metrics
    own = run_similarity(SimilarityJob(donor, measures=("cka_debiased",), permutations=0)).result
    return rounded({
        **{key: metrics[key] for key in ("rows", "prompts", "summary", "best", "settings")},
        "own": own["cka_debiased"].value.tolist(), "versions": metrics["environment"]["versions"],
    })  # fmt: skip


def figures(folder: Path, _kept: Line) -> dict[str, go.Figure]:
    """The picture of the page."""
    return {"best": plots.similarity_best(pd.read_parquet(folder / "run" / "similarity.parquet"), names=MODELS)}


def page(kept: Line) -> str:
    source = TEMPLATE.read_text(encoding="utf-8")
    template = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True).from_string(source)
    found = {line["measure"]: line for line in kept["summary"]}
    orders = [line["order"] for name, line in found.items() if name != "rsa"]
    return template.render(kept=kept, by=found, plain=plain, limit=LIMIT, best=_best(kept), summary=_summary(kept),
                           orders=orders, rsa=partners(kept, "rsa")[0])  # fmt: skip


def _best(kept: Line) -> str:
    cells = {(x["a"], x["measure"]): x for x in kept["best"]}
    layers = list(dict.fromkeys(x["a"] for x in kept["best"]))
    rows = [(a, *(f"{_layer(cells[a, m]['b'])}: {plain(cells[a, m]['value'])}" for m in SHORT)) for a in layers]
    return table(("donor's layer", *SHORT.values()), rows)


def _summary(kept: Line) -> str:
    rows = [(WORDS[x["measure"]], plain(x["best"]), plain(x["null"]), plain(x["null_high"]),
             "none" if x["order"] is None else plain(x["order"]), f"{x['rows']:,}") for x in kept["summary"]]  # fmt: skip
    return table(("measure", "best partner, mean", "shuffled prompts", "at most", "order of depths", "rows"), rows)


def _layer(name: str) -> int:
    return int(name.rpartition(".")[2])


def partners(kept: Line, measure: str) -> list[int]:
    """The recipient's layer that is most like each of the donor's."""
    return [_layer(x["b"]) for x in kept["best"] if x["measure"] == measure]


def read() -> Line:
    return dict(json.loads(KEPT.read_text(encoding="utf-8")))
