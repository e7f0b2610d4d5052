"""A folder as bytes and back: any bytes are some folder, so that whatever a fuzzer makes can be opened."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path

HEAD = struct.Struct("<BBI")
FILE, LINK, PIPE, FOLDER, DANGLING = 0, 1, 2, 3, 4
"""what an entry is; any other number is a file too"""
Entry = tuple[int, int, bytes]
"""which of the target's names, what it is, its content"""


def pack(entries: Sequence[Entry]) -> bytes:
    """The bytes that `unpack` reads.

    >>> unpack(pack([(0, FILE, b"{}"), (2, PIPE, b"")]), 3)
    [(0, 0, b'{}'), (2, 2, b'')]
    """
    return b"".join(HEAD.pack(index, kind, len(content)) + content for index, kind, content in entries)


def unpack(data: bytes, names: int) -> list[Entry]:
    """The entries in any bytes, of a target with so many names; what is cut short is as long as it is."""
    entries, at = [], 0
    while at + HEAD.size <= len(data) and len(entries) < 2 * names:
        index, kind, size = HEAD.unpack_from(data, at)
        at += HEAD.size
        entries.append((index % names, kind, data[at : at + size]))
        at += size
    return entries


def of_folder(folder: Path, names: Sequence[str]) -> bytes:
    """The bytes of a folder that the code itself wrote; files of other names are left out."""
    return pack([(i, FILE, (folder / name).read_bytes()) for i, name in enumerate(names) if (folder / name).is_file()])


def write(entries: Sequence[Entry], names: Sequence[str], folder: Path, outside: Path) -> bool:
    """Makes the folder; links lead to the file of that name in `outside`. Whether there is a link or pipe in it."""
    odd = False
    for index, kind, content in entries:
        place = folder / names[index]
        if "/" in names[index]:
            place.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(place):
            continue
        odd |= kind in (LINK, PIPE, DANGLING)
        if kind == LINK:
            place.symlink_to(outside / names[index])
        elif kind == DANGLING:
            place.symlink_to("../../../nowhere")
        elif kind == PIPE:
            os.mkfifo(place)
        elif kind == FOLDER:
            place.mkdir()
        else:
            with open(place, "wb") as stream:
                stream.write(content)
    return odd
