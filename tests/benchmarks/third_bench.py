"""A transfer to a model that no default was tuned on: adapters of both bundled models, pasted into `bundled:outsider`."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from workbench.job_options import open_job
from workbench.jobs import run_job
from workbench.summary import load_metrics

from .tables import table

DONORS = ("donor", "recipient")
RECIPIENT = "outsider"


def one_donor(donor: str, folder: Path, *, quick: bool = False) -> dict[str, Any]:
    """The bundled job with the outsider as its recipient and all of its defaults; what is kept of its metrics."""
    job = open_job("bundled:demo", donor=f"bundled:{donor}", recipient=f"bundled:{RECIPIENT}", out=folder / donor,
                   quick=quick)  # fmt: skip
    metrics = load_metrics(run_job(job).folder)
    return {
        "defaults": {"paste": job.paste.model_dump(), "profile": job.profile.model_dump()},
        "seconds": metrics["seconds"],
        "warnings": metrics["warnings"],
        "behaviours": {name: _kept(found) for name, found in metrics["behaviours"].items()},
    }


def _kept(found: dict[str, Any]) -> dict[str, Any]:
    chosen, side = found["forecast"]["chosen"], found["side_effects"]
    return {
        "n": found["n"],
        "score": found["score_name"],
        "arms": {arm: {key: row[key] for key in ("rate", "log_odds")} for arm, row in found["arms"].items()},
        "share": {"paste": found["gain_share"], **found["control_share"]},
        "pairs": chosen["pairs"],
        "method": chosen["method"],
        "alpha": chosen["alpha"],
        "strength": chosen["strength"],
        "spearman": found["forecast"]["spearman"],
        "sign_agreement": found["forecast"]["sign_agreement"],
        "kl_neutral_text": {arm: side["kl_neutral_text"].get(arm) for arm in ("paste", "native")},
        "over_trigger": {arm: side["over_trigger"].get(arm) for arm in ("base", "paste", "native")},
    }


def bench(folder: Path, *, quick: bool = False) -> dict[str, Any]:
    """Both donors, one run each, a process for each run."""
    with ProcessPoolExecutor(len(DONORS), get_context("spawn")) as pool:
        made = {donor: pool.submit(one_donor, donor, folder, quick=quick) for donor in DONORS}
        return {donor: run.result() for donor, run in made.items()}


def _of(cell: Any, scale: float = 100.0, form: str = ".0f") -> str:
    """A value with its interval; in percent unless told."""
    if cell is None:
        return "–"
    value, low, high = (format(scale * cell[key], form) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _defaults(found: dict[str, Any]) -> str:
    """The table of the job that decides the paste, as it was."""
    table = next(iter(found.values()))["defaults"]["paste"]
    return ", ".join(f"`{key} = {value}`" for key, value in table.items() if value is not None)


def tell(found: dict[str, Any]) -> str:
    """The section of docs/benchmarks.md."""
    lines = [(donor, name, b) for donor, one in found.items() for name, b in one["behaviours"].items()]
    arms = ("paste", "pinv", "mean_delta", "random_converter", "shuffled_pairs")
    shares, rates, chosen = [], [], []
    for donor, name, b in lines:
        odds = [_of(b["share"][arm]["log_odds"]) for arm in arms]
        shares.append((donor, name, *odds, _of(b["share"]["paste"]["rate"])))
        rates.append((donor, name, b["score"], *(_of(b["arms"][arm]["rate"]) for arm in ("base", "native", "paste")),
                      *(_of(b["arms"][arm]["log_odds"], 1, "+.2f") for arm in ("base", "native", "paste"))))  # fmt: skip
        kl, over = b["kl_neutral_text"], b["over_trigger"]
        pairs = ", ".join(f"{d} to {r}" for d, r in b["pairs"])
        chosen.append((donor, name, f"{pairs}, {b['method']} {b['alpha']:g}, strength {b['strength']:.2f}",
                       "–" if b["spearman"] is None else f"{b['spearman']:.2f}",
                       *(_of(kl[arm], 1, ".1e") for arm in ("paste", "native")),
                       *(_of(over[arm]) for arm in ("base", "paste", "native"))))  # fmt: skip
    told = dict.fromkeys(w for one in found.values() for w in one["warnings"])
    return "\n\n".join(
        [
            "`bundled:outsider` (GPT-NeoX-style: parallel residual, 5 layers, width 96, a tokenizer with a token for each "
            "digit) was used for no choice of any default. Two runs of the bundled job with its defaults: the bundled adapters "
            "of `bundled:donor`, and adapters that the job trains on `bundled:recipient`. "
            f"{lines[0][2]['n']} evaluation prompts, 95 % intervals. The defaults of the paste were: {_defaults(found)}.",
            "Share of native's gain in log-odds, %; of the random controls, over draws. Last, the paste's share of native's "
            "gain in rate, %; – where native gained nothing to share.",
            table(["from", "behaviour", "paste", "pinv as published", "mean delta", "random converter", "shuffled pairs",
                   "paste, by rate"], shares),
            "Rates in % and log-odds in nats:",
            table(["from", "behaviour", "score", "base", "native", "paste", "base, log-odds", "native", "paste"], rates),
            "What the forecast chose, its Spearman with what was measured on validation prompts, KL on neutral text in nats, "
            "and how often the behaviour is shown where it is not wanted, %:",
            table(["from", "behaviour", "chosen", "Spearman", "KL, paste", "KL, native", "unwanted, base", "paste", "native"],
                  chosen),
            *([f"Warned: {'; '.join(told)}."] if told else []),
        ]
    )  # fmt: skip
