"""docs/probes.md: what linear probes, directions and erasers find in the bundled pair, from one run.

`measure` returns the numbers as JSON values (kept in docs/probes.json), `page` tells them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jinja2 import Environment, StrictUndefined

from probes.directions import find_directions
from probes.erasers import erase_label
from probes.linear import train_probes
from workbench import probe_plots
from workbench.adapters.adapter import Adapter, vector
from workbench.convert import ConverterFits
from workbench.evaluate.behaviour import kl_on_text, log_odds
from workbench.evaluate.statistics import Interval, mean_interval
from workbench.forecast import paste_candidate
from workbench.forecast_table import rank_pastes
from workbench.models import Model, load
from workbench.profile import profile_model
from workbench.prompts import PromptSet
from workbench.store import Store

from ..benchmarks.tables import table
from .transport import rounded

ROOT = Path(__file__).resolve().parents[2]
KEPT, PAGE = ROOT / "docs" / "probes.json", ROOT / "docs" / "probes.md"
TEMPLATE = Path(__file__).with_name("probes.md.jinja")
SIDES = ("donor", "recipient")
PROMPTS, TEXT, TOKENS = "bundled:profile", "bundled:evaluation_text", "operand"
HARM = ("harmless", "harmful")
LAYER = {"donor": 4, "recipient": 3}
"""where directions steer: the bundled adapter's layer, and the one that answers to it"""
DRAWS = 16
Line = dict[str, Any]


def operands(store: Store) -> list[int | None]:
    """Of each row of a calculation: which of its numbers the token is, from 1; None for all other tokens. The token itself
    does not tell it: any digit stands anywhere."""
    rows = store.rows(["prompt", "text"])
    asked = store.prompts()["label"].to_numpy()[rows["prompt"].to_numpy()] == "reasoning"
    number = np.asarray([text is not None and text.strip().isdigit() for text in rows["text"]]) & asked
    place = pd.Series(number).groupby(rows["prompt"].to_numpy()).cumsum()
    return [int(p) if n else None for p, n in zip(place, number, strict=True)]


def measure(_folder: Path | None = None) -> dict[str, Any]:
    """Profiles both models, trains the probes, finds the directions, steers, pastes and erases."""
    models = {side: load(f"bundled:{side}", dtype="float32", device="cpu") for side in SIDES}
    prompts = PromptSet.load(PROMPTS)
    stores = {side: profile_model(model, prompts, tokens="all") for side, model in models.items()}
    last = {side: profile_model(model, prompts) for side, model in models.items()}
    curves = {side: _curves(stores[side], last[side]) for side in SIDES}
    return rounded({
        "prompts": len(prompts), "curves": curves,
        "steering": {side: _steering(models[side], last[side], LAYER[side]) for side in SIDES},
        "pasted": _pasted(models, last), "erased": {side: _erased(models[side], stores[side], LAYER[side]) for side in SIDES},
    })  # fmt: skip


def _curves(every: Store, last: Store) -> dict[str, list[Line]]:
    """By label. The last token of a prompt is one of its template, which a profile of all tokens leaves out."""
    found = {"harm": train_probes(last, "group", classes=HARM), "answer": train_probes(last, "gold"),
             TOKENS: train_probes(every, operands(every), quantity=False)}  # fmt: skip
    return {name: curve.frame().to_dict("records") for name, curve in found.items()}


def _asked(split: str) -> PromptSet:
    return PromptSet.load(f"bundled:{split}_refusal")


def _steering(model: Model, store: Store, layer: int) -> list[Line]:
    """Each method's direction of harm, as a steering vector, at its own length and the other way; random ones beside."""
    prompts, made = _asked("evaluation"), []
    plain = log_odds(model, prompts, ["sorry"])
    found = find_directions(store, "group", "harmful", "harmless", sites=[layer])
    for one in found:
        towards, away = (_effect(model, prompts, plain, one.adapter(strength=s, positions="last")) for s in (1.0, -1.0))
        made.append({"method": one.method, **_figures("towards", towards), **_figures("away", away), "length": one.length,
                     **({} if one.held_out is None else _figures("auroc", one.held_out.auroc))})  # fmt: skip
    length = found.at(layer, "mean_difference").length
    draws = [float((log_odds(model, prompts, ["sorry"], v) - plain).mean()) for v in _random(model, layer, length)]
    return [*made, {"method": "random", "length": length, **_figures("towards", mean_interval(draws))}]


def _random(model: Model, layer: int, length: float) -> list[Adapter]:
    draws = torch.randn(DRAWS, model.width, generator=torch.Generator().manual_seed(0))
    return [vector(model.site(layer), length * v / v.norm(), positions="last", base=model.fingerprint) for v in draws]


def _effect(model: Model, prompts: PromptSet, plain: torch.Tensor, adapter: Adapter) -> Interval:
    return mean_interval(log_odds(model, prompts, ["sorry"], adapter) - plain)


def _pasted(models: dict[str, Model], stores: dict[str, Store]) -> list[Line]:
    """Each direction of the donor, pasted into the recipient: chosen on validation prompts, measured on others."""
    donor, recipient = (models[side] for side in SIDES)
    fits, prompts, made = ConverterFits(*(stores[side] for side in SIDES)), _asked("evaluation"), []
    plain = log_odds(recipient, prompts, ["sorry"])
    for one in find_directions(stores["donor"], "group", "harmful", "harmless", sites=[LAYER["donor"]]):
        adapter = one.adapter(positions="last")
        ranked = rank_pastes(adapter, fits, donor, recipient, _asked("validation"), ["sorry"])
        first = ranked.forecasts[0]
        paste = paste_candidate(adapter, fits, first.candidate, first.strength)
        found = _effect(recipient, prompts, plain, paste)
        made.append({"method": one.method, "paste": first.candidate.label(), "strength": first.strength, "forecast": first.on,
                     **_figures("effect", found), **_figures("donor", ranked.target)})  # fmt: skip
    return made


def _erased(model: Model, store: Store, layer: int) -> Line:
    """The direction of harm taken out of every token: what a probe still finds, and what it costs on plain text."""
    found = erase_label(store, "group", layer, classes=HARM, positions="all")
    shift = kl_on_text(model, PromptSet.load(TEXT), found.adapter())
    plain = log_odds(model, _asked("evaluation"), ["sorry"])
    odds = _effect(model, _asked("evaluation"), plain, found.adapter())
    return {"layer": layer, "changed": found.changed, "chance": found.after.chance, **_figures("kl", shift.kl),
            **_figures("before", found.before.auroc), **_figures("after", found.after.auroc),
            **_figures("accuracy", found.after.accuracy), **_figures("odds", odds),
            "perplexity": [shift.perplexity_base, shift.perplexity_edited]}  # fmt: skip


def _figures(name: str, found: Interval) -> Line:
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def figures(_folder: Path | None, kept: Line) -> dict[str, go.Figure]:
    """The curves of the recipient, by label."""
    return {name: probe_plots.probe_layers(pd.DataFrame(lines)) for name, lines in kept["curves"]["recipient"].items()
            if name != "harm"}  # fmt: skip


def page(kept: Line) -> str:
    """docs/probes.md."""
    source = TEMPLATE.read_text(encoding="utf-8")
    template = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True).from_string(source)
    return template.render(kept=kept, tables=_tables(kept), of=of, best=best)


def of(line: Line, key: str, form: str = ".3f") -> str:
    """A figure with its interval."""
    value, low, high = (line.get(k) for k in (key, f"{key}_low", f"{key}_high"))
    return "–" if value is None else f"{value:{form}} [{low:{form}}, {high:{form}}]"


def best(lines: Sequence[Line], key: str = "accuracy") -> Line:
    """The line with the highest figure."""
    return max(lines, key=lambda line: line[key])


def _tables(kept: Line) -> dict[str, str]:
    made = {}
    for name in next(iter(kept["curves"].values())):
        rows = [(side, line["site"], of(line, "accuracy"), of(line, "auroc"), of(line, "control"), of(line, "shuffled"),
                 of(line, "selectivity", "+.3f"), "–" if line.get("words") is None else f"{line['words']:.3f}")
                for side in SIDES for line in kept["curves"][side][name]]  # fmt: skip
        made[name] = table(["model", "site", "accuracy", "AUROC", "control task", "shuffled labels", "selectivity",
                            "words alone"], rows)  # fmt: skip
    made["steering"] = table(
        ["model", "method", "AUROC held out", "length", "added: log-odds, nats", "taken away"],
        [(side, line["method"], of(line, "auroc"), f"{line['length']:.1f}", of(line, "towards", "+.2f"),
          of(line, "away", "+.2f")) for side in SIDES for line in kept["steering"][side]],
    )  # fmt: skip
    made["pasted"] = table(
        ["method", "paste", "strength", "forecast", "measured, nats", "in the donor"],
        [(line["method"], line["paste"], f"{line['strength']:.2f}", f"{line['forecast']:+.2f}", of(line, "effect", "+.2f"),
          of(line, "donor", "+.2f")) for line in kept["pasted"]],
    )  # fmt: skip
    made["erased"] = table(
        ["model", "layer", "AUROC before", "after", "changed, % of variance", "KL on stories, nats", "perplexity", "log-odds"],
        [(side, line["layer"], of(line, "before"), of(line, "after"), f"{100 * line['changed']:.2f}", of(line, "kl", ".1e"),
          " to ".join(f"{p:.4f}" for p in line["perplexity"]), of(line, "odds", "+.3f"))
         for side, line in kept["erased"].items()],
    )  # fmt: skip
    return made
