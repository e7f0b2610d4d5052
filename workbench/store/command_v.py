"""Profiles that Command-V's released code writes: safetensors with the last token of each prompt after each block."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..sites import Site
from .imports import LAYER, UNKNOWN, Source, check_no_pickle, source_hash
from .shards import HEADER_DTYPES

log = logging.getLogger("workbench")


@dataclass(frozen=True)
class CommandV(Source):
    """A profile file: keys `model.layers.i`, each [prompts, d]."""

    def read(self, start: int, stop: int) -> dict[Site, Tensor]:
        """Rows of the file itself: a slice of a safetensors tensor reads no more than that slice."""
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            return {site: file.get_slice(f"model.layers.{site.layer}")[start:stop] for site in self.widths}


def open_command_v(path: Path) -> CommandV:
    """Checks a profile and reads what it says of itself; no activation is read.

    The released code stores `resid_post.i` of the last token (`Layer.out`, `last`), the final norm not applied. Its
    profiles of instruct models went through the chat template twice (as of its 2025 release), which is told in a warning:
    they are not what the model sees in use. Raises UserError naming what is not as it should be.
    """
    check_no_pickle(path)
    metadata, shapes = _header(path)
    layers = {name: LAYER.fullmatch(name) for name in shapes}
    strange = [name for name, match in layers.items() if match is None or name != f"model.layers.{int(match[1])}"]
    if strange or not layers:
        raise UserError(f"{path}: holds {', '.join(strange[:3]) or 'no tensors'}; a Command-V profile holds tensors "
                        "model.layers.0, model.layers.1, ...")  # fmt: skip
    (n, width), dtype = _one_shape(path, shapes)
    for key, wanted in (("activation_point", "Layer.out"), ("aggregation", "last")):
        if metadata.get(key, wanted) != wanted:
            raise UserError(f"{path}: its {key} is {metadata[key]!r}; only profiles of {wanted!r} can be imported: the "
                            "others are at no site and token that a store has")  # fmt: skip
    sites = sorted(Site(int(match[1])) for match in layers.values() if match is not None)
    n_layers = _count(path, metadata, "num_layers")
    for key, found in (("num_prompts", n), ("hidden_size", width)):
        said = _count(path, metadata, key)
        if said is not None and said != found:
            raise UserError(f"{path}: says {key} {said}, and its tensors have {found}; the file is damaged or was "
                            "changed")  # fmt: skip
    if n_layers is not None and sites[-1].layer >= n_layers:
        raise UserError(f"{path}: says num_layers {n_layers}, and holds layer {sites[-1].layer}; the file is damaged or "
                        "was changed")  # fmt: skip
    name = metadata.get("model_name", UNKNOWN)
    if "instruct" in name.lower() or "it" in name.lower():  # the test that its own code makes
        log.warning("%s: Command-V puts the prompts of %s through the chat template twice; converters fitted to this "
                    "profile see other states than the model in use", path.name, name)  # fmt: skip
    return CommandV(
        "command-v", path, dict.fromkeys(sites, width), n, dtype, source_hash([path]), model=name, n_layers=n_layers,
        # its hooks sit in the plain Hugging Face model
        basis="raw", tokens=metadata.get("aggregation", UNKNOWN), notes={"metadata": metadata},
    )  # fmt: skip


def _header(path: Path) -> tuple[dict[str, str], dict[str, tuple[list[int], str]]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return dict(file.metadata() or {}), {k: (s.get_shape(), s.get_dtype()) for k, s in slices.items()}
    except (SafetensorError, OSError, ValueError) as err:
        reason = (str(err).splitlines() or [type(err).__name__])[0][:120]
        raise UserError(f"{path}: is not a safetensors file ({reason}); give the file that Command-V wrote") from err


def _one_shape(path: Path, shapes: dict[str, tuple[list[int], str]]) -> tuple[list[int], str]:
    """The shape [prompts, d] and the dtype that all tensors have."""
    first = next(iter(shapes))
    shape, code = shapes[first]
    names = {code: name for name, code in HEADER_DTYPES.items()}
    if code not in names:
        raise UserError(f"{path}: {first} is of dtype {code}; allowed: {', '.join(names.values())}")
    if len(shape) != 2 or 0 in shape:
        raise UserError(f"{path}: {first} has shape {shape}; a Command-V profile has [prompts, width]")
    for name, other in shapes.items():
        if other != (shape, code):
            raise UserError(f"{path}: {name} is {other[1]} {other[0]} and {first} {code} {shape}; all layers of a profile "
                            "have one shape")  # fmt: skip
    return shape, names[code]


def _count(path: Path, metadata: dict[str, Any], key: str) -> int | None:
    text = metadata.get(key)
    if text is None:
        return None
    if not text.isdecimal() or len(text) > 12:
        raise UserError(f"{path}: its {key} is {text[:40]!r}, which is no number; the file is damaged or was changed")
    return int(text)
