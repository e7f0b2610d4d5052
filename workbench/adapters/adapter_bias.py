"""AdapterBias (arXiv:2205.00305): a vector v that is added with a weight that each token has, delta(h) = (h . w + b) v.

In the authors' code the weight is read off the hidden layer of the MLP and the vector is added to what the MLP gives: two
states, which is no delta at one site. Files whose w has the width of v are read, as a rank-one part at mlp_out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..sites import Site
from .adapter import Adapter
from .adapter_files import check_finite
from .low_rank import LowRank

_KEY = re.compile(r"(?:.*\.)?(?:h|layers?|blocks)\.(\d{1,4})\..*?adapter_(vector|alpha\.weight|alpha\.bias)")
_NAMES = ("vector", "alpha.weight", "alpha.bias")


def fits(found: Any) -> bool:
    """Whether what a file holds is AdapterBias: a state dict with its names."""
    return isinstance(found, Mapping) and any(str(key).endswith("adapter_vector") for key in found)


def read(file: str | Path, *, site: str | Site | None = None) -> Adapter:
    """Reads the tensors `...layer.N...adapter_vector` [d], `adapter_alpha.weight` [1, d], `.bias` [1] of a state dict.

    Args:
        file: .safetensors or .pt; tensors of other names (the model's own) are passed over.
        site: the point where it sits, given as a site of any layer; mlp_out unless given.

    Raises:
        UserError: a file that is damaged, a layer that is not whole, or a weight that is read off another state.
    """
    from .vectors import contents

    file = Path(file)
    found, _ = contents(file)
    if not fits(found):
        raise UserError(f"{file} holds no adapter_vector; it is not of AdapterBias")
    return assemble(found, file, None if site is None else Site.parse(site))


def assemble(found: Mapping[Any, Any], file: Path, site: Site | None) -> Adapter:
    """The adapter that the tensors stand for; it acts at all positions."""
    layers: dict[int, dict[str, Tensor]] = {}
    for key, tensor in found.items():
        if (match := _KEY.fullmatch(str(key))) and isinstance(tensor, Tensor):
            layers.setdefault(int(match[1]), {})[match[2]] = tensor
    if not layers:
        raise UserError(f"{file}: the names of its adapter_vector do not say a layer, as layer.5.output.adapter_vector")
    point = site.point if site else "mlp_out"
    parts = {Site(layer, point): _part(state, layer, file) for layer, state in layers.items()}
    return Adapter(parts, "all", name=file.stem, meta={"format": "adapter-bias"})


def _part(state: Mapping[str, Tensor], layer: int, file: Path) -> LowRank:
    missing = [name for name in _NAMES if name not in state]
    if missing:
        raise UserError(f"{file}: layer {layer} lacks adapter_{', adapter_'.join(missing)}")
    v, w, b = (state[name] for name in _NAMES)
    if v.ndim != 1 or w.ndim != 2 or len(w) != 1 or b.shape != (1,):
        shapes = [list(t.shape) for t in (v, w, b)]
        raise UserError(f"{file}: layer {layer} has shapes {shapes}; AdapterBias has v [d], alpha [1, d] and [1]")
    if w.shape[1] != len(v):
        raise UserError(f"{file}: layer {layer} reads its weight off a state of width {w.shape[1]} (the MLP's hidden layer) "
                        f"and adds a vector of width {len(v)}: that is no delta of one state, so it is not read")  # fmt: skip
    for name, tensor in zip(_NAMES, (v, w, b), strict=True):
        check_finite(tensor, file, f"adapter_{name} of layer {layer}")
    return LowRank(w.T.contiguous(), b, v[None].clone())
