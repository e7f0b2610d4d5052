"""A run folder to one self-contained report.html: numbers first, then figures, then answers side by side.

The page needs no network: plotly.js is in it, once. All that comes from prompts, answers and the job is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import plots
from .atomic import write_text
from .report_page import Cell, cell, facts, flat, page, section, table
from .small_files import read_from
from .summary import (
    CONTROLS,
    Metrics,
    arm_title,
    arms_of,
    cost_ratio,
    get,
    headline,
    interval,
    load_metrics,
    missing,
    number,
    p_value,
    percent,
    plain,
    ratio_words,
    score_name,
    share_of,
    signed,
)

OPEN_EXAMPLES = 3
FOOTER = (
    "Intervals are 95 %: Wilson's for rates, Student's t for log-odds and KL (over prompts; over draws for a control "
    "of several draws), the paired bootstrap for shares of native's gain. p is the exact paired McNemar test against "
    "the same model without an adapter."
)
SAYS = {
    "arms": "Points are means, bars 95 % intervals; the dotted line is the plain recipient. A greedy rate near its "
    "threshold can flip under any push: read it with the log-odds below it.",
    "pairs": "The forecast effect of each pair's best candidate: blue moves the behaviour as the adapter should, brown "
    "the wrong way. The ring is the pair that was used.",
    "forecast": "Each point is a candidate paste: its effect as forecast from one backward pass of the plain "
    "recipient, and as measured afterwards.",
    "dose": "The paste at other strengths.",
    "side effects": "What each arm changed that it should not have.",
    "converters": "How the maps between the models fit held-out prompts. A good fit does not say that a paste works.",
    "examples": "The first answers of the run, not chosen.",
}


def write_report(run: str | Path, out: str | Path | None = None) -> Path:
    """Writes the report of a run folder (or a metrics.json) and returns its path, `report.html` beside the metrics.

    Raises UserError where the run has no metrics, or the report cannot be written.
    """
    run = Path(run)
    metrics = load_metrics(run)
    target = Path(out) if out is not None else (run if run.is_dir() else run.parent) / "report.html"
    with read_from(run / "metrics.json" if run.is_dir() else run):
        page = render(metrics)
    write_text(target, page)
    return target


def render(metrics: Metrics) -> str:
    """The report as HTML; the same metrics give the same bytes."""
    job = get(metrics, "job") or {}
    names = " to ".join(str(job[key]) for key in ("donor", "recipient") if job.get(key))
    seed, date = job.get("seed"), get(metrics, "environment", "date")
    about = [names and f"from {names}", "" if seed is None else f"seed {seed}", date]
    return page(
        title=str(job.get("name") or "Activation transfer"),
        subtitle=", ".join(str(a) for a in about if a),
        headlines=[_split(headline(n, b)) for n, b in (get(metrics, "behaviours") or {}).items()],
        warnings=list(get(metrics, "warnings") or []),
        sections=[s for s in _sections(metrics) if s is not None],
        footer=FOOTER,
    )


def _split(text: str) -> list[str]:
    """The first sentence, and the rest."""
    first, dot, rest = text.partition(". ")
    return [first + dot.strip(), rest] if rest else [first]


def _sections(metrics: Metrics) -> list[dict[str, Any] | None]:
    behaviours = dict(get(metrics, "behaviours") or {})
    gone = missing(metrics)
    made: list[dict[str, Any] | None] = []
    if behaviours:
        made.append(section("Result", tables=[result(behaviours)]))
        made.append(section("Arms", SAYS["arms"], figure=plots.arms(metrics)))
    if plots.measured(metrics):
        words = _forecast_words(behaviours)
        made.append(section("Forecast and measurement", SAYS["forecast"], *words, figure=plots.forecast(metrics)))
    if plots.candidates(metrics):
        made.append(section("Layer pairs", SAYS["pairs"], figure=plots.layer_pairs(metrics)))
    if any(b.get("dose") for b in behaviours.values()):
        made.append(section("Dose and response", SAYS["dose"], figure=plots.dose(metrics)))
    made.append(_present("Side effects", SAYS["side effects"], side_effects(behaviours)))
    made.append(_present("Converters", SAYS["converters"], converters(behaviours)))
    if shown := examples(behaviours):
        made.append(section("Examples", SAYS["examples"], examples=shown))
    made.append(_present("Cost", "", costs(metrics)))
    if gone:
        made.append(section("Not measured", tables=[facts("", [("", note) for note in gone])]))
    made.append(_present("Provenance", "", provenance(metrics)))
    return made


def _present(title: str, text: str, tables: list[dict[str, Any]]) -> dict[str, Any] | None:
    return section(title, *([text] if text else []), tables=tables) if tables else None


def _forecast_words(behaviours: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, b in behaviours.items():
        rank, sign = number(get(b, "forecast", "spearman")), number(get(b, "forecast", "sign_agreement"))
        agreed = [f"rank correlation {rank:.2f}"] if rank is not None else []
        agreed += [f"the sign right for {percent(sign, 0)} of the effects over 0.2 nats"] if sign is not None else []
        if trials := get(b, "forecast", "trials"):
            gain, damage = number(trials[0].get("gain")), number(trials[0].get("damage"))
            if gain is not None and damage is not None:
                agreed.append(
                    f"the best of {len(trials)} trials moved the rate by {gain:+.0%}, others by {damage:.1%} at most"
                )
        if agreed:
            lines.append(f"{name}: {', '.join(agreed)}.")
    return lines


def _row(arm: str, cells: list[Cell]) -> dict[str, Any]:
    style = "paste" if arm == "paste" else "control" if arm in CONTROLS else ""
    return {"title": arm_title(arm), "cells": cells, "style": style}


def result(behaviours: Mapping[str, Any]) -> dict[str, Any]:
    """The big table: arms down, behaviours across; score, log-odds, and share of native's gain."""
    rows = []
    for arm in dict.fromkeys(a for b in behaviours.values() for a in arms_of(b)):
        cells = []
        for b in behaviours.values():
            found, share = get(b, "arms", arm) or {}, share_of(b, arm)
            score, span = interval(found.get("rate"))
            p = p_value(found.get("mcnemar_vs_base"))
            odds = interval(share.get("log_odds"), "share") if share else ("", "")
            scored = interval(share.get("rate"), "share")[0] if share.get("rate") is not None else ""
            length = number(found.get("sigma_length"))
            lines = [f"score {scored}" if scored else "", "" if length is None else f"{length:.1f} σ long"]
            cells += [
                cell((score, "\n".join(filter(None, (span, p)))), first=True),
                cell(interval(found.get("log_odds"), "signed")),
                cell((odds[0], "\n".join(filter(None, lines)))),
            ]
        rows.append(_row(arm, cells))
    heads = [{"title": "arm", "first": False}]
    for b in behaviours.values():
        heads += [{"title": score_name(b), "first": True}, {"title": "log-odds", "first": False},
                  {"title": "of native's gain", "first": False}]  # fmt: skip
    groups = [{"title": n + (f" (n = {b['n']})" if b.get("n") else ""), "span": 3} for n, b in behaviours.items()]
    note = ("The share of native's gain over the recipient is that of the log-odds, with that of the score under it; "
            "σ: length of the delta in standard deviations of the recipient's profile.")  # fmt: skip
    return {**table([], rows, note=note), "columns": heads, "groups": groups, "wide": True}


def side_effects(behaviours: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One table per behaviour: KL and perplexity on neutral text, over-triggering, the other behaviours' log-odds."""
    tables = []
    for name, b in behaviours.items():
        found = b.get("side_effects") or {}
        parts = {k: found.get(k) or {} for k in ("kl_neutral_text", "perplexity", "over_trigger", "log_odds_elsewhere")}
        elsewhere = parts.pop("log_odds_elsewhere")
        seen = {arm for part in (*parts.values(), *elsewhere.values()) for arm in part}
        arms = [a for a in arms_of(b) if a in seen] + sorted(seen - set(arms_of(b)))
        if not arms:
            continue
        plain_rate = number(get(parts, "over_trigger", "base", "value"))
        rows = []
        for arm in arms:
            kl, perplexity = parts["kl_neutral_text"].get(arm), parts["perplexity"].get(arm)
            cells = [cell(interval(kl, "plain")), cell(plain(perplexity))]
            cells.append(cell(_over_trigger(parts["over_trigger"].get(arm), None if arm == "base" else plain_rate)))
            cells += [cell(interval(change.get(arm), "signed")) for change in elsewhere.values()]
            rows.append(_row(arm, cells))
        columns = ["arm", "KL on neutral text (nats per token)", "perplexity of neutral text", "over-trigger rate",
                   *(f"log-odds of {other}, change (nats)" for other in elsewhere)]  # fmt: skip
        tables.append(table(columns, rows, title=name))
    return tables


def _over_trigger(cell: Any, base: float | None) -> tuple[str, str]:
    value, span = interval(cell)
    now = number(get(cell, "value"))
    change = "" if now is None or base is None else f"{signed(100 * (now - base), 1)} points"
    return value, "\n".join(filter(None, (span, change)))


def converters(behaviours: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The converters of each behaviour's paste, and their quality both ways."""
    tables = []
    for name, b in behaviours.items():
        for c in b.get("converters") or [b.get("converter") or {}]:
            if not c:
                continue
            ways = [c.get(f"quality_to_{side}") or {} for side in ("donor", "recipient")]
            keys = dict.fromkeys(k for quality in ways for k in quality if k != "warning")
            rows = [{"title": k, "style": "", "cells": [cell(plain(q.get(k))) for q in ways]} for k in keys]
            about = [str(c.get("pair") or ""), str(c.get("method") or "")]
            about += [f"alpha {plain(c['alpha'])}"] if c.get("alpha") else []
            said = dict.fromkeys(str(w) for w in (c.get("warning"), *(q.get("warning") for q in ways)) if w)
            title = f"{name}: {', '.join(filter(None, about))}"
            tables.append(table(["held-out quality", "to donor", "to recipient"], rows, title, " ".join(said)))
    return tables


def examples(behaviours: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The answers of the arms side by side."""
    groups = []
    for name, b in behaviours.items():
        items = [
            {
                "prompt": str(e.get("prompt", "")),
                "gold": e.get("gold") or None,
                "answers": [
                    {"title": arm_title(arm), "text": str(e[arm])}
                    for arm in ("base", "paste", "native", "donor_adapter")
                    if e.get(arm) is not None
                ],
            }
            for e in b.get("examples") or []
        ]
        if items:
            groups.append({"title": name, "entries": items, "open": OPEN_EXAMPLES})
    return groups


def costs(metrics: Metrics) -> list[dict[str, Any]]:
    """Seconds and FLOPs of native training and of the paste, and the profiles' own."""
    rows = []
    for name, b in (get(metrics, "behaviours") or {}).items():
        c = b.get("cost") or {}
        if not c:
            continue
        ratios = {u: cost_ratio(b, u) for u in ("seconds", "flops")}
        parts = ", ".join(f"{k} {plain(v)} s" for k, v in (c.get("paste_parts") or {}).items())
        cells: list[Cell] = []
        for unit in ("seconds", "flops"):
            ratio = ratios[unit]
            cells += [cell(plain(c.get(f"native_{unit}"))),
                      cell((plain(c.get(f"paste_{unit}")), parts if unit == "seconds" else "")),
                      cell("–" if ratio is None else ratio_words(ratio).removesuffix(" of"))]  # fmt: skip
        rows.append({"title": name, "cells": cells, "style": ""})
    columns = [
        "behaviour",
        "native (s)",
        "paste (s)",
        "paste / native",
        "native (FLOPs)",
        "paste (FLOPs)",
        "paste / native",
    ]
    tables = [table(columns, rows)] if rows else []
    profiles = get(metrics, "profiles") or {}
    if profiles:
        each = [(who, ", ".join(f"{k} {plain(v)}" for k, v in flat(p))) for who, p in profiles.items()]
        tables.append(facts("Profiles, made once per model and shared by all its pastes", each))
    return tables


def provenance(metrics: Metrics) -> list[dict[str, Any]]:
    """The job and the environment, as they were recorded."""
    parts = [(title, list(flat(get(metrics, key)))) for title, key in (("Job", "job"), ("Environment", "environment"))]
    return [facts(title, rows) for title, rows in parts if rows]
