"""Scripts of a text: which letters it is written in, by the names that Unicode gives them. Not its language."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

_HAN = ("CJK",)
SCRIPTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "latin": ("LATIN",),
        "cyrillic": ("CYRILLIC",),
        "greek": ("GREEK",),
        "arabic": ("ARABIC",),
        "hebrew": ("HEBREW",),
        "devanagari": ("DEVANAGARI",),
        "bengali": ("BENGALI",),
        "tamil": ("TAMIL",),
        "thai": ("THAI",),
        "georgian": ("GEORGIAN",),
        "armenian": ("ARMENIAN",),
        "han": _HAN,
        "japanese": ("HIRAGANA", "KATAKANA", *_HAN),
        "korean": ("HANGUL", *_HAN),
    }
)
"""a script, and how the Unicode names of its letters begin"""


def script_share(text: str, script: str) -> float | None:
    """The share of the letters of a text that are of a script of `SCRIPTS`; None for a text without letters.

    >>> script_share("abc \u4e2d 12", "latin")
    0.75
    """
    kinds = _kinds(text)
    return sum(kinds[kind] for kind in SCRIPTS[script]) / kinds.total() if kinds else None


def main_script(text: str) -> str | None:
    """The script that most letters of a text are of; of equals, the one that is more special (japanese before han is
    right only where kana are there). None for a text without letters, or of a script that is not in `SCRIPTS`.

    >>> main_script("What is \u03c0?"), main_script("7 + 8")
    ('latin', None)
    """
    kinds = _kinds(text)
    own = {name: sum(kinds[kind] for kind in of if kind not in _HAN or name == "han") for name, of in SCRIPTS.items()}
    for name in ("japanese", "korean"):  # a few kana or hangul say whose the Han characters are
        own[name] += kinds["CJK"] if own[name] else 0
    best = max(own, key=lambda name: (own[name], name != "han"))
    return best if own[best] else None


def _kinds(text: str) -> Counter[str]:
    """How many letters of a text have which first word in their Unicode name."""
    return Counter(kind for kind in map(_kind, text) if kind)


@lru_cache(maxsize=4096)
def _kind(char: str) -> str:
    if not char.isalpha():
        return ""
    name = unicodedata.name(char, "UNKNOWN")
    return name.removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ").partition(" ")[0]
