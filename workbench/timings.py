"""Which figures of a run are timings, which differ from one run to the next: the one list of them."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

TIMINGS = (
    "seconds",
    "*_seconds",
    "ratio_seconds*",  # of native training and the paste
    "paste_parts.*",  # what a paste's seconds are made of
    "result.fit",  # the same in the record of the step
    "result.fold",
)
"""Names of figures, or the last two names of their paths: seconds, and what is made of them. Whoever adds a timing to a
metrics.json gives it such a name, or adds it here."""


def is_timing(path: Sequence[str]) -> bool:
    """Whether the figure at a path of keys is a timing.

    >>> is_timing(["behaviours", "style", "cost", "native_seconds"]), is_timing(["behaviours", "style", "n"])
    (True, False)
    """
    last, two = path[-1] if path else "", ".".join(path[-2:])
    return any(fnmatchcase(two if "." in pattern else last, pattern) for pattern in TIMINGS)
