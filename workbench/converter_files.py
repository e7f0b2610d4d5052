"""A folder of converters: fitted between two profiles, kept with what they were fitted on, ready to carry adapters."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors.torch import save as to_bytes

from .adapters.adapter import Adapter
from .atomic import staged_folder
from .convert import Alpha, Converter, ConverterFits
from .converter_specs import ConverterSpec
from .errors import UserError
from .layer_matching import MATCHES, matched_sites
from .maps.linear_map import LinearMap, read_safetensors
from .maps.quality import Quality
from .paste import paste_adapter
from .sites import Site
from .small_files import read_json, reason
from .store import Store

FORMAT = "workbench.converters"
VERSION = 1
HEADER, TENSORS = "converters.json", "converters.safetensors"
_MAPS = ("to_donor", "to_recipient")


@dataclass(frozen=True, eq=False)
class ConverterSet(Sequence[Converter]):
    """Converters between two models, with the fingerprints of both and the hash of the prompts they were fitted on."""

    converters: tuple[Converter, ...]
    donor: Mapping[str, str]
    """fingerprint of the donor"""
    recipient: Mapping[str, str]
    """fingerprint of the recipient"""
    prompt_hash: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    """how they were fitted: match, tokens, holdout, seed, prompts (JSON values)"""

    def __len__(self) -> int:
        return len(self.converters)

    def __iter__(self) -> Iterator[Converter]:
        return iter(self.converters)

    def __getitem__(self, index: Any) -> Any:
        return self.converters[index]

    def paste(self, adapter: Adapter, *, strength: int | float = 1.0, allow_mismatch: bool = False) -> Adapter:
        """The donor's adapter as one of the recipient.

        Raises UserError for an adapter of another width, of another model (unless `allow_mismatch`), or that edits a
        site for which there is no converter.
        """
        there = {c.donor: c.to_donor.d_out for c in self}
        for site, part in (pair for term in adapter.split() for pair in term.parts.items()):
            if site in there and part.width != there[site]:
                raise UserError(
                    f"the adapter has width {part.width} at {site} and these converters carry adapters of width "
                    f"{there[site]} (trained on {self.donor.get('name', 'their donor')}); give one of that model, or fit "
                    "converters for the adapter's own"
                )
        mine, theirs = adapter.base.get("weights"), self.donor.get("weights")
        if mine and theirs and mine != theirs and not allow_mismatch:
            raise UserError(
                f"the adapter belongs to {adapter.base.get('name', 'another model')}, and these converters were fitted on "
                f"{self.donor.get('name', 'another model')}: weights {mine[:12]} and {theirs[:12]} differ; profile the "
                "adapter's own model, or pass allow_mismatch=True (--allow-mismatch)"
            )
        return paste_adapter(adapter, self.converters, recipient_fingerprint=self.recipient, strength=strength)


def fit_set(
    donor: Store,
    recipient: Store,
    *,
    layers: Sequence[int] | None = None,
    match: str = "nearest",
    method: str = "ridge",
    alpha: Alpha = 0.1,
    holdout: int | float = 0.2,
    seed: int = 0,
    pairing: str = "last",
) -> ConverterSet:
    """Fits a converter for each donor site of two profiles of the same prompts.

    layers: of the donor; every layer that its profile holds unless given. match: which recipient layer answers, by
    depth (`nearest`, `floor`, `ends`), or in ascending order by likeness (`cka`, `svcca`) or held-out R2 (`r2`). method,
    alpha, pairing: see `fit_converters`. holdout: the share of prompts for the quality figures.
    Raises UserError when the stores do not pair, or lack a layer; for an unknown match, method or alpha.
    """
    if match not in MATCHES:
        more = " (forecast needs behaviours: give them in a job file)" if match == "forecast" else ""
        raise UserError(f"unknown layer matching {match!r}; allowed: {', '.join(MATCHES)}{more}")
    if not 0 <= holdout < 1:
        raise UserError(f"holdout {holdout} is not a share of the prompts; give 0 or more and less than 1")
    spec = ConverterSpec.parse(method, alpha)
    fits = ConverterFits(donor, recipient, holdout, seed, pairing=pairing)
    ridge = spec.number if spec.kind == "ridge" and spec.value != "cv" else 0.1
    made = [fits.converter(d, r, method, alpha) for d, r in _pairs(fits, layers, match, ridge)]
    meta = {"match": match, "tokens": donor.tokens, "pairing": pairing, "holdout": holdout, "seed": seed,
            "prompts": donor.manifest["prompts"]["name"]}  # fmt: skip
    return ConverterSet(tuple(made), donor.fingerprint, recipient.fingerprint, donor.prompt_hash, meta)


def _pairs(
    fits: ConverterFits, layers: Sequence[int] | None, match: str, alpha: int | float
) -> list[tuple[Site, Site]]:
    """(donor site, recipient site), matched among the sites of one point."""
    donor, recipient = fits.donor, fits.recipient
    if layers is not None:
        n_donor = donor.manifest["model"]["n_layers"]
        wanted = {Site.parse(l, n_donor).layer for l in layers}
        lacking = sorted(wanted - {s.layer for s in donor.sites})
        if lacking:
            has = ", ".join(map(str, donor.sites))
            raise UserError(f"the donor's store {donor.path} has no layer {lacking[0]}; it has {has}: profile it")
    pairs = []
    for point in sorted({s.point for s in donor.sites}):
        mine = [s for s in donor.sites if s.point == point and (layers is None or s.layer in wanted)]
        theirs = [s for s in recipient.sites if s.point == point]
        if not mine:
            continue
        if not theirs:
            raise UserError(f"the recipient's store {recipient.path} has no {point} to answer the donor's; profile it")
        matched = matched_sites(fits, mine, theirs, match, alpha=alpha)
        pairs += [(s, Site(matched[s.layer], point)) for s in mine]
    return pairs


def save_converters(converters: ConverterSet, folder: str | Path, *, overwrite: bool = False) -> None:
    """Writes converters.json and converters.safetensors; UserError where `folder` exists, unless `overwrite`."""
    header = {
        "format": FORMAT,
        "version": VERSION,
        "donor": dict(converters.donor),
        "recipient": dict(converters.recipient),
        "prompt_hash": converters.prompt_hash,
        "meta": dict(converters.meta),
        "converters": [_entry(c) for c in converters],
    }
    tensors = {
        f"{i}.{side}.{key}": getattr(getattr(c, side), key).cpu().contiguous()
        for i, c in enumerate(converters) for side in _MAPS for key in ("weight", "bias")
    }  # fmt: skip
    with staged_folder(folder, marker=HEADER, overwrite=overwrite) as staged:
        (staged / HEADER).write_text(json.dumps(header, indent=2, sort_keys=True, allow_nan=False) + "\n")
        (staged / TENSORS).write_bytes(to_bytes(tensors))


def _entry(c: Converter) -> dict[str, Any]:
    entry: dict[str, Any] = {"donor": str(c.donor), "recipient": str(c.recipient), "method": c.method, "alpha": c.alpha}
    for side in _MAPS:
        scored: Quality | None = getattr(c, f"quality_{side}")
        entry[f"quality_{side}"] = None if scored is None else {k: _plain(v) for k, v in asdict(scored).items()}
        entry[f"meta_{side}"] = dict(getattr(c, side).meta)
    return entry


def _plain(value: Any) -> Any:
    """JSON has no infinity: the condition of a zero map is kept as the word."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def load_converters(folder: str | Path) -> ConverterSet:
    """Reads what `save_converters` wrote; UserError, in one line, for any other folder."""
    folder = Path(folder).expanduser()
    file = folder / HEADER
    if not folder.is_dir():
        raise UserError(f"converters {folder}: no such folder; make one with `workbench convert`")
    if not file.is_file():
        raise UserError(f"converters {folder}: has no {HEADER}; give a folder that `workbench convert` made")
    try:
        header = read_json(file)
    except (OSError, ValueError) as err:
        raise UserError(
            f"converters {folder}: its {HEADER} is damaged (not JSON: {reason(err)}); fit them again"
        ) from err
    if not isinstance(header, dict) or header.get("format") != FORMAT or header.get("version") != VERSION:
        raise UserError(f"converters {folder}: its {HEADER} is not of format {FORMAT!r} version {VERSION}")
    tensors, _ = read_safetensors(folder / TENSORS)
    try:
        for side in ("donor", "recipient"):
            if not all(isinstance(one, str) for one in header[side].values()):
                raise TypeError(f"the fingerprint of the {side} is none")
        listed = [_read_entry(i, entry, tensors) for i, entry in enumerate(header["converters"])]
        return ConverterSet(tuple(listed), header["donor"], header["recipient"], header["prompt_hash"], header["meta"])
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as err:
        what = f"{type(err).__name__}: {err}"
        raise UserError(f"converters {folder}: the folder is damaged ({what:.200}); fit them again") from err


def _read_entry(i: int, entry: Mapping[str, Any], tensors: Mapping[str, Any]) -> Converter:
    floats = {f.name for f in fields(Quality) if f.type == "float"}
    maps, scored = [], []
    for side in _MAPS:
        maps.append(LinearMap(tensors[f"{i}.{side}.weight"], tensors[f"{i}.{side}.bias"], entry[f"meta_{side}"]))
        found = entry[f"quality_{side}"]
        values: dict[str, Any] = {k: float(v) if k in floats else v for k, v in (found or {}).items()}
        if not isinstance(values.get("warning"), str | None) or not all(
            type(values.get(k, 0)) is int for k in ("rank", "n", "d")
        ):
            raise TypeError(f"quality_{side} is not what it should be")
        scored.append(Quality(**values) if found else None)
    if not isinstance(entry["method"], str) or type(entry["alpha"]) not in (int, float):
        raise TypeError("its method is no word, or its alpha no number")
    return Converter(Site.parse(entry["donor"]), Site.parse(entry["recipient"]), maps[0], maps[1], entry["method"],
                     entry["alpha"], scored[0], scored[1])  # fmt: skip


def quality_rows(converters: Iterable[Converter]) -> list[dict[str, Any]]:
    """One line per map: from, to, alpha, held-out R2 beside its two baselines, cycle error, condition, warning."""
    rows = []
    for c in converters:
        for source, target, scored in (
            (f"recipient {c.recipient}", f"donor {c.donor}", c.quality_to_donor),
            (f"donor {c.donor}", f"recipient {c.recipient}", c.quality_to_recipient),
        ):
            row: dict[str, Any] = {"from": source, "to": target, "method": c.method, "alpha": c.alpha}
            keys = (
                "r2_weighted",
                "r2_mean_baseline",
                "r2_identity_bias",
                "cycle_error",
                "condition",
                "n",
                "d",
                "warning",
            )
            rows.append(row | {key: _plain(getattr(scored, key, None)) for key in keys})
    return rows
