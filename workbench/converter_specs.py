"""ConverterSpec: which converter is meant, as one string: `ridge:0.1`, `ridge:cv`, `pinv`, `rrr:16`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from .errors import UserError


class _Kind(NamedTuple):
    value: str
    """what stands behind the colon; empty: nothing does"""
    default: float
    whole: bool = False


KINDS: dict[str, _Kind] = {
    "ridge": _Kind("alpha, in units of the mean diagonal of X'X, or cv", 0.1),
    "pinv": _Kind("", 0.0),
    "procrustes": _Kind("", 0.0),
    "rrr": _Kind("rank", 16, whole=True),
    "pls": _Kind("components", 32, whole=True),
    "whitened": _Kind("", 0.0),
    "cycle": _Kind("weight of the cycle", 1.0),
    "autoencoder": _Kind("hidden units", 128, whole=True),
}
METHODS = tuple(KINDS)


@dataclass(frozen=True)
class ConverterSpec:
    """A kind of converter and its number (alpha, rank, components, weight, hidden units; 0 where it has none).

    pinv         as published: uncentred, no bias (arXiv:2506.19140)
    ridge        centred, with bias; `cv` chooses alpha for each pair of sites and each direction, by prompt
    procrustes   the (semi-)orthogonal map, with bias
    rrr          reduced rank: the best map of at most so many directions, under ridge 0.1
    pls          partial least squares with at most so many components
    whitened     whitening, rotation, de-whitening
    cycle        ridge 0.1 both ways, asked to undo one another with this weight
    autoencoder  a small ReLU network: a reference for quality figures, which does not fold

    >>> str(ConverterSpec.parse("rrr")), ConverterSpec.parse("ridge", 0.3), str(ConverterSpec.parse("ridge:cv"))
    ('rrr:16', ConverterSpec(kind='ridge', value=0.3), 'ridge:cv')
    """

    kind: str
    value: float | Literal["cv"] = 0.0

    def __str__(self) -> str:
        if not KINDS[self.kind].value:
            return self.kind
        return f"{self.kind}:{self.value if self.value == 'cv' else format(self.value, 'g')}"

    @property
    def number(self) -> float:
        """The value where it is a number; 0 for `cv`."""
        return 0.0 if self.value == "cv" else float(self.value)

    @classmethod
    def parse(cls, text: str, alpha: float | Literal["cv"] | None = None) -> ConverterSpec:
        """Reads a spec; `alpha` is the strength of a ridge that names none.

        Raises UserError for an unknown kind, or a value that it cannot have.
        """
        kind, colon, value = text.partition(":")
        if kind not in KINDS:
            raise UserError(f"unknown converter {text!r}; allowed: {', '.join(METHODS)}, some with a value: ridge:0.1, "
                            "ridge:cv, rrr:16, pls:32, cycle:1")  # fmt: skip
        known = KINDS[kind]
        if colon and not known.value:
            raise UserError(f"converter {text!r}: {kind} takes no value; write {kind}")
        given: Any = value if colon else alpha if kind == "ridge" and alpha is not None else known.default
        if kind == "ridge" and given == "cv":
            return cls(kind, "cv")
        number = _number(text, kind, known, given)
        return cls(kind, number)

    @property
    def pair(self) -> tuple[str, float]:
        """(method, alpha) as a candidate paste keeps it: a ridge has its alpha apart."""
        return (self.kind, self.number) if self.kind == "ridge" and self.value != "cv" else (str(self), 0.0)


def _number(text: str, kind: str, known: _Kind, given: Any) -> float:
    try:
        number = float(given)
    except (TypeError, ValueError):
        number = math.nan
    if kind == "ridge" and not 0 <= number < math.inf:
        raise UserError(f"alpha {given} is not a number of 0 or more, in units of the mean diagonal of X'X, nor cv")
    low = 1 if known.whole else 0
    if not low <= number < math.inf or (known.whole and number != int(number)):
        what = "a whole number of 1 or more" if known.whole else "a number of 0 or more"
        raise UserError(f"converter {text!r}: the {known.value} must be {what}; write such as {kind}:{known.default:g}")
    return number


def method_pairs(texts: Sequence[str]) -> list[tuple[str, float]]:
    """Specs as (method, alpha) of candidate pastes.

    >>> method_pairs(["ridge:0.3", "pinv", "rrr:8"])
    [('ridge', 0.3), ('pinv', 0.0), ('rrr:8', 0.0)]
    """
    return [ConverterSpec.parse(text).pair for text in texts]
