"""What a block adds to the residual stream, taken apart: its part along the stream and the rest, and either taken away.

A write f (of the attention or of the MLP) is added to a state x: resid_pre or resid_mid; where a family runs both in parallel,
both are added to resid_pre.

    parallel:    f_par = (<f, x> / <x, x>) x, which makes the state longer or shorter and no other
    orthogonal:  f_perp = f - f_par

Source: the update of "Revisiting Residual Connections: Orthogonal Updates", here as a measurement and an intervention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import UserError
from ..models import Model
from ..rendering import pad
from ..sites import Site
from .scoring import Sequences

WRITES = ("attn", "mlp", "block")
"""what is taken apart: one of the two writes of a block, or both"""
PARTS = ("parallel", "orthogonal", "control")
"""what is taken away; the control is a random direction, as long at each token as the parallel part"""
SIZES = ("size", "cosine", "share")
"""|f| / |x|, the cosine of f and x, and its square, which is the share of f_par in |f|^2"""


def check_writes(model: Model) -> None:
    """Raises UserError for a model whose blocks do not add attention and MLP to a residual stream, or not in an order that can
    be told."""
    for layer, anatomy in enumerate(model.anatomy):
        why = anatomy.missing.get("attn_out") or anatomy.missing.get("mlp_out")
        if why is None and anatomy.parallel is None:
            why = "whether its attention and its MLP are given the same state cannot be told"
        if why is not None:
            raise UserError(f"{model.name} ({model.family}), block {layer}: {why}; the geometry of writes needs blocks that "
                            "add them to a residual stream")  # fmt: skip


def split_write(
    f: Float[Tensor, "*rows d"], x: Float[Tensor, "*rows d"]
) -> tuple[Float[Tensor, "*rows d"], Float[Tensor, "*rows d"]]:
    """(f_par, f_perp) of writes f to states x, in float32 or better; f_par is zero where x is.

    >>> split_write(torch.tensor([3.0, 4.0]), torch.tensor([2.0, 0.0]))
    (tensor([3., 0.]), tensor([0., 4.]))
    """
    work = torch.promote_types(f.dtype, torch.float32)
    f, x = f.to(work), x.to(f.device, work)
    square = (x * x).sum(-1, keepdim=True)
    along = (f * x).sum(-1, keepdim=True) / torch.where(square > 0, square, 1.0) * x
    return along, f - along


@contextmanager
def without_part(
    model: Model, layer: int, write: str, part: str, keep: Bool[Tensor, "b t"], *, seed: int = 0
) -> Iterator[None]:
    """Inside the block, a part of what block `layer` writes is taken away at the positions of `keep`, in every forward pass of
    such a batch.

    Where the attention's write is changed, the MLP (of a sequential block) is given what then is the state, and its own write
    is taken apart along that. Raises UserError for an unknown write or part, and as `check_writes`.
    """
    if write not in WRITES or part not in PARTS:
        raise UserError(f"no part {part!r} of write {write!r}; allowed: {', '.join(PARTS)} of {', '.join(WRITES)}")
    check_writes(model)
    state: dict[str, Tensor] = {}
    g = torch.Generator().manual_seed(seed + layer)
    drawn = torch.nn.functional.normalize(torch.randn(2, model.width, generator=g), dim=1)
    parallel = model.anatomy[layer].parallel

    def enter(h: Tensor, _: Any) -> Tensor:
        state["x"] = h
        return h

    def edit(name: str) -> Any:
        def change(f: Tensor, _: Any) -> Tensor:
            x = state["x"].to(f.device)
            new = f if write not in (name, "block") else _taken(f, x, part, drawn[int(name == "mlp")], keep)
            if not parallel:
                state["x"] = x + new
            return new

        return change

    with model.edit({Site(layer, "resid_pre"): enter, Site(layer, "attn_out"): edit("attn"),
                     Site(layer, "mlp_out"): edit("mlp")}):  # fmt: skip
        yield


def _taken(f: Tensor, x: Tensor, part: str, drawn: Tensor, keep: Tensor) -> Tensor:
    along, rest = split_write(f, x)
    if part == "control":
        left = f.to(along) - along.norm(dim=-1, keepdim=True) * drawn.to(along)
    else:
        left = rest if part == "parallel" else along
    return torch.where(keep.to(f.device)[..., None], left.to(f), f)


def write_sizes(model: Model, sequences: Sequences, *, batch_size: int = 16) -> dict[tuple[int, str, str], Tensor]:
    """Sums over the tokens of each sequence, the first left out (its states are often of another size): {(layer, write,
    figure): [n]}, write attn or mlp, figure of `SIZES`."""
    check_writes(model)
    sites = [Site(l, point) for l in range(model.n_layers) for point in ("resid_pre", "attn_out", "mlp_out")]
    found = {(l, write, key): torch.zeros(len(sequences), dtype=torch.float64)
             for l in range(model.n_layers) for write in WRITES[:2] for key in SIZES}  # fmt: skip
    with torch.inference_mode():
        for rows in sequences.batches(batch_size):
            ids, mask = pad([sequences.ids[i] for i in rows], model.pad_id, "right")
            with model.read(sites) as seen:
                model.run(ids, mask)
            counted = mask.double()
            counted[:, 0] = 0
            for l in range(model.n_layers):
                x = seen[Site(l, "resid_pre")].double()
                for write in WRITES[:2]:
                    f = seen[Site(l, f"{write}_out")].to(x)
                    for key, value in zip(SIZES, _sizes(f, x), strict=True):
                        found[l, write, key][rows] = (value.cpu() * counted).sum(1)
                    if not model.anatomy[l].parallel:
                        x = x + f
    return found


def _sizes(f: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    size = f.norm(dim=-1) / x.norm(dim=-1).clamp_min(1e-30)
    cosine = torch.nn.functional.cosine_similarity(f, x, dim=-1, eps=1e-30)
    return size, cosine, cosine.square()
