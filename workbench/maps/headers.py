"""What a saved file says of itself, read and checked: where that is damaged, one line says so and no reader goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..small_files import parse_json, read_json, reason


def read_header(
    text: str | Path, file: Path, what: str, *, format: str, version: int, fields: Mapping[str, type]
) -> dict[str, Any]:
    """The header of `file`, from its JSON text or the file that holds it.

    Args:
        file: what errors name; what: what it is said to be, as in "a saved map".
        format, version: what it must say of itself.
        fields: what else it must have, and of which type.

    Raises:
        UserError: no JSON, another format or version, a field that is missing or of another type.

    >>> text = '{"format": "workbench.example", "version": 1, "n": 3}'
    >>> known = {"format": "workbench.example", "version": 1, "fields": {"n": int}}
    >>> read_header(text, Path("e.json"), "an example", **known)["n"]
    3
    """
    try:
        header = read_json(text) if isinstance(text, Path) else parse_json(text)
    except (OSError, ValueError) as err:
        raise UserError(f"{file} is not {what}: its header cannot be read as JSON ({reason(err)})") from err
    if not isinstance(header, dict) or header.get("format") != format:
        raise UserError(f"{file} is not {what}: its header does not say format {format!r}")
    if type(header.get("version")) is not int or header["version"] != version:
        raise UserError(f"{file} is {what} of version {header.get('version')!r}; this release reads version {version}: "
                        "make it again")  # fmt: skip
    for name, kind in fields.items():
        if type(header.get(name)) is not kind:  # bool is an int to isinstance, not to a header
            raise damaged(file, f"its header has no {name}" if name not in header
                          else f"its header's {name} is not of type {kind.__name__}")  # fmt: skip
    return header


def damaged(file: Path, why: str) -> UserError:
    """The error of a file whose parts do not fit together."""
    return UserError(f"{file} is damaged: {why}; make it again or restore it from a copy")
