"""The summary at the head of docs/benchmarks.md: each claim with what was wanted, read from the results of its section."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Claim:
    """One line: what is claimed, what was wanted where there was a target, and where it is read from."""

    claim: str
    section: str
    value: Callable[[Result], float]
    form: str = "{:.1f}"
    wanted: str = ""
    met: Callable[[float], bool] | None = None


def _widest(found: Result) -> float:
    lines = found["lines"]
    return max(abs(x["slope"] - x["counted"]) for x in lines if x["counted"] is not None)


def _least(bound: float) -> Callable[[float], bool]:
    return lambda value: value >= bound


def _most(bound: float) -> Callable[[float], bool]:
    return lambda value: value <= bound


CLAIMS = (
    Claim("profile of all layers, stored, over a plain forward pass: tokens/s", "speed", lambda r: r["ratio"]["12 layers, all"],
          "{:.2f} times", "at least 1", _least(1)),
    Claim("the same profile over TransformerLens' run_with_cache, which writes nothing", "speed",
          lambda r: r["ratio"]["12 layers, all"] / r["ratio"]["run_with_cache"], "{:.1f} times"),
    Claim("over nnsight's trace", "speed", lambda r: r["ratio"]["12 layers, all"] / r["ratio"]["nnsight trace"],
          "{:.1f} times"),
    Claim("over Hugging Face's output_hidden_states", "speed",
          lambda r: r["ratio"]["12 layers, all"] / r["ratio"]["output_hidden_states"], "{:.1f} times"),
    Claim("a profile on a GPU over a plain forward pass, an 8B shape", "speed-gpu",
          lambda r: r["ratio"]["32 layers, all"], "{:.2f} times", "at least 0.95", _least(0.95)),
    Claim("memory of profiling 1,000,000 rows", "profile-memory", lambda r: r["1000000"]["grown"], "{:.0f} MiB"),
    Claim("reading a store in batches over dd, the caches dropped", "store", lambda r: r["read"][0]["ratio_batches_cold"],
          "{:.2f} times", "at least 0.8", _least(0.8)),
    Claim("the same, in memory", "store", lambda r: r["read"][0]["ratio_batches_warm"], "{:.2f} times"),
    Claim("opening a store of 10,000,000 rows at 32 sites", "store", lambda r: 1000 * r["open"][1]["open_s"], "{:.0f} ms",
          "under 200 ms", _most(200)),
    Claim("one ridge map by 5-fold CV, d = 2,304, over scikit-learn's grid search", "maps", lambda r: r["one"]["cv_ratio"],
          "{:.1f} times", "at least 9", _least(9)),
    Claim("the same by GCV", "maps", lambda r: r["one"]["gcv_ratio"], "{:.1f} times", "at least 30", _least(30)),
    Claim("all pairs of 26 layers over as many grid searches", "maps", lambda r: r["many"]["ratio"], "{:.0f} times",
          "at least 50", _least(50)),
    Claim("largest difference of a fold's score from scikit-learn's", "maps",
          lambda r: max(r[k]["largest_score_difference"] for k in ("one", "small")), "{:.0e}", "at most 1e-6", _most(1e-6)),
    Claim("moments on a GPU: share of the rate of plain float32 products", "maps-gpu", lambda r: r["fraction"], "{:.0%}",
          "at least 60%", _least(0.6)),
    Claim("folding through the Gram over two dense pseudo-inverses", "paste", lambda r: r["fold"]["ratio"][0], "{:.1f} times",
          "at least 15", _least(15)),
    Claim("largest difference of the two folds", "paste", lambda r: r["fold"]["difference"], "{:.1e}", "at most 1e-5",
          _most(1e-5)),
    Claim("14 layers of widths 4,096 and 3,072 folded", "paste", lambda r: r["fold"]["all_s"][0], "{:.1f} s", "under 10 s",
          _most(10)),
    Claim("generation with a paste over without", "paste", lambda r: r["generation"]["paste"], "{:.3f} times", "at most 1.02",
          _most(1.02)),
    Claim("the paste of these 14 layers on disk, as int8", "paste", lambda r: r["fold"]["bytes_int8"] / 1e6, "{:.2f} MB",
          "at most 1 MB", _most(1)),
    Claim("logistic probes of every layer over reading its rows once", "probes",
          lambda r: r["seconds"]["logistic"] / r["seconds"]["reading"], "{:.1f} times"),
    Claim("a folded feed-forward network over the dense one: tokens/s", "fold", lambda r: r["models"][0]["ffn_ratio"],
          "{:.2f} times"),
    Claim("first page of a store of 1,000,000 rows in the explorer", "explorer", lambda r: r["large"]["overview_s"],
          "{:.2f} s", "under 2 s", _most(2)),
    Claim("another site of it", "explorer", lambda r: r["large"]["change_s"], "{:.2f} s", "under 1 s", _most(1)),
    Claim("a selection in it, until its rows are listed", "explorer", lambda r: 1000 * r["large"]["selection_s"],
          "{:.0f} ms", "under 300 ms", _most(300)),
    Claim("memory of the explorer's server over what it had", "explorer", lambda r: r["large"]["memory_bytes"] / 2**20,
          "{:.0f} MiB", "under 2,048 MiB", _most(2048)),
    Claim("exceptions of ten readers at once", "explorer", lambda r: r["sessions"]["exceptions"], "{:.0f}", "0", _most(0)),
    Claim("killed profiles that end as if they were not", "faults", lambda r: r["kills"]["equal"] / r["kills"]["kills"],
          "{:.0%}", "100%", _least(1)),
    Claim("wrong reads beside a writer", "faults", lambda r: r["races"]["wrong"], "{:.0f}", "0", _most(0)),
    Claim("largest distance of a slope from that of the counted work", "growth", _widest, "{:.2f}"),
)  # fmt: skip


def rows(kept: Mapping[str, Any], titles: Mapping[str, str]) -> list[tuple[str, ...]]:
    """(claim, wanted, measured, section) of every claim whose section was measured."""
    found = []
    for claim in CLAIMS:
        if claim.section not in kept:
            continue
        value = claim.value(kept[claim.section]["result"])
        missed = "" if claim.met is None or claim.met(value) else " **not met**"
        title = titles[claim.section]
        found.append(
            (claim.claim, claim.wanted or "-", claim.form.format(value) + missed, f"[{title}](#{anchor(title)})")
        )
    return found


def anchor(title: str) -> str:
    """What a heading is linked by.

    >>> anchor("Stores: opening, reading, memory")
    'stores-opening-reading-memory'
    """
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c == "-")
