"""How values on the command line are read, and results printed."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Mapping
from typing import Any, Literal

import typer

from .errors import UserError

NO_TERMINAL = 1000  # columns of a table that goes to a file or a pipe
MOST_LAYERS = 10_000  # far more than any model has


def layer_list(text: str) -> list[int]:
    """Numbers and ranges, both ends included; raises UserError for anything else.

    >>> layer_list("0,4,8-10,-1")
    [0, 4, 8, 9, 10, -1]
    >>> layer_list("0-99999999999")
    Traceback (most recent call last):
    workbench.errors.UserError: the layers '0-99999999999' are more than 10000; write the ranges of layers that the model has
    """
    found: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)(?:-(\d+))?\s*", item)
        if match is None:
            raise UserError(f"cannot read {item!r} in the layers {text!r}; write numbers and ranges, such as 0,4,8-12")
        if max(map(len, match.groups(""))) > 12:  # beyond any layer, and int() refuses thousands of digits
            raise UserError(f"cannot read {item[:40]!r} as layers: the number is too large; write such as 0,4,8-12")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"the range {item!r} in the layers {text!r} runs backwards; write it as {last}-{first}")
        if len(found) + last - first + 1 > MOST_LAYERS:  # before a list of them is built
            raise UserError(
                f"the layers {text[:80]!r} are more than {MOST_LAYERS}; write the ranges of layers that the model has"
            )
        found += range(first, last + 1)
    return found


def is_url(place: object) -> bool:
    """Whether a place is a URL and no folder.

    >>> is_url("s3://bucket/run"), is_url("runs/s3")
    (True, False)
    """
    return "://" in str(place)


RANKS = (
    ("RANK", "WORLD_SIZE", 0),
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
    ("SLURM_PROCID", "SLURM_NTASKS", 0),
)
"""where torchrun and Slurm say which process of how many this is, and what they count from"""


def part_of(text: str | None, environment: Mapping[str, str] = os.environ) -> tuple[int, int] | None:
    """What `--part 2/8` names: which part, counted from 0, of how many; `env`: as torchrun or Slurm say.

    >>> part_of("2/8"), part_of("env", {"RANK": "1", "WORLD_SIZE": "4"})
    ((2, 8), (1, 4))
    """
    if text is None:
        return None
    if text == "env":
        text = _part_told(environment)
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise UserError(f"cannot read --part {text!r}; write I/N with I from 0 to N - 1, such as 0/8, or env")
    return int(match[1]), int(match[2])


def _part_told(environment: Mapping[str, str]) -> str:
    """What torchrun or Slurm say, as `I/N`; of an array with a step its tasks are counted and not their numbers."""
    for rank, size, first in RANKS:
        if rank in environment and size in environment:
            names = [rank, size, *([first, "SLURM_ARRAY_TASK_STEP"] if isinstance(first, str) else [])]
            told = {name: environment[name] for name in names if name in environment}
            if wrong := next((name for name, value in told.items() if not value.isdecimal()), None):
                raise UserError(f"--part env: {wrong}={told[wrong][:40]!r} is no number; give I/N")
            start = int(told.get(first, 0)) if isinstance(first, str) else first
            step = max(1, int(told.get("SLURM_ARRAY_TASK_STEP", 1)))
            return f"{(int(told[rank]) - start) // step}/{told[size]}"
    raise UserError("--part env: neither torchrun (RANK, WORLD_SIZE) nor Slurm says which process this is; give I/N")


def own_device(device: str, part: str | None, environment: Mapping[str, str] = os.environ) -> str:
    """The device of one process of several on a machine: of GPUs that all of them see each takes its own.

    >>> own_device("cpu", "env", {"LOCAL_RANK": "1"}), own_device("auto", "1/2", {"LOCAL_RANK": "1"})
    ('cpu', 'auto')
    """
    local = next((environment[key] for key in ("LOCAL_RANK", "SLURM_LOCALID") if key in environment), None)
    if part != "env" or device != "auto" or local is None:
        return device
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{int(local) % count}" if count > 1 else device


def site_list(sites: str | None, layers: str | None) -> list[int] | list[str] | None:
    """What `--sites resid_post.4,resid_pre.5` or `--layers 0,4,8-12` name; None where neither was given.

    >>> site_list("resid_post.4, resid_pre.5", None)
    ['resid_post.4', 'resid_pre.5']
    """
    if sites is not None and layers is not None:
        raise UserError("both --sites and --layers were given; give one of them")
    if layers is not None:
        return layer_list(layers)
    return None if sites is None else names_of(sites)


def names_of(text: str) -> list[str]:
    """Names between commas.

    >>> names_of("resid_post.4, resid_pre.5")
    ['resid_post.4', 'resid_pre.5']
    """
    return [name.strip() for name in text.split(",")]


def pair_list(text: str) -> list[tuple[int | str, int | str]] | None:
    """Which products of two sites to keep: None stands for all of them.

    >>> pair_list("all"), pair_list("none"), pair_list("0:6, resid_pre.1:7")
    (None, [], [(0, 6), ('resid_pre.1', 7)])
    """
    if text in ("all", "none"):
        return None if text == "all" else []
    found: list[tuple[int | str, int | str]] = []
    for item in text.split(","):
        ends = [end.strip() for end in item.split(":")]
        if len(ends) != 2 or not all(ends):
            raise UserError(f"cannot read {item!r} in the pairs {text!r}; write all, none, or two sites each: 0:6,1:7")
        first, second = (int(end) if re.fullmatch(r"-?\d{1,9}", end) else end for end in ends)
        found.append((first, second))
    return found


def alpha_value(text: str) -> float | Literal["cv"]:
    """A ridge strength, or the word that leaves it to cross-validation.

    >>> alpha_value("0.1"), alpha_value("cv")
    (0.1, 'cv')
    """
    if text == "cv":
        return "cv"
    try:
        value = float(text)
    except ValueError:
        raise UserError(
            f"alpha {text!r} is neither a number nor cv (workbench transport: or gcv); 0.01 to 0.1 are usual"
        ) from None
    if not 0 <= value < float("inf"):
        raise UserError(f"alpha {value:g} is out of range: a number of 0 or more is needed; 0.01 to 0.1 are usual")
    return value


def printed_json(value: Any) -> None:
    """A result as JSON on stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def printed_table(table: Any) -> None:
    """A rich table on stdout; where that is no terminal no cell is broken, so that a line can be searched."""
    from rich.console import Console

    if sys.stdout.isatty():
        return Console(file=sys.stdout).print(table)
    console = Console(file=io.StringIO(), width=NO_TERMINAL)
    with console.capture() as capture:
        console.print(table)
    typer.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))
