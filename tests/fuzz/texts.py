"""Changes to JSON, TOML and plain text."""

from __future__ import annotations

import json
import random
import re
import tomllib
from typing import Any

from .binaries import change_bytes

RAW = ("NaN", "-Infinity", "1e999", "9" * 5000, "-0", "[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000, "1e400",
       '"\\ud800"', "9007199254740993", "1" + "0" * 400, '{"a":1,"a":2}')  # fmt: skip
"""texts that json reads, or says why not, and few people think of"""
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    7,
    255,
    1 << 31,
    1 << 53,
    1 << 63,
    -(1 << 63),
    1 << 64,
    10**30,
    0.5,
    -1.5,
    1e308,
    1e-320,
    "",
    "x",
    "../x",
    "../../../etc/passwd",
    "/etc/passwd",
    "a" * 5000,
    "\0",
    "a\nb\nc",
    "\u2028",
    "\x1b[31m",
    "\u202eabc",
    "🂡" * 9,
    "resid_post.0",
    "resid_post.1",
    "resid_post.-1",
    "resid_post.99999999999999999999",
    "resid_post.٣",
    "blocks.0.hook_z",
    "last",
    "all",
    "first:99999999999999999999",
    "float16",
    "bfloat16",
    "float64",
    "int8",
    "bundled:donor",
    "bundled:../x",
    "hub:a/b",
    [],
    {},
    [[]],
    [None],
    [0],
    ["x"],
    {"a": 1},
    {"": {}},
    [[0, 1], [1, 0]],
    ["resid_post.0", "resid_post.1"],
    [1e308, -1e308],
)


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a tree."""
    found, left = [], [tree]
    while left and len(found) < 4000:
        one = left.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        found += [(one, key) for key in keys]
        left += [one[key] for key in keys]
    return found


def change_tree(tree: Any, rng: random.Random, values: tuple[Any, ...] = VALUES) -> Any:
    """A JSON value, changed in place where it is a container, and returned."""
    places = _places(tree)
    if not places or rng.random() < 0.02:
        return rng.choice(values)
    box, key = rng.choice(places)
    what, old = rng.randrange(10), box[key]
    if what == 0:
        del box[key]
    elif what == 1 and isinstance(box, dict):
        box[rng.choice(("x", "", "../x", "\0", "a" * 300, f"{key}x", "__metadata__", "a\nb"))] = box.pop(key)
    elif what == 2 and isinstance(box, list):
        box.insert(rng.randrange(len(box) + 1), rng.choice((old, rng.choice(values))))
    elif what == 3:
        other, place = rng.choice(places)
        mine, theirs = old, other[place]
        box[key], other[place] = theirs, mine
        if _loops(tree):
            box[key], other[place] = mine, theirs
    elif what == 4 and isinstance(old, int | float) and not isinstance(old, bool):
        box[key] = rng.choice(
            (
                old + 1,
                old - 1,
                -old,
                old * 2,
                old * 1000,
                f"{old:.9}" if isinstance(old, float) else str(old)[:99],
                [old],
            )
        )
    elif what == 5 and isinstance(old, str):
        box[key] = rng.choice(
            (old + "x", old[:-1], old.upper(), f"../{old}", f"{old}\n{old}", [old], old * 40, f"/{old}", f" {old}")
        )
    elif what == 6 and isinstance(old, list) and old:
        box[key] = old * rng.choice((2, 5, 40))
    else:
        box[key] = rng.choice(values)
    return tree


def _loops(tree: Any) -> bool:
    try:
        json.dumps(tree)
    except (ValueError, RecursionError):
        return True
    return False


def change_json(content: bytes, rng: random.Random) -> bytes:
    """A JSON text with another value, another key, one that stands twice, or what JSON hardly allows."""
    if rng.random() < 0.1:
        return change_text(content, rng)
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return change_text(content, rng)
    tree = change_tree(tree, rng)
    if _loops(tree):
        return change_text(content, rng)
    text = json.dumps(tree)
    if rng.random() < 0.12:
        raw = rng.choice(RAW)
        spots = [m.span() for m in re.finditer(r'(?<=[:\[,] )(-?[\d.]+|"[^"]*"|true|null)', text)]
        if spots:
            low, high = rng.choice(spots)
            text = text[:low] + raw + text[high:]
    if rng.random() < 0.04:
        keys = [m for m in re.finditer(r'"[^"]*": (-?[\d.]+|"[^"]*")', text)]
        if keys:
            one = rng.choice(keys)
            text = text[: one.start()] + one[0] + ", " + text[one.start() :]
    return text.encode("utf-8", "surrogatepass")


def change_toml(content: bytes, rng: random.Random) -> bytes:
    """A TOML text, changed as the values that it holds, or as text."""
    import tomli_w

    if rng.random() < 0.25:
        return change_text(content, rng)
    try:
        tree = change_tree(tomllib.loads(content.decode()), rng)
        return tomli_w.dumps(tree).encode("utf-8", "surrogatepass")
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        return change_text(content, rng)


WORDS = (
    b"\n",
    b"\r",
    b"\r\n",
    b"\0",
    b'"',
    b'""',
    b",",
    b";",
    b"\t",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"[" * 2000,
    b"{" * 2000,
    b"a=" * 500,
    b"nan",
    b"inf",
    b"1e999",
    b"9" * 5000,
    b"[[x]]\n",
    b"[a.b.c]\n",
    b"x = 1\n",
    b"\\u0000",
    b"\\ud800",
    b"'''",
    b'"""',
    b"#",
    b"= ",
    b"../",
    b"{}",
    b"[]",
    b"null",
    b"[{",
    b"}]",
    b"prompt",
    b"text",
    b"messages",
    b'{"role": "user", "content": ""}',
    b"0x" + b"f" * 3000,
    b"1979-05-27T07:32:00Z",
    b"a." * 1500,
    b"\x1b]0;x\x07",
)


def change_text(content: bytes, rng: random.Random) -> bytes:
    """Lines and words that are left out, twice there, or put where they do not belong."""
    what = rng.randrange(6)
    if what == 0:
        return change_bytes(content, rng)
    at = rng.randrange(len(content) + 1)
    if what <= 3:
        return content[:at] + rng.choice(WORDS) + content[at + (rng.randrange(8) if what == 3 else 0) :]
    lines = content.split(b"\n")
    one = rng.randrange(len(lines))
    lines[one : one + 1] = rng.choice(([], [lines[one]] * rng.choice((2, 30)), [rng.choice(lines), lines[one]]))
    return b"\n".join(lines)
