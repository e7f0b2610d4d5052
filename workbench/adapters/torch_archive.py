"""Files that `torch.save` wrote, which some formats are made of by their own definition: read as tensors or refused."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..maps.linear_map import check_shape
from ..small_files import plain_file


def read_archive(file: Path, *, named: bool = False) -> Any:
    """The tensors, numbers, strings, lists and dictionaries in a torch archive; nothing in it is run.

    Besides `weights_only`, which admits nothing that could run, no tensor may claim more numbers than the file holds: a
    view that repeats one number a thousand million times is small on disk and not in memory. named: as in
    `read_safetensors`.

    Raises:
        UserError: a file that is damaged, of torch before 1.6, or that holds anything else.
    """
    refused = UserError(f"{file} was refused: it is damaged, or holds more than tensors")
    try:
        path = plain_file(file, named=named)
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as err:
        raise refused from err
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise refused  # torch does not compress
    held = sum(entry.file_size for entry in entries)
    if held > path.stat().st_size:
        raise refused
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's own, of a file that says another protocol or storage
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # torch's reader of a damaged file fails as struct, assert, zip or C++ do
        raise refused from err
    for tensor in _tensors(found):
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not plain or tensor.numel() * tensor.element_size() > held:
            raise UserError(f"{file} was refused: a tensor of shape {list(tensor.shape)} is not stored in full")
        try:
            check_shape(tensor)
        except ValueError as err:
            raise UserError(f"{file} was refused: it holds {err}") from err
    return found


def read_tensors(file: Path) -> dict[str, Tensor]:
    """`read_archive` for a state dict, names -> tensors; UserError for anything else."""
    state = read_archive(file)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file} was refused: it is not a dictionary of tensors")
    return {str(key): value.detach() for key, value in state.items()}


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in containers, however deep; a container may hold itself."""
    left, seen = [value], set[int]()
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, dict):
            left += [*one.keys(), *one.values()]
        elif isinstance(one, (list, tuple, set)):
            left += one
