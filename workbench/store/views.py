"""Stores as a terminal shows them: a table of many, the lines of one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .listing import Listed, compact_sites

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size_text(n_bytes: int) -> str:
    """Bytes as people read them.

    >>> size_text(0), size_text(1536), size_text(3 << 30)
    ('0 B', '1.5 KiB', '3.0 GiB')
    """
    power = min(int(math.log2(n_bytes) / 10), len(_UNITS) - 1) if n_bytes else 0
    return f"{n_bytes} B" if power == 0 else f"{n_bytes / 1024**power:.1f} {_UNITS[power]}"


def age_text(seconds: float) -> str:
    """How long ago, in the largest unit that is full.

    >>> age_text(5), age_text(7200), age_text(3 * 86400)
    ('5 s', '2 h', '3 d')
    """
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds / length)} {unit}"
    return f"{int(seconds)} s"


def stores_table(found: Sequence[Listed], folder: Path) -> Any:
    """A rich table of what `find_stores` found below `folder`."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, right in (("store", False), ("model", False), ("prompts", False), ("rows", True), ("sites", False),
                        ("tokens", False), ("dtype", False), ("size", True), ("age", True)):  # fmt: skip
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for one in found:
        name = str(one.path.relative_to(folder)) if one.path.is_relative_to(folder) else str(one.path)
        cells = [_shown(name if name != "." else str(one.path)), _shown(one.model), _shown(one.prompts)]
        if one.state in ("whole", "moments"):
            cells += [str(one.rows), compact_sites(one.sites), _shown(one.tokens), one.dtype]
        else:
            cells += ["", one.state, "", ""]
        table.add_row(*cells, size_text(one.n_bytes), age_text(one.age))
    return table


def _shown(text: str) -> Any:
    from rich.text import Text

    return Text(text)  # brackets in a name are no markup


def store_lines(shown: dict[str, Any]) -> Iterator[str]:
    """What `describe_store` found, line by line."""
    manifest = shown["manifest"]
    model, prompts, widths = manifest["model"], manifest["prompts"], manifest["sites"]
    sizes = sorted({entry["width"] for entry in widths.values()})
    yield f"store      {shown['path']}"
    yield f"model      {model['name']} ({model['family']}, {model['n_layers']} layers), basis {manifest['basis']}"
    for key, value in sorted(model["fingerprint"].items()):
        yield f"             {key}: {value}"
    if not model["fingerprint"]:
        yield "             fingerprint unknown"
    cut = f", {prompts['truncated']} cut" if prompts.get("truncated") else ""
    yield f"prompts    {prompts['name']}: {prompts['count']}, hash {prompts['hash'][:20]}{cut}"
    yield f"rows       {manifest['n_rows']}, tokens {manifest['tokens']}"
    yield f"sites      {compact_sites(widths)}, width {', '.join(map(str, sizes))}, {manifest['dtype']}"
    yield f"size       {size_text(shown['n_bytes'])} in {shown['n_shards']} shards"
    bad = {site: count for site, count in shown["nonfinite"].items() if count}
    yield f"not finite {', '.join(f'{site}: {count}' for site, count in bad.items()) or 'none'}"
    told = ("model", "prompts", "sites", "n_rows", "tokens", "dtype", "basis")
    for key in sorted(manifest.keys() - set(told)):
        value = manifest[key]
        yield f"{key:<10} {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)}"


def row_lines(shown: dict[str, Any]) -> Iterator[str]:
    """The rows that `describe_store` found, with the text of their tokens."""
    if "prompt" in shown:
        text = shown["prompt"]["text"]
        yield f"prompt     {shown['prompt']['index']} (id {shown['prompt']['id']}): {'unknown' if text is None else repr(text)}"
    if shown["rows"]:
        yield "       row   prompt position    token  text"
    for row in shown["rows"]:
        cells = ("?" if row[key] is None else str(row[key]) for key in ("row", "prompt", "position", "token_id"))
        text = "?" if row["text"] is None else repr(row["text"])
        yield f"{next(cells):>10} {next(cells):>8} {next(cells):>8} {next(cells):>8}  {text}"
