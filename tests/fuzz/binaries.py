"""Changes to bytes, and to the binary formats: safetensors, zip archives of torch and numpy, parquet."""

from __future__ import annotations

import io
import json
import math
import random
import struct
import zipfile
from typing import Any

ITEMSIZE = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "U16": 2,
    "U32": 4,
    "U64": 8,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "C64": 8,
}
NUMBERS = (
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    127,
    128,
    255,
    1 << 15,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 32,
    1 << 40,
    1 << 62,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
)
ODD_FLOATS = (math.nan, math.inf, -math.inf, 1e38, -1e38, 1e-45, -0.0)


def change_bytes(content: bytes, rng: random.Random) -> bytes:
    """A bit turned, a number put in, a stretch left out, doubled, or moved; the ends, where headers lie, more often."""
    if not content:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(16)))
    n = len(content)
    near = rng.random()
    at = (
        rng.randrange(min(n, 64))
        if near < 0.3
        else max(0, n - 1 - rng.randrange(64))
        if near < 0.5
        else rng.randrange(n)
    )
    what, data = rng.randrange(8), bytearray(content)
    if what == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif what == 1:
        data[at] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    elif what in (2, 3):
        size = rng.choice((1, 2, 4, 8))
        number = (
            rng.choice(NUMBERS)
            if what == 2
            else int.from_bytes(data[at : at + size], "little") + rng.choice((-1, 1, 8, -8))
        )
        data[at : at + size] = (number % (1 << (8 * size))).to_bytes(size, rng.choice(("little", "little", "big")))
    elif what == 4:
        del data[at : at + rng.choice((1, 2, 8, 64, 1024))]
    elif what == 5:
        part = data[at : at + rng.choice((1, 4, 16, 256))]
        data[at:at] = part * rng.choice((1, 1, 16))
    elif what == 6:
        del data[at:]
    else:
        other = rng.randrange(n)
        data[at : at + 8] = data[other : other + 8]
    return bytes(data)


def change_safetensors(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose tensors have other names, dtypes, shapes or values; or whose header lies."""
    try:
        size = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + size])
        assert isinstance(header, dict)
    except (ValueError, struct.error, AssertionError, RecursionError, OverflowError):
        return change_bytes(content, rng)
    what = rng.random()
    if what < 0.08:
        return change_bytes(content, rng)
    if what < 0.3:
        return _lying(header, content, size, rng)
    try:
        return _whole(header, content[8 + size :], rng)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError):
        return _lying(header, content, size, rng)


def _lying(header: dict[str, Any], content: bytes, size: int, rng: random.Random) -> bytes:
    from .texts import change_json

    text = change_json(json.dumps(header).encode(), rng)
    told = len(text) if rng.random() < 0.85 else rng.choice((*NUMBERS, size, len(text) + 1, len(text) - 1))
    return struct.pack("<Q", told % (1 << 64)) + text + content[8 + size :]


def _whole(header: dict[str, Any], body: bytes, rng: random.Random) -> bytes:
    """A file that every reader takes for whole, with other tensors in it."""
    tensors = {
        name: [one["dtype"], list(one["shape"]), body[slice(*one["data_offsets"])]]
        for name, one in header.items() if name != "__metadata__"
    }  # fmt: skip
    meta = dict(header.get("__metadata__") or {})
    if meta and rng.random() < 0.3:
        _change_meta(meta, rng)
    elif tensors:
        name = rng.choice(list(tensors))
        _change_tensor(tensors, name, rng)
    found: dict[str, Any] = {"__metadata__": meta} if meta else {}
    at = 0
    for name, (dtype, shape, data) in tensors.items():
        found[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(found).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values())


def _change_meta(meta: dict[str, Any], rng: random.Random) -> None:
    from .texts import change_json

    key = rng.choice(list(meta))
    try:
        meta[key] = change_json(str(meta[key]).encode(), rng).decode()
    except UnicodeDecodeError:
        del meta[key]


def _change_tensor(tensors: dict[str, Any], name: str, rng: random.Random) -> None:
    dtype, shape, data = tensors[name]
    what, n, one = rng.randrange(9), math.prod(shape), ITEMSIZE[dtype]
    if what == 0:
        del tensors[name]
    elif what == 1:
        tensors[rng.choice((f"{name}x", "../x", "x" * 3000, "0.weight", "\0", name[:-1], "a\nb", "resid_post.7"))] = (
            tensors.pop(name)
        )
    elif what == 2:
        other = rng.choice([d for d, size in ITEMSIZE.items() if size == one])
        tensors[name][0] = other
    elif what == 3:
        tensors[name][1] = rng.choice((shape[::-1], [n], [1, n], [n, 1], [*shape, 1], [1] * 8 + shape, [1, 1, n]))
    elif what == 4:
        less = rng.choice(
            ([0], [0, *shape[1:]], [*shape[:-1], 0], [1], [], [1] * len(shape), [1 << 40, 0], [2] * len(shape))
        )
        data = (data or b"\0" * 16) * 4
        tensors[name] = [dtype, less, data[: math.prod(less) * one]]
        if len(tensors[name][2]) != math.prod(less) * one:
            tensors[name] = [dtype, [0], b""]
    elif what == 5 and dtype == "F32" and n:
        at = 4 * rng.randrange(n)
        tensors[name][2] = data[:at] + struct.pack("<f", rng.choice(ODD_FLOATS)) + data[at + 4 :]
    elif what == 6:
        tensors[name][2] = bytes(len(data)) if rng.random() < 0.5 else b"\xff" * len(data)
    elif what == 7:
        tensors[f"{name}2"] = list(tensors[name])
    else:
        swap = rng.choice(list(tensors))
        tensors[name], tensors[swap] = tensors[swap], tensors[name]


def change_archive(content: bytes, rng: random.Random) -> bytes:
    """A zip archive, as torch and numpy write them, with another entry; or its bytes."""
    if rng.random() < 0.2:
        return change_bytes(content, rng)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = [[info.filename, archive.read(info)] for info in archive.infolist()]
    except Exception:  # what was made of an archive is often none
        return change_bytes(content, rng)
    if not entries:
        return change_bytes(content, rng)
    one = rng.choice(entries)
    pickles = [e for e in entries if e[0].endswith("data.pkl")]
    one = pickles[0] if pickles and rng.random() < 0.6 else one
    what, kind = rng.random(), zipfile.ZIP_STORED
    if what < 0.08:
        entries.remove(one)
    elif what < 0.14:
        one[0] = rng.choice((f"../{one[0]}", f"/{one[0]}", one[0] + "x", "a/b", "x" * 200, "k.npy", "W_enc.npy"))
    elif what < 0.18:
        kind = zipfile.ZIP_DEFLATED
    elif what < 0.24:
        entries.append(list(rng.choice(entries)))
    elif what < 0.5 and one[1].startswith(b"\x93NUMPY"):
        one[1] = _numpy(one[1], rng)
    else:
        one[1] = change_bytes(one[1], rng)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        for name, data in entries:
            archive.writestr(zipfile.ZipInfo(name) if kind == zipfile.ZIP_STORED else name, data)
    return buffer.getvalue()


def _numpy(member: bytes, rng: random.Random) -> bytes:
    """An .npy whose header says another shape or dtype."""
    size = struct.unpack("<H", member[8:10])[0]
    body = member[10 + size :]
    descr = rng.choice(
        ("<f4", "<f4", "<f4", "<f8", "<f2", "|O", "<i8", "|b1", "<U99999", "|V9", "<c8", "<M8[s]", "<f16")
    )
    shape = rng.choice(
        (
            "(4,)",
            "(3, 4)",
            "(4, 3)",
            "()",
            "(0,)",
            f"({1 << 40},)",
            f"({1 << 62}, 4)",
            "(-1,)",
            "(4, True)",
            "4",
            "(1,)",
        )
    )
    text = f"{{'descr': {descr!r}, 'fortran_order': {rng.choice(('False', 'True', '0'))}, 'shape': {shape}, }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + body


def change_parquet(content: bytes, rng: random.Random) -> bytes:
    """A table with another column, order, type, null or row group; or its bytes, the footer most of all."""
    if rng.random() < 0.55:
        if rng.random() < 0.7 and len(content) > 12:  # the footer: its last eight bytes say how long it is
            size = int.from_bytes(content[-8:-4], "little")
            start = max(0, len(content) - 8 - size)
            return content[:start] + change_bytes(content[start:], rng)
        return change_bytes(content, rng)
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = _table(pq.read_table(io.BytesIO(content), use_threads=False), rng)
        sink = io.BytesIO()
        pq.write_table(table, sink, row_group_size=rng.choice((1, 2, 1 << 20)), use_dictionary=rng.random() < 0.5,
                       write_statistics=rng.random() < 0.8, compression=rng.choice(("none", "snappy", "zstd")))  # fmt: skip
        return sink.getvalue()
    except (pa.ArrowException, ValueError, OSError, KeyError, TypeError, IndexError, OverflowError):
        return change_bytes(content, rng)


def _table(table: Any, rng: random.Random) -> Any:
    import pyarrow as pa

    if not table.num_columns:
        return table
    i = rng.randrange(table.num_columns)
    name, column = table.schema.names[i], table.column(i)
    what, n = rng.randrange(9), table.num_rows
    if what == 0:
        return table.remove_column(i)
    if what == 1:
        return table.rename_columns(
            [rng.choice(("x", "prompt", "", "text")) if j == i else m for j, m in enumerate(table.schema.names)]
        )
    if what == 2:
        return table.take(pa.array(rng.sample(range(n), n)))
    if what == 3:
        return table.slice(rng.randrange(n + 1))
    if what == 4:
        return pa.concat_tables([table, table])
    odd = rng.choice(
        (
            None,
            -1,
            1 << 40,
            0,
            "x",
            "../x",
            "[" * 2000,
            '{"a": 1}',
            "[1]",
            '["x"]',
            "null",
            "\0",
            b"\xff",
            1.5,
            True,
            [1],
            math.nan,
            {"a": 1},
            "[[]]",
            '[{"role": "user"}]',
            "9" * 5000,
        )
    )
    values = column.to_pylist()
    if what == 5:
        values = [odd] * n
    elif what == 6 and n:
        values[rng.randrange(n)] = odd
    elif what == 7:
        values = [str(v) for v in values]
    else:
        values = [None] * n
    return table.set_column(i, name, pa.array(values))
