"""Every converter x layer matching x pairing x size of profile on the bundled pair, both ways: what arrives, and whether
the forecast knew."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing import get_context
from typing import Any

import torch
from scipy.stats import rankdata

from workbench.adapters.adapter import Adapter, LowRank
from workbench.adapters.train import default_layer, train_adapter
from workbench.convert import ConverterFits
from workbench.converter_specs import method_pairs
from workbench.evaluate.batch_tasks import set_log_odds
from workbench.evaluate.behaviour import log_odds, measure
from workbench.evaluate.statistics import sign_agreement, spearman
from workbench.forecast import Candidate, candidates_of, forecast_pastes, matched_candidates, paste_candidate, rank
from workbench.jobs import Job
from workbench.layer_matching import BY_SCORE, best_matching, layer_scores, match_layers
from workbench.models import Model, load
from workbench.profile import profile_model
from workbench.prompts import PromptSet, encode, opener_ids, pad
from workbench.sensitivity import Gradients, fisher, gradients
from workbench.sites import Site
from workbench.store import Store
from workbench.trials import MAX_SIGMA, Trial, TrialSets, try_pastes
from workbench.trials import TRIED as FIRST

CONVERTERS = ("pinv", "ridge:0.1", "ridge:cv", "procrustes", "rrr:16", "pls:32", "whitened", "cycle:1")
MATCHINGS = ("forecast", "nearest", "floor", "ends", *BY_SCORE)
PAIRINGS = ("last", "aligned")
SIZES = (32, 128, 512, 2048)
SEED = 1105  # used for nothing else in the project
EVALUATED, TRIED = 64, 24  # prompts that an effect is measured on, and those of a line-search step
WORKED, LARGE = 0.6, 0.2
SIDES = ("donor", "recipient")


@dataclass
class Bench:
    """The two models, their adapters and profiles, each made once."""

    sizes: Sequence[int] = SIZES
    converters: Sequence[str] = CONVERTERS
    matchings: Sequence[str] = MATCHINGS
    pairings: Sequence[str] = PAIRINGS
    seed: int = SEED
    steps: int = 100
    evaluated: int = EVALUATED
    generate: bool = True
    models: dict[str, Model] = field(default_factory=dict)
    adapters: dict[tuple[str, str, str], Adapter] = field(default_factory=dict)
    stores: dict[tuple[str, str, int], Store] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.models = {side: load(f"bundled:{side}") for side in SIDES}
        self.job = Job.load(_demo())
        self.behaviours = {b.name: b for b in self.job.behaviours}
        for side, model in self.models.items():
            one = [default_layer(model)]
            for kind, layers in (("one", one), ("several", [one[0] - 1, one[0], one[0] + 1])):
                for name, table in self.behaviours.items():
                    found = train_adapter(model, table.demonstrations, layers, profile=self.store(side, "last", 512),
                                          steps=self.steps, seed=self.seed, name=name)  # fmt: skip
                    self.adapters[side, kind, name] = found.adapter

    def store(self, side: str, pairing: str, size: int) -> Store:
        key = side, pairing, size
        if key not in self.stores:
            prompts = PromptSet.load("bundled:profile", limit=size)
            tokens = "last" if pairing == "last" else "all"
            self.stores[key] = profile_model(self.models[side], prompts, tokens=tokens)
        return self.stores[key]


def _demo() -> Any:
    from workbench.bundled import located

    return located("bundled:demo", "jobs", ".toml")


def run(**options: Any) -> dict[str, Any]:
    """All cells. Shares are of native's gain in mean log-odds on prompts that nothing was chosen by."""
    began = time.perf_counter()
    bench = Bench(**options)
    ways = (SIDES, SIDES[::-1])
    with ProcessPoolExecutor(len(ways), get_context("fork"), _keep, (bench,)) as pool:  # a core for each direction
        found = list(pool.map(_direction, *zip(*ways, strict=True)))
    cells, defaults = ([one for part in found for one in part[i]] for i in (0, 1))
    return {"seconds": time.perf_counter() - began, "seed": bench.seed, "evaluated": bench.evaluated, "tried": TRIED,
            "default": "converter and layers by the forecast, strength on validation prompts",
            "table": _table(cells), "by_size": _by_size(defaults), "damage": _damage(defaults), "defaults": _kept(defaults),
            "forecast": _judged(cells), "cells": _compact(cells)}  # fmt: skip


_BENCH: list[Bench] = []


def _keep(bench: Bench) -> None:
    _BENCH[:] = [bench]


def _direction(donor: str, recipient: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All cells of a direction, and its defaults."""
    (bench,) = _BENCH
    cells: list[dict[str, Any]] = []
    defaults: list[dict[str, Any]] = []
    for kind in ("one", "several"):
        for name in bench.behaviours:
            arm = _Arm(bench, donor, recipient, kind, name)
            for size in bench.sizes:
                found = [cell for pairing in bench.pairings for cell in arm.cells(pairing, size)]
                cells += found
                defaults.append(arm.default(size, found))
    return cells, defaults


class _Arm:
    """One direction, one behaviour, an adapter of one layer or of several."""

    def __init__(self, bench: Bench, donor: str, recipient: str, kind: str, name: str) -> None:
        self.bench, self.donor, self.recipient, self.kind, self.name = bench, donor, recipient, kind, name
        self.model, self.table = bench.models[recipient], bench.behaviours[name]
        self.adapter = bench.adapters[donor, kind, name]
        self.validation, self.tried = (PromptSet.load(self.table.validation, limit=n) for n in (None, TRIED))
        self.evaluation = PromptSet.load(self.table.evaluation, limit=bench.evaluated)
        self.on, self.off, self.neutral = self._gradients()
        odds = {n: log_odds(bench.models[donor], self.validation, self.table.openers, a)
                for n, a in (("plain", None), ("edited", self.adapter))}  # fmt: skip
        self.target = float((odds["edited"] - odds["plain"]).mean())
        encoded = [*encode(self.evaluation, self.model.tokenizer), *encode(self.tried, self.model.tokenizer)]
        self.batch = pad(encoded, self.model.pad_id, "left")
        self.first = opener_ids(self.table.openers, self.model.tokenizer, self.evaluation[0])
        self.plain = self._odds(None)
        self.native = self._effects(bench.adapters[recipient, kind, name])[0]
        self.length = ConverterFits(*self._stores("last", max(bench.sizes)), seed=bench.seed).length

    def _gradients(self) -> tuple[Gradients, dict[str, Gradients], list[Gradients]]:
        """As a job takes them: of the behaviour, of what must not change, and on neutral text."""
        if self.recipient not in _GRADIENTS:
            texts = PromptSet.load(self.bench.job.evaluate.validation_text)
            _GRADIENTS[self.recipient] = fisher(self.model, texts, seed=self.bench.seed)
        made = {
            n: gradients(self.model, prompts, openers) for n, (prompts, openers) in self._others("validation").items()
        }
        return gradients(self.model, self.validation, self.table.openers), made, _GRADIENTS[self.recipient]

    def _others(self, split: str) -> dict[str, tuple[PromptSet, Sequence[str]]]:
        """What must not change: the other behaviours, and this one where it is not wanted."""
        sets = {
            n: (PromptSet.load(getattr(b, split)), b.openers)
            for n, b in self.bench.behaviours.items()
            if n != self.name
        }
        return {**sets, "where not wanted": (PromptSet.load(getattr(self.table, f"{split}_not")), self.table.openers)}

    @cached_property
    def _measured(self) -> TrialSets:
        """The evaluation prompts and texts, for the damage done; nothing is chosen by them."""
        texts = PromptSet.load(self.bench.job.evaluate.neutral_text)
        return TrialSets(self.model, (self.evaluation, self.table.openers), self._others("evaluation"), texts,
                         limit=self.bench.evaluated)  # fmt: skip

    def _stores(self, pairing: str, size: int) -> list[Store]:
        return [self.bench.store(side, pairing, size) for side in (self.donor, self.recipient)]

    def _odds(self, adapter: Adapter | None) -> torch.Tensor:
        """Log-odds on the prompts that are evaluated, then on those that are tried: one forward pass."""
        with torch.inference_mode(), nullcontext() if adapter is None else adapter.on(self.model):
            logits = self.model.logits(*self.batch, last_only=True)[:, -1].double()
        return set_log_odds(logits, self.first)

    def _effects(self, adapter: Adapter) -> tuple[float, float]:
        """The mean change of the log-odds, evaluated and tried."""
        change = self._odds(adapter) - self.plain
        n = len(self.evaluation)
        return float(change[:n].mean()), float(change[n:].mean())

    def fits(self, pairing: str, size: int) -> ConverterFits:
        """Shared by all behaviours of a direction."""
        key = self.donor, pairing, size
        if key not in _FITS:
            _FITS[key] = ConverterFits(*self._stores(pairing, size), seed=self.bench.seed, pairing=pairing)
        return _FITS[key]

    def cells(self, pairing: str, size: int) -> list[dict[str, Any]]:
        fits = self.fits(pairing, size)
        by_layer = self._matchings(fits)
        rows = []
        for method in self.bench.converters:
            parts = {(d.layer, r): fits.fold(part, d, Site(r), method)
                     for d, part in self.adapter.parts.items() for r in range(self.model.n_layers)}  # fmt: skip
            sign = 1.0 if self.target > 0 else -1.0
            first = {pair: float(self.on.effect(Site(pair[1]), part).mean()) for pair, part in parts.items()}
            matched = {**by_layer, "forecast": best_matching({pair: sign * e for pair, e in first.items()})}
            done: dict[tuple[int, ...], dict[str, Any]] = {}
            for matching in self.bench.matchings:
                layers = tuple(matched[matching][d] for d in self.adapter.layers)
                if layers not in done:
                    done[layers] = self._cell(layers, parts, sum(first[p] for p in zip(self.adapter.layers, layers,
                                                                                        strict=True)))  # fmt: skip
                rows.append({**done[layers], "method": method, "matching": matching, "pairing": pairing, "size": size})
            if self.kind == "one" and self.bench.matchings == MATCHINGS:
                # the forecast is judged on every layer, not on matched ones alone
                for r in range(self.model.n_layers):
                    if (r,) not in done:
                        cell = self._cell((r,), parts, first[self.adapter.layers[0], r])
                        rows.append({**cell, "method": method, "matching": "", "pairing": pairing, "size": size})
        return rows

    def _cell(self, layers: tuple[int, ...], parts: dict[tuple[int, int], LowRank], first: float) -> dict[str, Any]:
        made: dict[Site, LowRank] = {}
        for pair in zip(self.adapter.layers, layers, strict=True):
            site = Site(pair[1])
            made[site] = made[site] + parts[pair] if site in made else parts[pair]
        pasted = Adapter(made)
        effect, searched = self._effects(pasted)
        return {
            "donor": self.donor, "kind": self.kind, "behaviour": self.name, "layers": layers, "forecast": first,
            "searched": searched, "effect": effect, "target": self.target,
            "share": effect / self.native, "worked": effect >= WORKED * self.target,
            "sigma": max(self.length(site, part.delta(self.on.states[site])) for site, part in made.items()),
        }  # fmt: skip

    def _matchings(self, fits: ConverterFits) -> dict[str, dict[int, int]]:
        donors, targets = list(self.adapter.parts), [Site(r) for r in range(self.model.n_layers)]
        n_donor = self.bench.models[self.donor].n_layers
        found = {m: match_layers(self.adapter.layers, n_donor, len(targets), m) for m in ("nearest", "floor", "ends")}
        for by in (m for m in BY_SCORE if m in self.bench.matchings):
            key = id(fits), by, self.kind
            if key not in _SCORES:
                _SCORES[key] = layer_scores(fits, donors, targets, by)
            found[by] = best_matching(_SCORES[key])
        return found

    def default(self, size: int, cells: list[dict[str, Any]]) -> dict[str, Any]:
        """What the library chooses of itself: last tokens; converter and layers by forecast, strength on validation
        prompts. Beside it the best of `cells` by its measured effect, and native; with the damage that each does."""
        fits = self.fits("last", size)
        if self.kind == "one":
            options = candidates_of(self.adapter, self.model.n_layers)
        else:
            n_donor = self.bench.models[self.donor].n_layers
            options = matched_candidates(self.adapter, fits, self.on, self.target, n_donor)
        forecasts = forecast_pastes(self.adapter, fits, options, self.on, self.off, self.neutral, target=self.target,
                                    max_sigma=MAX_SIGMA)  # fmt: skip
        ranked = rank(forecasts, self.target)
        texts = PromptSet.load(self.bench.job.evaluate.validation_text)
        sets = TrialSets(self.model, (self.validation, self.table.openers), self._others("validation"), texts)
        chosen = try_pastes(sets, self.adapter, fits, ranked[:FIRST], target=self.target)[0]
        best = max((c for c in cells if c["matching"]), key=lambda c: c["share"])
        return self._default(fits, chosen, best, size)

    def _default(self, fits: ConverterFits, chosen: Trial, best: dict[str, Any], size: int) -> dict[str, Any]:
        pasted = paste_candidate(self.adapter, fits, chosen.candidate, chosen.strength)
        pairs = tuple((d, Site(r)) for d, r in zip(self.adapter.parts, best["layers"], strict=True))
        cell = Candidate(pairs, *method_pairs([best["method"]])[0])
        arms = {"default": pasted, "best": paste_candidate(self.adapter, self.fits(best["pairing"], size), cell),
                "native": self.bench.adapters[self.recipient, self.kind, self.name]}  # fmt: skip
        trials = {arm: self._measured.trial(chosen.candidate, adapter) for arm, adapter in arms.items()}
        found = {"donor": self.donor, "kind": self.kind, "behaviour": self.name, "size": size,
                 "label": chosen.candidate.label(), "strength": chosen.strength, "native": self.native,
                 "target": self.target, "share": trials["default"].on / self.native, "best": best["share"],
                 "best_is": f"{best['method']} {best['matching']} {best['pairing']}",
                 "sigma": max(self.length(s, pasted.delta(s, self.on.states[s])) for s in pasted.parts),
                 "damage": {arm: {"gain": t.gain, "off": max(t.off_rate.values()), "over": t.off_rate["where not wanted"],
                                  "kl": t.kl} for arm, t in trials.items()}}  # fmt: skip
        if self.bench.generate and self.kind == "one" and size == max(self.bench.sizes):
            from workbench.evaluate.behaviour import Behaviour

            what = Behaviour(self.name, tuple(self.table.openers), self.table.grader, self.table.grader_args)
            for arm, adapter in {"base": None, "native": arms["native"], "paste": pasted}.items():
                made = measure(self.model, what, self.evaluation, adapter, max_new_tokens=72, batch_size=96)
                found[f"rate_{arm}"] = made.rate.value
        return found


_GRADIENTS: dict[str, list[Gradients]] = {}
_FITS: dict[Any, ConverterFits] = {}
_SCORES: dict[Any, dict[tuple[int, int], float]] = {}


def auroc(score: Sequence[float], label: Sequence[bool]) -> float | None:
    """The chance that one that is true scores above one that is not; None where all are alike."""
    truth = torch.tensor(label, dtype=torch.bool)
    positive, negative = int(truth.sum()), int((~truth).sum())
    if not positive or not negative:
        return None
    ranks = torch.tensor(rankdata(score))
    return float((ranks[truth].sum() - positive * (positive + 1) / 2) / (positive * negative))


def _distinct(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    keys = ("donor", "kind", "behaviour", "method", "pairing", "size", "layers")
    return list({tuple(c[k] for k in keys): c for c in cells}.values())


def _judged(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The forecast against what was measured, of all distinct pastes and of parts of them."""
    distinct = _distinct(cells)
    groups: list[tuple[str, list[dict[str, Any]]]] = [("all", distinct)]
    groups += [
        (f"{c} layer{'s' * (c == 'several')}", [x for x in distinct if x["kind"] == c]) for c in ("one", "several")
    ]
    groups += [(f"from the bundled {s}", [x for x in distinct if x["donor"] == s]) for s in SIDES]
    groups += [("shorter than 8 sigma", [x for x in distinct if x["sigma"] < 8]),
               ("8 sigma and longer", [x for x in distinct if x["sigma"] >= 8])]  # fmt: skip
    groups += [(m, [x for x in distinct if x["method"] == m]) for m in CONVERTERS]
    made = []
    for name, group in groups:
        if len(group) < 3:
            continue
        effect, worked = [x["effect"] for x in group], [x["worked"] for x in group]
        row: dict[str, Any] = {"cells": name, "n": len(group), "large": sum(abs(e) > LARGE for e in effect),
                               "worked": sum(worked)}  # fmt: skip
        for key in ("forecast", "searched"):
            said = [x[key] for x in group]
            row[key] = {"spearman": spearman(said, effect), "sign": sign_agreement(said, effect, LARGE),
                        "auroc": auroc([s / x["target"] for s, x in zip(said, group, strict=True)], worked)}  # fmt: skip
        made.append(row)
    return made


def _table(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mean share (each at most 1, and at least -1) over behaviours and directions, of every kind of cell."""
    found: dict[tuple[Any, ...], list[float]] = {}
    for c in cells:
        if c["matching"]:
            key = c["kind"], c["method"], c["matching"], c["pairing"], c["size"]
            found.setdefault(key, []).append(min(max(c["share"], -1.0), 1.0))
    rows: dict[tuple[Any, ...], dict[str, float]] = {}
    for (kind, method, matching, pairing, size), shares in found.items():
        rows.setdefault((kind, method, matching), {})[f"{pairing} {size}"] = round(sum(shares) / len(shares), 3)
    return [{"kind": k, "method": m, "matching": l, "shares": row} for (k, m, l), row in rows.items()]


def _by_size(defaults: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The default beside the best cell of its behaviour, direction and size; shares of at most 1."""
    return [{**{k: d[k] for k in ("donor", "kind", "behaviour", "size", "best_is")}, "default": min(d["share"], 1.0),
             "best": min(d["best"], 1.0)} for d in defaults]  # fmt: skip


def _kept(defaults: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: round(v, 4) if isinstance(v, float) else v for k, v in d.items()} for d in defaults]


def _damage(defaults: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over behaviours, directions and sizes of what the default, the best cell and native gain and harm."""
    rows = []
    for kind in ("one", "several"):
        for arm in ("default", "best", "native"):
            found = [d["damage"][arm] for d in defaults if d["kind"] == kind]
            rows.append({"kind": kind, "arm": arm, **{k: sum(f[k] for f in found) / len(found) for k in found[0]}})
    return rows


def _compact(cells: list[dict[str, Any]]) -> dict[str, str]:
    """Of every cell `share/forecast` in percent of native's gain and nats, in the order of MATCHINGS: a line a converter."""
    lines: dict[str, list[str]] = {}
    for c in cells:
        if c["matching"]:
            name = f"{c['donor']} {c['kind']} {c['behaviour']} {c['pairing']} {c['size']} {c['method']}"
            lines.setdefault(name, []).append(f"{100 * c['share']:.0f}/{c['forecast']:.2f}/{c['effect']:.2f}")
    return {name: " ".join(line) for name, line in lines.items()}
