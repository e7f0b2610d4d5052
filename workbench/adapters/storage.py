"""How the tensors of an adapter lie on disk: as they are, or as 8-bit integers with a scale for each rank."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from .low_rank import LowRank

STORAGES = ("int8",)
LARGEST = 127  # -128 is left out, so that a number and its negative are kept alike


def pack(part: LowRank) -> tuple[dict[str, Tensor], dict[str, float]]:
    """An adapter part as tensors to store, and the relative error of V and of U, ||x - stored|| / ||x||.

    V [d, r] and U [r, d] become int8; what a rank reads and what it writes has a scale each, its largest entry / 127, so
    that ranks of unlike size lose alike. b stays float32. Raises UserError for entries that are not finite.

    >>> tensors, error = pack(LowRank(torch.eye(4)[:, :2], torch.zeros(2), torch.ones(2, 4)))
    >>> {key: str(t.dtype).removeprefix("torch.") for key, t in tensors.items()}, max(error.values()) < 1e-6
    ({'b': 'float32', 'V': 'int8', 'V.scale': 'float32', 'U': 'int8', 'U.scale': 'float32'}, True)
    """
    tensors: dict[str, Tensor] = {"b": part.b.detach().float().cpu().clone()}
    error: dict[str, float] = {}
    for key, rows in (("V", part.V.T), ("U", part.U)):
        x = rows.detach().double().cpu()  # [r, d]
        if not bool(x.isfinite().all()):
            raise UserError(f"{key} of an adapter part holds NaN or infinity, which int8 cannot keep; train it again")
        scale = (x.abs().amax(1) / LARGEST).float()
        steps = (x / scale.double().where(scale > 0, 1.0)[:, None]).round().clamp(-LARGEST, LARGEST).to(torch.int8)
        kept = steps.double() * scale.double()[:, None]
        error[key] = float((x - kept).norm() / x.norm()) if bool(x.any()) else 0.0
        tensors[key] = (steps.T if key == "V" else steps).contiguous()
        tensors[f"{key}.scale"] = scale
    return tensors, error


def unpack(tensors: Mapping[str, Tensor], file: Path, site: str) -> dict[str, Tensor]:
    """V, b and U as `pack` was given them, float32; UserError, naming the file, where they are damaged."""
    found = {"b": tensors["b"]}
    for key in ("V", "U"):
        steps, scale = tensors[key], tensors.get(f"{key}.scale")
        rank = steps.shape[-1 if key == "V" else 0] if steps.ndim == 2 else -1
        if scale is None or steps.dtype != torch.int8 or scale.dtype != torch.float32 or scale.shape != (rank,):
            raise UserError(f"{file} is damaged: {key} of {site} is not int8 with a float32 scale for each rank; write the "
                            "adapter again")  # fmt: skip
        found[key] = steps.float() * (scale if key == "V" else scale[:, None])
    return found
