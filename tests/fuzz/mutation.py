"""Changes to a folder of files that know what the files are: a header is changed as a header, and stays one if it can."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from . import bundles
from .binaries import change_archive, change_bytes, change_parquet, change_safetensors
from .bundles import FILE, Entry
from .texts import change_json, change_text, change_toml

MOST = 1 << 16
"""bytes of an input: findings stay small enough to be looked at"""
Change = Callable[[bytes, random.Random], bytes]
CHANGES: dict[str, Change] = {
    ".json": change_json, ".toml": change_toml, ".safetensors": change_safetensors, ".parquet": change_parquet,
    ".pt": change_archive, ".bin": change_archive, ".npz": change_archive, ".csv": change_text, ".txt": change_text,
    ".jsonl": change_text, ".md": change_text,
}  # fmt: skip


def mutate(
    data: bytes, names: Sequence[str], rng: random.Random, others: Sequence[bytes] = (),
    repair: Callable[[list[Entry], random.Random], list[Entry]] | None = None,
) -> bytes:  # fmt: skip
    """Another input, one to some changes from `data`.

    others: inputs to take entries from. repair: puts right what would only be refused at the door, sizes in a manifest say.
    """
    entries = bundles.unpack(data, len(names))
    for _ in range(1 + min(int(rng.expovariate(0.9)), 6)):
        entries = _changed(entries, names, rng, others)
    if repair is not None and rng.random() < 0.9:
        entries = repair(entries, rng)
    made = bundles.pack(entries)
    return made if len(made) <= MOST else made[:MOST]


def _changed(entries: list[Entry], names: Sequence[str], rng: random.Random, others: Sequence[bytes]) -> list[Entry]:
    entries = list(entries)
    if not entries or rng.random() < 0.06:
        return _rearranged(entries, names, rng, others)
    at = rng.randrange(len(entries))
    index, kind, content = entries[at]
    change = CHANGES.get(names[index][names[index].rfind(".") :], change_bytes)
    if rng.random() < 0.08:
        change = change_bytes
    try:
        made = change(content, rng)
    except Exception:  # what was changed before is no longer of its format, in as many ways as there are formats
        made = change_bytes(content, rng)
    entries[at] = (index, kind, made[:MOST])  # or the next change, which may repeat it 40 times, takes gigabytes
    return entries


def _rearranged(entries: list[Entry], names: Sequence[str], rng: random.Random, others: Sequence[bytes]) -> list[Entry]:
    """A file that is missing, a link, a pipe, a folder, another's, or of another name."""
    if others and (not entries or rng.random() < 0.3):
        found = bundles.unpack(rng.choice(others), len(names))
        if found:
            one = rng.choice(found)
            return [*(e for e in entries if e[0] != one[0]), one]
    if not entries:
        return [(rng.randrange(len(names)), FILE, b"")]
    at = rng.randrange(len(entries))
    index, kind, content = entries[at]
    what = rng.randrange(5)
    if what == 0:
        del entries[at]
    elif what == 1:
        entries[at] = (index, rng.choice((1, 1, 2, 3, 4)), content)
    elif what == 2:
        entries[at] = (rng.randrange(len(names)), kind, content)
    elif what == 3:
        entries[at] = (index, kind, rng.choice(entries)[2])
    else:
        entries.append((rng.randrange(len(names)), FILE, content))
    return entries
