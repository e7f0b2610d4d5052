"""The one progress bar: on stderr, only for what takes over two seconds, quiet where nobody looks."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from typing import Any

with warnings.catch_warnings():
    # in Jupyter without ipywidgets tqdm warns once, whoever imports it first, and then prints its bar as text
    warnings.simplefilter("ignore")
    from tqdm.auto import tqdm


def progress(
    iterable: Iterable[Any] | None = None,
    *,
    total: int | float | None = None,
    desc: str = "",
    unit: str = "it",
    initial: int = 0,
    scale: bool = False,
) -> Any:
    """A tqdm bar that appears after two seconds (`WORKBENCH_PROGRESS=0` turns it off).

    initial: what an earlier run has done; speed and time left are of the rest. scale: 12.3k in place of 12345.
    """
    off = os.environ.get("WORKBENCH_PROGRESS") == "0"
    return tqdm(iterable, total=total, desc=desc, unit=unit, initial=initial, unit_scale=scale, delay=2.0,
                mininterval=0.5, disable=off, leave=False)  # fmt: skip
