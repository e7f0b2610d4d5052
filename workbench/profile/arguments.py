"""What can be said against a profile before its model is loaded, which may take minutes."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from ..atomic import check_free
from ..errors import UserError
from ..sites import Site
from ..store.checks import DTYPES, MANIFEST, MOMENTS
from ..tokens import Policy, check_tokens


def check_arguments(
    *,
    sites: Sequence[Site | str | int] | None,
    tokens: Policy,
    dtype: str,
    batch_tokens: int,
    dtypes: Collection[str] = tuple(DTYPES),
) -> None:
    """Raises UserError for what no model takes; whether this one has such layers is for `make_plan` to say.

    dtypes: that rows may be kept in, beside `auto`.

    >>> check_arguments(sites=["resid_post.-1"], tokens="last", dtype="float32", batch_tokens=0)
    Traceback (most recent call last):
    workbench.errors.UserError: batch_tokens=0: give at least 1 (8192, say)
    """
    for site in sites or ():
        Site.parse(site)
    check_tokens(tokens)
    if dtype != "auto" and dtype not in dtypes:
        raise UserError(f"unknown dtype {dtype!r} of a profile; allowed: auto, {', '.join(dtypes)}")
    if batch_tokens < 1:
        raise UserError(f"batch_tokens={batch_tokens}: give at least 1 (8192, say)")


def check_target(out: str | Path, *, moments: bool, overwrite: bool) -> None:
    """Raises UserError where the profile's folder exists (unless `overwrite`, and it is one), or cannot be made."""
    out = Path(out).expanduser()
    try:
        check_free(out, marker=MOMENTS if moments else MANIFEST, overwrite=overwrite)
        found = next(p for p in out.absolute().parents if p.exists())
    except OSError as err:
        raise UserError(f"cannot write to {out}: {err.strerror}; choose another output folder") from err
    if not found.is_dir() or not os.access(found, os.W_OK | os.X_OK):
        why = "no permission to write there" if found.is_dir() else f"{found} is not a folder"
        raise UserError(f"cannot write to {out.parent}: {why}; choose another output folder")
