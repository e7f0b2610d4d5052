"""Control vectors in GGUF, as repeng writes them and llama.cpp reads them.

`direction.N` is a vector [d] that is added to the output of block N, counted from 0, at every position (repeng 0.4,
`ControlModule.forward`). repeng itself trains none for block 0, and llama.cpp refuses one. The files are read and written
with the package `gguf`, which is not installed with the workbench.
"""

from __future__ import annotations

import logging
import struct
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..atomic import write_bytes
from ..errors import UserError
from ..sites import Site
from ..small_files import plain_file, reason
from .adapter import Adapter
from .adapter_files import check_finite
from .constants import constants_of
from .low_rank import LowRank

ARCHITECTURE = "controlvector"
MAGIC = b"GGUF"
MOST = 10_000
"""tensors or keys: more than any model has layers"""
_SIZES = (1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8)
_STRING, _ARRAY = 8, 9
"""bytes of a value by its kind, and the two kinds that say their own length"""
_FLOATS = ("F32", "F16", "F64")
log = logging.getLogger("workbench")


def _package() -> Any:
    try:
        import gguf
    except ImportError as err:
        raise UserError("GGUF files need the package gguf: pip install gguf") from err
    return gguf


def read(file: str | Path) -> Adapter:
    """Reads a control vector: an adapter that adds a constant to the output of each block N with a `direction.N`.

    Raises:
        UserError: a file that is damaged, is no control vector, holds quantised tensors; or `gguf` is not installed.
    """
    file = Path(file)
    gguf = _package()
    _check_head(file)
    damaged = UserError(f"{file} is damaged: it cannot be read as GGUF; fetch it again")
    try:
        reader = gguf.GGUFReader(file)
        said = {key: reader.get_field(key) for key in ("general.architecture", f"{ARCHITECTURE}.model_hint")}
        architecture, hint = (field.contents() if field else "" for field in said.values())
        found = {t.name: (t.tensor_type.name, t.data) for t in reader.tensors}
    except (ValueError, LookupError, OSError, TypeError, OverflowError, AttributeError) as err:
        raise damaged from err
    if architecture != ARCHITECTURE:
        raise UserError(f"{file} is no control vector: its architecture is {str(architecture)[:40]!r}")
    parts = {}
    for name, (kind, data) in found.items():
        if not name.startswith("direction."):
            continue
        number = name.removeprefix("direction.")
        if not number.isascii() or not number.isdigit() or len(number) > 4:
            raise UserError(f"{file} is damaged: {name[:60]!r} does not say a layer; fetch it again")
        if kind not in _FLOATS:
            raise UserError(f"{file}: {name} is stored as {kind}; only {', '.join(_FLOATS)} are read")
        v = torch.from_numpy(data.copy()).squeeze()
        if v.ndim != 1:
            raise UserError(f"{file} is damaged: {name} has shape {list(v.shape)}, not [d]; fetch it again")
        check_finite(v, file, name)
        parts[Site(int(number))] = _constant(v)
    if not parts:
        raise UserError(f"{file} holds no direction.N; it is no control vector")
    if len({part.width for part in parts.values()}) > 1:
        raise UserError(f"{file} is damaged: its directions differ in width; fetch it again")
    return Adapter(parts, "all", name=file.stem, meta={"format": "gguf", "model_hint": str(hint)})


def _constant(v: Tensor) -> LowRank:
    return LowRank(v.new_zeros(len(v), 1), v.new_ones(1), v[None])


def _check_head(file: Path) -> None:
    """The counts at the beginning, before anything is allocated for them."""
    try:
        with plain_file(file, named=True).open("rb") as stream:
            head = stream.read(24)
    except (OSError, ValueError) as err:
        raise UserError(f"{file} cannot be read: {reason(err)}; check the file") from err
    if len(head) < 24 or head[:4] != MAGIC:
        raise UserError(f"{file} is damaged, or no GGUF file; fetch it again")
    version, tensors, keys = struct.unpack("<IQQ", head[4:])
    if version not in (2, 3) or tensors > MOST or keys > MOST:
        raise UserError(f"{file} is no control vector: version {version}, {tensors} tensors and {keys} keys")
    if not _fits(file, tensors, keys):
        raise UserError(f"{file} is damaged: its header claims more than the file holds; fetch it again")


def _fits(file: Path, tensors: int, keys: int) -> bool:
    """Whether every length in the header lies within the file: the package would go through what is claimed, one by one."""
    left = file.stat().st_size - 24

    def number(size: int) -> int:
        return int.from_bytes(take(size), "little")

    def take(size: int) -> bytes:
        nonlocal left
        left -= size
        if left < 0:
            raise EOFError
        return stream.read(size)

    def value(kind: int) -> None:
        if kind == _STRING:
            take(number(8))
        elif kind == _ARRAY:
            inner, count = number(4), number(8)
            if count > left or inner == _ARRAY:
                raise EOFError
            for _ in range(count):
                value(inner)
        else:
            take(_SIZES[kind])

    with file.open("rb") as stream:
        stream.seek(24)
        try:
            for _ in range(keys):
                take(number(8))
                value(number(4))
            for _ in range(tensors):
                take(number(8))
                dims = number(4)
                take(8 * dims if dims <= 8 else left + 1)
                take(12)  # its type, and where it lies
        except (EOFError, IndexError):
            return False
    return True


def write(adapter: Adapter, file: str | Path, *, any_positions: bool = False, model_hint: str | None = None) -> None:
    """Writes an adapter that is a constant at the outputs of blocks as a control vector, float32, strength included.

    Args:
        any_positions: write it although the adapter does not act at all positions, as a control vector does.
        model_hint: what the file says of the model, such as `llama`; from what was read, or its name, unless given.

    Raises:
        UserError: an adapter that is no constant, acts elsewhere or at other positions; or `gguf` is not installed.
    """
    vectors = constants_of(adapter)
    elsewhere = [str(site) for site in vectors if site.point != "resid_post"]
    if elsewhere:
        raise UserError(f"a control vector acts at resid_post; this adapter acts at {', '.join(elsewhere)}")
    if adapter.positions != "all" and not any_positions:
        raise UserError(
            f"a control vector acts at all positions; this adapter acts at {adapter.positions!r}: pass any_positions=True "
            "(--any-positions) to write it all the same"
        )
    if Site(0) in vectors:
        log.warning("direction.0 is written for repeng; llama.cpp refuses it: leave layer 0 out for that")
    gguf = _package()
    hint = model_hint or adapter.meta.get("model_hint") or adapter.base.get("name") or "unknown"
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "vector.gguf"
        writer = gguf.GGUFWriter(made, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", str(hint))
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(vectors))
        for site, v in vectors.items():
            writer.add_tensor(f"direction.{site.layer}", v.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        write_bytes(file, made.read_bytes())
