"""Where the models and prompts that come with the project lie."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from .errors import UserError

PREFIX = "bundled:"


def located(source: str | Path, folder: str, suffix: str = "") -> Path:
    """`source` as a path, or in `data/<folder>` where it is `bundled:NAME`."""
    text = str(source)
    return bundled_path(text, folder, suffix) if text.startswith(PREFIX) else Path(source).expanduser()


def bundled_path(name: str, folder: str, suffix: str = "") -> Path:
    """The path of `bundled:NAME` in `data/<folder>`; raises UserError with the names that exist."""
    root = Path(str(resources.files("workbench_data"))) / folder
    bare = name.removeprefix(PREFIX)
    path = root / (bare + suffix)
    if bare in ("", ".", "..") or Path(bare).name != bare or not path.exists():
        names = sorted(PREFIX + p.name.removesuffix(suffix) for p in root.glob("*" + suffix) if p.name[0] not in "._")
        raise UserError(f"{name!r} is not bundled; allowed: {', '.join(names)}")
    return path
