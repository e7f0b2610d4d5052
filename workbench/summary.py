"""The numbers of a run in words and rows: what the terminal, the report and a notebook all show.

Everything here reads the dictionary of metrics.json, where any key may be absent; `missing` says what is, and how to
get it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from .errors import UserError
from .small_files import read_json

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = 1
Metrics = Mapping[str, Any]

ARMS = {
    "donor_base": "donor",
    "donor_adapter": "donor + adapter",
    "base": "recipient",
    "native": "native training",
    "paste": "paste",
    "pinv": "paste by pinv",
    "random_converter": "control: random converter",
    "shuffled_pairs": "control: shuffled pairs",
    "mean_delta": "control: mean delta",
}
CONTROLS = ("random_converter", "shuffled_pairs", "mean_delta")


def load_metrics(path: str | Path) -> dict[str, Any]:
    """The metrics of a run: its folder, or the metrics.json itself.

    Raises UserError where there is none, where it is not JSON, and where it is of another schema version.
    """
    path = Path(path)
    file = path / "metrics.json" if path.is_dir() else path
    try:
        found = read_json(file)
    except OSError as err:
        raise UserError(f"{path} holds no metrics.json; give the folder of a finished run") from err
    except ValueError as err:
        raise UserError(f"{file} is not whole JSON ({err}); run the job again") from err
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        raise UserError(f"{file} has schema {schema!r}; this version reads schema {SCHEMA}: run the job again")
    return found


def get(tree: Any, *keys: str) -> Any:
    """The value at a path of keys, or None where any of them is absent."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def arm_title(arm: str) -> str:
    return ARMS.get(arm, arm.replace("_", " "))


def arms_of(behaviour: Metrics) -> list[str]:
    """The arms that a behaviour has, the known ones first and in their fixed order."""
    there = get(behaviour, "arms") or {}
    return [a for a in ARMS if a in there] + [a for a in there if a not in ARMS]


def score_name(behaviour: Metrics) -> str:
    return str(behaviour.get("score_name") or "rate")


def share_of(behaviour: Metrics, arm: str) -> Metrics:
    """{"rate", "log_odds"}: an arm's gain over the recipient as a share of native's, each with its interval."""
    if arm == "paste":
        return get(behaviour, "gain_share") or {}
    return get(behaviour, "control_share", arm) or {}


def result_frame(metrics: Metrics) -> pd.DataFrame:
    """One row per behaviour and arm: rate, log_odds and share with low and high, n, p, sigma_length."""
    rows = []
    for name, behaviour in (get(metrics, "behaviours") or {}).items():
        for arm in arms_of(behaviour):
            found = behaviour["arms"][arm]
            row: dict[str, Any] = {"behaviour": name, "arm": arm, "score": score_name(behaviour)}
            cells = {"rate": found.get("rate"), "log_odds": found.get("log_odds")}
            cells |= {f"share_{key}": share_of(behaviour, arm).get(key) for key in ("rate", "log_odds")}
            for key, cell in cells.items():
                row |= {key: get(cell, "value"), f"{key}_low": get(cell, "low"), f"{key}_high": get(cell, "high")}
            row |= {"n": found.get("n"), "p_vs_base": found.get("mcnemar_vs_base")}
            rows.append(row | {"sigma_length": found.get("sigma_length"), "draws": found.get("draws")})
    return pd.DataFrame(rows)


def number(x: Any) -> float | None:
    """x as a finite float, else None."""
    known = isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) <= sys.float_info.max  # false for NaN
    return float(x) if known else None


def percent(x: Any, digits: int = 1) -> str:
    """
    >>> percent(0.8125), percent(None)
    ('81.2 %', '–')
    """
    value = number(x)
    return "–" if value is None else f"{100 * value:.{digits}f} %".replace("-", "−")


def signed(x: Any, digits: int = 2) -> str:
    """
    >>> signed(1.234), signed(-0.5)
    ('+1.23', '−0.50')
    """
    value = number(x)
    return "–" if value is None else f"{value:+.{digits}f}".replace("-", "−")


def plain(x: Any, digits: int = 3) -> str:
    """A number of `digits` significant figures, without an exponent where it can be read without.

    >>> plain(0.00423), plain(812.4), plain(2048), plain(3.1e12)
    ('0.00423', '812', '2,048', '3.10e+12')
    """
    value = number(x)
    if value is None:
        return "–" if x is None else str(x)
    if isinstance(x, int):
        return f"{x:,}".replace("-", "−")
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    whole = math.floor(math.log10(abs(value))) + 1 if value else 1
    return f"{value:,.{max(0, digits - whole)}f}".replace("-", "−")


def interval(cell: Any, style: str = "percent") -> tuple[str, str]:
    """(value, 'low to high') of a cell {"value", "low", "high"}; the second is empty where there is no interval."""
    show = {"percent": percent, "share": lambda x: percent(x, 0), "signed": signed, "plain": plain}[style]
    value = get(cell, "value") if isinstance(cell, Mapping) else cell
    low, high = number(get(cell, "low")), number(get(cell, "high"))
    span = f"{show(low)} to {show(high)}".replace(" % to", " to") if low is not None and high is not None else ""
    return show(value), span


def p_value(p: Any) -> str:
    value = number(p)
    return "" if value is None else "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _share_words(cell: Any, what: str) -> str:
    value, span = interval(cell, "share")
    between = f" (95 % interval {span})" if span else ""
    return f"{value} of native's gain in {what}{between}"


def headline(name: str, behaviour: Metrics) -> str:
    """What happened to a behaviour, in a few sentences made from its numbers alone; the bad told like the good."""
    score, arms = score_name(behaviour), get(behaviour, "arms") or {}
    base, paste, native = (get(arms, arm, "rate", "value") for arm in ("base", "paste", "native"))
    if paste is None:
        return f"{name}: no paste was measured."
    parts = [_verdict(name, behaviour)]
    came = f"{score} went from {percent(base)} (recipient) to {percent(paste)} (paste)"
    p = p_value(get(arms, "paste", "mcnemar_vs_base"))
    came += (f", {p}" if p else "") + (f"; native training gave {percent(native)}" if native is not None else "")
    parts.append(came)
    times = cost_ratio(behaviour, "seconds")
    if times is not None:
        whole = number(get(behaviour, "cost", "ratio_seconds_with_forecast"))
        more = f"; with choosing it, {ratio_words(whole)} that time" if whole else ""
        parts.append(f"the paste took {ratio_words(times)} the time of native training{more}")
    controls = [
        f"{arm_title(arm).removeprefix('control: ')} {interval(share, 'share')[0]}"
        for arm in CONTROLS
        if (share := share_of(behaviour, arm).get("log_odds")) is not None
    ]
    if controls:
        parts.append(f"controls, in log-odds: {', '.join(controls)} of native's gain")
    return " ".join(part[0].upper() + part[1:] + "." if i else part + "." for i, part in enumerate(parts))


def _verdict(name: str, behaviour: Metrics) -> str:
    share, odds = share_of(behaviour, "paste").get("rate"), share_of(behaviour, "paste").get("log_odds")
    score = score_name(behaviour)
    if share is None and odds is None:
        why = "no native arm" if get(behaviour, "arms", "native") is None else "native training gained nothing to share"
        return f"{name}: {why}, so the paste cannot be given as a share of native's gain"
    first, what = (share, score) if share is not None else (odds, "log-odds")
    moved = number(get(first, "value"))
    verb = "reached" if moved is not None and moved >= 0 else "went the wrong way:"
    text = f"{name}: the paste {verb} {_share_words(first, what)}"
    return text + (f" and {interval(odds, 'share')[0]} in log-odds" if share is not None and odds is not None else "")


def cost_ratio(behaviour: Metrics, unit: str) -> float | None:
    """Native's cost over the paste's, in `seconds` or `flops`; None where either was not measured."""
    native, paste = (number(get(behaviour, "cost", f"{arm}_{unit}")) for arm in ("native", "paste"))
    return native / paste if native and paste else None


def ratio_words(native_over_paste: float) -> str:
    """
    >>> ratio_words(120.4), ratio_words(0.5)
    ('1/120 of', '2.0 times')
    """
    return f"1/{native_over_paste:,.0f} of" if native_over_paste >= 2 else f"{1 / native_over_paste:.1f} times"


def missing(metrics: Metrics) -> list[str]:
    """What a run did not measure, and how to get it: one line each."""
    notes = []
    behaviours = get(metrics, "behaviours") or {}
    if not behaviours:
        notes.append("No behaviour was measured: name prompts and a grader in the job and run it again.")
    lacks = {
        "native": "no native training, so no share of its gain and no cost ratio: let the job train a native adapter",
        "random_converter": "no random-converter control: leave the controls of the job on",
        "shuffled_pairs": "no shuffled-pairs control: leave the controls of the job on",
    }
    for name, behaviour in behaviours.items():
        gone = [why for arm, why in lacks.items() if get(behaviour, "arms", arm) is None]
        if not get(behaviour, "forecast", "candidates"):
            gone.append("no forecast: let the job choose its converter by forecast")
        elif not any(number(c.get("measured_on")) is not None for c in behaviour["forecast"]["candidates"]):
            gone.append("no candidate was measured, so forecast and measurement cannot be compared")
        if not get(behaviour, "dose"):
            gone.append("no dose-response curve: give the job a list of strengths")
        if get(behaviour, "side_effects") is None:
            gone.append("no side effects: give the job neutral text")
        notes += [f"{name}: {why}." for why in gone]
    return notes


def result_table(metrics: Metrics) -> Table:
    """The result as a rich Table for the terminal, 80 columns wide: the same numbers as the report's."""
    from rich.table import Table
    from rich.text import Text

    name = str(get(metrics, "job", "name") or "result")
    table = Table(title=Text(name), box=None, header_style="bold", pad_edge=False, title_justify="left", padding=(0, 1))
    table.add_column("arm")
    for column in ("score %", "log-odds", "share %", "length"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, behaviour in (get(metrics, "behaviours") or {}).items():
        table.add_row(Text(name, style="bold cyan"), Text(score_name(behaviour), style="cyan"),
                      Text(f"n = {behaviour['n']}" if behaviour.get("n") else "", style="cyan"))  # fmt: skip
        for arm in arms_of(behaviour):
            found, share = behaviour["arms"][arm], share_of(behaviour, arm)
            both = [interval(share.get(key), "share")[0] for key in ("rate", "log_odds")]
            length = number(found.get("sigma_length"))
            cells = [
                arm_title(arm).replace("control: ", "- "),
                _cell(interval(found.get("rate"))),
                _cell(interval(found.get("log_odds"), "signed")),
                " / ".join(both) if share else "",
                "" if length is None else f"{length:.1f} σ",
            ]
            style = "bold green" if arm == "paste" else "dim" if arm in CONTROLS else ""
            table.add_row(*(Text(cell.replace(" %", "")) for cell in cells), style=style)
        table.add_row("")
    table.caption = Text(
        "[low, high]: 95 % interval. share: of native's gain, in score / log-odds.\n"
        "length: of the delta, in sigmas of the recipient's profile. -: controls.", style="dim"
    )  # fmt: skip
    table.caption_justify = "left"
    return table


def _cell(parts: tuple[str, str]) -> str:
    value, span = parts
    return f"{value} [{span.replace(' to ', ', ')}]" if span else value
