"""The card of a paste: a README.md beside it that says where it comes from, how well it was carried, and its licence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundled import located
from ..errors import UserError

if TYPE_CHECKING:
    from .adapter import Adapter

CARD = "README.md"
UNKNOWN = "not stated"
_LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")


def licence_of(name: str) -> str:
    """The licence of a model by the name that it was loaded from; `not stated` where nothing on this machine says it.

    Read from the front matter of its README.md (`license: ...`), else the first line of its LICENSE: in its folder, or in
    the hub's cache. Nothing is fetched.

    >>> licence_of("nobody/nothing")
    'not stated'
    """
    readme = _file(name, CARD)
    text = _beginning(readme) if readme else ""
    if text.startswith("---"):
        front = text[3:].split("\n---", 1)[0]
        found = {
            key: value.strip("'\" ") for key, value in re.findall(r"^(license(?:_name)?):[ \t]*(\S.*)$", front, re.M)
        }
        if said := found.get("license_name") or found.get("license"):
            return said
    for file in filter(None, (_file(name, one) for one in _LICENCE_FILES)):
        lines = [line.strip(" #*=-") for line in _beginning(file).splitlines()]
        if said := next(filter(None, lines), ""):
            return f"{said[:100]} ({file.name})"
    return UNKNOWN


def _file(name: str, file: str) -> Path | None:
    """A file of the model `name`, in its own folder or in the hub's cache."""
    try:
        folder = located(name, "models")
        if name and (folder / file).is_file():
            return folder / file
        if folder.is_dir() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            return None
    except (UserError, OSError):  # not bundled; no name of a file
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, file)
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def _beginning(file: Path) -> str:
    """The first characters of a text file; "" where it cannot be read."""
    try:
        with file.open(encoding="utf-8", errors="replace") as stream:
            return stream.read(20_000)
    except OSError:
        return ""


def card_text(adapter: Adapter) -> str:
    """README.md of a paste, in Markdown, from what the paste itself knows (`meta`)."""
    meta = adapter.meta
    donor = meta.get("donor") or {}
    name, recipient = donor.get("name") or UNKNOWN, adapter.base.get("name") or UNKNOWN
    licence = meta.get("donor_licence") or (licence_of(name) if name != UNKNOWN else UNKNOWN)
    sites = ", ".join(f"{site} (rank {part.rank})" for t in adapter.split() for site, part in t.parts.items())
    lines = [
        f"# {adapter.name or 'Paste'}",
        "",
        f"An adapter of {_identity(adapter.base, recipient)}, made from one of {_identity(donor, name)} without training:",
        "the donor's adapter was rewritten in the recipient's basis through the converters below (arXiv:2506.19140).",
        "",
        f"- Acts at: {sites}; positions: {adapter.positions}; strength: {adapter.strength:.4g}",
        f"- Licence of the donor: {licence}",
        f'- Load: `Adapter.load("FOLDER")`, then `with adapter.on(model): ...`; the model must be {recipient}',
        "",
        "## Converters",
        "",
        "| donor | recipient | converter |",
        "|---|---|---|",
        *(f"| {' | '.join(map(str, pair))} |" for pair in meta.get("pairs", [])),
    ]
    if "alpha" in meta:
        lines += ["", f"Ridge strength: {meta['alpha']:.4g} of the mean diagonal of X'X."]
    return "\n".join([*lines, "", "## Evidence", "", *_evidence(meta.get("evidence") or {})]) + "\n"


def _identity(fingerprint: Mapping[str, str], name: str) -> str:
    weights = fingerprint.get("weights", "")
    return f"{name} (weights {weights[:12]})" if weights else name


def _evidence(evidence: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for converter in evidence.get("converters", []):
        for side in ("quality_to_donor", "quality_to_recipient"):
            if quality := converter.get(side):
                what = "to the donor" if side == "quality_to_donor" else "to the recipient"
                lines.append(
                    f"- {converter['pair']}, {what}: R2 on held-out prompts {quality['r2_weighted']:.3f} (the mean alone "
                    f"{quality['r2_mean_baseline']:.3f})"
                )
        if converter.get("warning"):
            lines.append(f"- Warning, {converter['pair']}: {converter['warning']}")
    if said := evidence.get("forecast"):
        found = said.get("measured_on")
        measured = "not measured" if found is None else f"measured {found:+.3f}"
        lines.append(
            f"- Change of the behaviour's log-odds on validation prompts: forecast {said['on']:+.3f} (standard error "
            f"{said['on_se']:.3f}), {measured}, in nats"
        )
    note = "R2 says how well a map fits, not whether the paste works; the forecast and what was measured do."
    return [*lines, "", note] if lines else ["None was kept with this paste."]
