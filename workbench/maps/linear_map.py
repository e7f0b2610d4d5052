"""LinearMap: y = x @ W + b, the one kind of map that the workbench fits, composes, folds and saves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from ..atomic import staged_folder, write_bytes
from ..errors import UserError
from ..small_files import plain_file
from .headers import damaged, read_header

FORMAT = "workbench.linear_map"
VERSION = 1
MOST_DIMS = 16
"""of a tensor in a file: more than any has, and fewer than torch computes with"""
MOST_EMPTY = 1 << 20
"""the longest side of a tensor without values"""


@dataclass(frozen=True, eq=False)
class LinearMap:
    """An affine map of row vectors, y = x @ W + b.

    Args:
        weight: W, [d_in, d_out]; float32 as the fitters make it.
        bias: b, [d_out]; zeros for a map without one.
        meta: how it was made (method, alpha, rows); JSON values only. It is saved with the map and does not take
            part in `==`.

    Raises:
        UserError: the shapes of weight and bias do not fit together.

    >>> double = LinearMap(2 * torch.eye(3), torch.zeros(3))
    >>> (double @ double)(torch.ones(3)).tolist()
    [4.0, 4.0, 4.0]
    >>> double.rank, double.truncate(1).rank
    (3, 1)
    """

    weight: Float[Tensor, "d_in d_out"]
    bias: Float[Tensor, " d_bias"]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.weight.ndim != 2 or self.bias.shape != self.weight.shape[1:]:
            raise UserError(
                f"a map needs weight [d_in, d_out] and bias [d_out]; got {list(self.weight.shape)} and "
                f"{list(self.bias.shape)}"
            )

    def __repr__(self) -> str:
        return f"LinearMap({self.d_in} -> {self.d_out})"

    @classmethod
    def identity(cls, d: int, dtype: torch.dtype = torch.float32) -> LinearMap:
        """y = x for vectors of width d."""
        return cls(torch.eye(d, dtype=dtype), torch.zeros(d, dtype=dtype), {"method": "identity"})

    @classmethod
    def zeros(cls, d_in: int, d_out: int, dtype: torch.dtype = torch.float32) -> LinearMap:
        """y = 0."""
        return cls(torch.zeros(d_in, d_out, dtype=dtype), torch.zeros(d_out, dtype=dtype), {"method": "zeros"})

    @property
    def d_in(self) -> int:
        return self.weight.shape[0]

    @property
    def d_out(self) -> int:
        return self.weight.shape[1]

    @cached_property
    def singular_values(self) -> Float[Tensor, " k"]:
        """Singular values of W, largest first, [min(d_in, d_out)]."""
        return torch.linalg.svdvals(self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)))

    @property
    def rank(self) -> int:
        """Numerical rank of W: singular values above max(d_in, d_out) * eps * the largest."""
        s = self.singular_values
        if not len(s) or s[0] == 0:
            return 0
        return int((s > s[0] * max(self.weight.shape) * torch.finfo(s.dtype).eps).sum())

    @property
    def condition(self) -> float:
        """Largest singular value over the smallest that counts towards the rank; inf for the zero map."""
        rank = self.rank
        return float(self.singular_values[0] / self.singular_values[rank - 1]) if rank else float("inf")

    def __call__(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """x @ W + b, in the dtype and on the device of x."""
        if x.shape[-1] != self.d_in:
            raise UserError(f"this map takes vectors of width {self.d_in}; got width {x.shape[-1]}")
        return x @ self.weight.to(x) + self.bias.to(x)

    def __matmul__(self, after: LinearMap) -> LinearMap:
        """The map that applies self first and then `after`: W = W1 W2, b = b1 W2 + b2 (products in float64)."""
        if not isinstance(after, LinearMap):
            return NotImplemented
        if self.d_out != after.d_in:
            raise UserError(f"maps do not compose: the first gives width {self.d_out}, the second takes {after.d_in}")
        second = after.weight.double()
        weight, bias = self.weight.double() @ second, self.bias.double() @ second + after.bias.double()
        return LinearMap(weight.to(self.weight.dtype), bias.to(self.bias.dtype), {"method": "composition"})

    def truncate(self, r: int, x_mean: Float[Tensor, " d_in"] | None = None) -> LinearMap:
        """The rank-r map nearest to W in Frobenius norm (leading r singular triples).

        With `x_mean` the bias is moved so that the image of x_mean stays: b' = b + x_mean @ (W - W_r); without it
        the bias is kept.
        """
        if not 1 <= r <= min(self.weight.shape):
            raise UserError(f"rank must lie in 1..{min(self.weight.shape)}; got {r}")
        u, s, vh = torch.linalg.svd(self.weight.double(), full_matrices=False)
        weight, bias = (u[:, :r] * s[:r]) @ vh[:r], self.bias.double()
        if x_mean is not None:
            bias = bias + x_mean.double() @ (self.weight.double() - weight)
        meta = {**self.meta, "truncated_to": r}
        return LinearMap(weight.to(self.weight.dtype), bias.to(self.bias.dtype), meta)

    def to(self, *args: Any, **kwargs: Any) -> LinearMap:
        """As `Tensor.to`: another device or dtype."""
        return replace(self, weight=self.weight.to(*args, **kwargs), bias=self.bias.to(*args, **kwargs))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LinearMap):
            return NotImplemented
        return (
            self.weight.dtype == other.weight.dtype
            and torch.equal(self.weight, other.weight)
            and torch.equal(self.bias, other.bias)
        )

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Writes one `.safetensors` file with metadata, or (any other name) a folder map.json + map.safetensors."""
        path = Path(path)
        header = {"format": FORMAT, "version": VERSION, "meta": dict(self.meta)}
        tensors = {"weight": self.weight.cpu().contiguous(), "bias": self.bias.cpu().contiguous()}
        if path.suffix == ".safetensors":
            if path.exists() and not overwrite:
                raise UserError(f"{path} exists already; choose another name or pass overwrite=True (--overwrite)")
            write_bytes(path, to_bytes(tensors, {"workbench": json.dumps(header, sort_keys=True)}))
            return
        with staged_folder(path, marker="map.json", overwrite=overwrite) as folder:
            (folder / "map.json").write_text(json.dumps(header, indent=2, sort_keys=True) + "\n")
            (folder / "map.safetensors").write_bytes(to_bytes(tensors))

    @classmethod
    def load(cls, path: str | Path) -> LinearMap:
        """Reads what `save` wrote; raises UserError for anything that is not safetensors and json."""
        path = Path(path)
        folder = path.is_dir()
        file, header_file = (path / "map.safetensors", path / "map.json") if folder else (path, path)
        if folder and not header_file.is_file():
            raise UserError(f"{path} is not a saved map: it has no map.json")
        tensors, metadata = read_safetensors(file, named=not folder)
        text = header_file if folder else metadata.get("workbench", "")
        header = read_header(text, header_file, "a saved map", format=FORMAT, version=VERSION, fields={"meta": dict})
        if set(tensors) != {"weight", "bias"}:
            raise UserError(f"{file} is not a saved map: it holds {sorted(tensors)}, not weight and bias")
        weight, bias = tensors["weight"], tensors["bias"]
        if weight.ndim != 2 or bias.shape != weight.shape[1:]:
            raise damaged(file, f"its weight has shape {list(weight.shape)} and its bias {list(bias.shape)}")
        if not (weight.is_floating_point() and bias.is_floating_point()):
            raise damaged(file, f"its tensors are {weight.dtype} and {bias.dtype}, not of floating dtypes")
        return cls(weight, bias, header["meta"])


def read_safetensors(file: Path, *, named: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; UserError for a missing, damaged or other kind of file.

    named: the user gave this very file, and not the folder that it lies in (see `plain_file`).
    """
    if not file.is_file():
        raise UserError(f"{file} does not exist")
    if file.suffix != ".safetensors":
        raise UserError(f"refused to read {file}: only .safetensors (and .json) are read, never pickled files")
    try:
        with safe_open(plain_file(file, named=named), framework="pt") as handle:
            found = {key: handle.get_tensor(key) for key in handle.keys()}, handle.metadata() or {}  # noqa: SIM118
            for tensor in found[0].values():
                check_shape(tensor)
            return found
    # the last three: of torch, for shapes that it cannot have
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, OverflowError) as err:
        why = (str(err).splitlines() or [type(err).__name__])[0]
        raise UserError(
            f"{file} cannot be read as safetensors ({why:.200}); it is damaged or of another format"
        ) from err


def check_shape(tensor: Tensor) -> None:
    """ValueError for a tensor of many dimensions, or one without values whose sides are long: nothing was stored of it, and
    whoever makes a vector of that length runs out of memory."""
    if tensor.ndim > MOST_DIMS:
        raise ValueError(f"a tensor of more than {MOST_DIMS} dimensions")
    if not tensor.numel() and max(tensor.shape) > MOST_EMPTY:
        raise ValueError(f"a tensor of shape {list(tensor.shape)}, which holds nothing")
