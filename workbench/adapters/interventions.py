"""The interventions of pyreft (0.1, `interventions.py`; arXiv:2404.03592) as low-rank parts, formula by formula.

R is `rotate_layer` [d, r], W1 and b `learned_source`, W2 `proj_layer`; torch `Linear` weights are [r, d].
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from .low_rank import LowRank


def low_rank_of(state: dict[str, Tensor], kind: str, act: str, key: str) -> LowRank:
    """One intervention as delta(h) = act(h @ V + b) @ U.

    state: its tensors as pyreft saves them; kind: the name of its class; act: linear but for nodireft and direft, whose
    other activations one part can say; key: its name, for errors. Raises UserError for another kind, tensors that are
    missing or do not fit together, or an act that the kind does not allow.
    """
    name = kind.strip("<>'").rsplit(".", 1)[-1].removesuffix("Intervention").lower()
    forms = {
        "nodireft": _nodireft,
        "noreft": _noreft,
        "loreft": _loreft,
        "direft": _direft,
        "consreft": _consreft,
        "lobireft": _lobireft,
    }
    if name not in forms:
        raise UserError(f"{key} is a {kind}; adapters that are read: {', '.join(forms)}")
    if act != "linear" and name not in ("nodireft", "direft"):
        raise UserError(
            f"{name} with act {act} is not one low-rank part; only nodireft and direft are read with an act"
        )
    try:
        part = forms[name](state)
    except KeyError as err:
        raise UserError(f"{key} says {name} but holds {sorted(map(str, state))}: {err} is missing") from err
    except (RuntimeError, IndexError, ValueError) as err:  # shapes that do not fit together
        reason = " ".join(str(err).split())[:200]
        raise UserError(
            f"{key} is damaged: its tensors do not fit together ({reason}); fetch the folder again"
        ) from err
    return replace(part, act=act)


def _nodireft(s: dict[str, Tensor]) -> LowRank:
    # (h W1^T + b) W2
    return LowRank(s["learned_source.weight"].T.contiguous(), s["learned_source.bias"], s["proj_layer.weight"])


def _noreft(s: dict[str, Tensor]) -> LowRank:
    # (h W1^T + b1 - h W2^T - b2) W2
    w1, w2, b = s["learned_source.weight"].float(), s["proj_layer.weight"].float(), s["learned_source.bias"].float()
    return LowRank((w1 - w2).T.contiguous(), b - s["proj_layer.bias"].float() if "proj_layer.bias" in s else b, w2)


def _loreft(s: dict[str, Tensor]) -> LowRank:
    # (h W^T + b - h R) R^T
    weight, bias = _source(s)
    rotation = _rotation(s)
    return LowRank(weight.T - rotation, bias, rotation.T.contiguous())


def _direft(s: dict[str, Tensor]) -> LowRank:
    # (h W^T + b) R^T
    weight, bias = _source(s)
    return LowRank(weight.T.contiguous(), bias, _rotation(s).T.contiguous())


def _consreft(s: dict[str, Tensor]) -> LowRank:
    # (b - h R) R^T
    rotation = _rotation(s)
    return LowRank(-rotation, s["learned_source"].float(), rotation.T.contiguous())


def _lobireft(s: dict[str, Tensor]) -> LowRank:
    # b R^T
    rotation = _rotation(s)
    return LowRank(torch.zeros_like(rotation), s["learned_source"].float(), rotation.T.contiguous())


def _source(s: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    prefix = "" if "weight" in s else "learned_source."  # LoReFT saves its learned source without a prefix
    return s[f"{prefix}weight"].float(), s[f"{prefix}bias"].float()


def _rotation(s: dict[str, Tensor]) -> Float[Tensor, "d r"]:
    """R, plain or as torch's orthogonal parametrization stores it: base @ Householder product of its lower triangle."""
    if "rotate_layer" in s:
        return s["rotate_layer"].float()
    original = s["rotate_layer.parametrizations.weight.original"].float()
    below = original.tril(diagonal=-1)
    q = torch.linalg.householder_product(below, 2 / (1 + (below * below).sum(-2)))
    q = q * original.diagonal().int().unsqueeze(-2)
    base = s.get("rotate_layer.parametrizations.weight.0.base")
    return q if base is None else base.float() @ q
