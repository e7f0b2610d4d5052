"""Tasks that the tests give to engines; a worker finds them by their dotted path."""

from __future__ import annotations

import logging
import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from workbench.errors import UserError
from workbench.profile.pieces import write_piece


def logits(model: Any, piece: Any, scale: float = 1.0) -> Any:
    """The last token's logits of some ids, and which process made them."""
    ids = torch.tensor([piece])
    with torch.inference_mode():
        return (scale * model.logits(ids, torch.ones_like(ids))[0, -1]).numpy(), os.getpid()


def fails(model: Any, piece: int) -> int:
    if piece == 2:
        raise UserError(f"piece {piece} is not for this; give another")
    if piece == 5:
        raise ZeroDivisionError("five")
    return piece


def talks(model: Any, piece: int) -> int:
    logging.getLogger("workbench").info("piece %d", piece)
    logging.getLogger("workbench").warning("this model is small")
    warnings.warn("that is old", UserWarning, stacklevel=1)
    return piece


def dies(model: Any, piece: int, folder: str, times: int) -> int:
    """Kills its own process for piece 1, the first so many times."""
    if piece == 1:
        marks = Path(folder)
        number = len(list(marks.iterdir()))
        if number < times:
            (marks / str(number)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return piece * 10


def sleeps(model: Any, piece: float) -> float:
    time.sleep(piece)
    return piece


def threads(model: Any, piece: Any) -> tuple[int, str, str]:
    return torch.get_num_threads(), str(model.dtype), model.fingerprint_id


def write_or_die(model: Any, piece: Any, folder: str, **options: Any) -> Any:
    """`write_piece`, of which two workers die: one with nothing written, one that has written all but said nothing."""
    mark = Path(folder) / str(piece.number)
    first = piece.number in (1, 3) and not mark.exists()
    if first:
        mark.touch()
    if first and piece.number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    entry = write_piece(model, piece, **options)
    if first:
        os.kill(os.getpid(), signal.SIGKILL)
    return entry
