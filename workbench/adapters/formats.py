"""Which format an adapter is in, by what its folder or file holds, and the writers of the formats that others read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..bundled import located
from ..errors import UserError
from ..sites import Site
from .adapter import Adapter
from .adapter_files import ADAPTER, read_json

EXPORTS = ("pyreft", "gguf", "safetensors")
_SUFFIXES = (".gguf", ".safetensors", ".pt", ".pth", ".bin")


def load_adapter(path: str | Path, *, site: str | int | Site | None = None, positions: str | None = None) -> Adapter:
    """`Adapter.load`: reads an adapter of any format that is known."""
    path = located(path, "adapters")
    if not path.exists():
        raise UserError(f"{path} does not exist; give an adapter folder or file, or bundled:NAME")
    where = None if site is None else Site.parse(site)
    found = _read_folder(path, where) if path.is_dir() else _read_file(path, where)
    if positions is None:
        return found
    if found.terms:
        raise UserError(f"{path} acts differently at {found.positions}; it is not read with other positions")
    return replace(found, positions=positions)


def _read_folder(folder: Path, site: Site | None) -> Adapter:
    if (folder / ADAPTER).is_file():
        from .adapter_files import read_adapter as read
    elif (folder / "adapter_config.json").is_file():
        config = read_json(folder / "adapter_config.json", "fetch the folder again")
        if isinstance(config, dict) and "peft_type" in config:
            kind = str(config["peft_type"])[:40]
            raise UserError(f"{folder} is a PEFT {kind}: it changes weights and adds nothing to the residual stream by "
                            "itself, so that it is not read as an adapter; make one of a LoRA with `workbench adapters "
                            "from-weights`")  # fmt: skip
        from .bottleneck import read
    elif (folder / "config.json").is_file():
        from .pyreft import read
    else:
        raise UserError(f"{folder} holds no adapter: neither adapter.json, nor adapter_config.json, nor a pyreft "
                        "config.json is there; vectors are given by their file")  # fmt: skip
    if site is not None:
        raise UserError(f"{folder} says itself where it acts; leave site out")
    return read(folder)


def _read_file(file: Path, site: Site | None) -> Adapter:
    if (file.parent / "adapter.json").is_file() or file.name.startswith(("intkey_", "pytorch_adapter", "adapter.")):
        raise UserError(f"{file} is part of an adapter folder; give the folder, not a file in it")
    if file.suffix not in _SUFFIXES:
        raise UserError(f"{file} is not an adapter: give a folder, or a file that ends in {', '.join(_SUFFIXES)}")
    if file.suffix == ".gguf":
        from .control_vector import read

        if site is not None:
            raise UserError(f"{file} says itself where it acts; leave site out")
        return read(file)
    from . import adapter_bias, vectors

    found, meta = vectors.contents(file)
    if adapter_bias.fits(found):
        return adapter_bias.assemble(found, file, site)
    return vectors.assemble(found, meta, file, site)


def export_adapter(
    adapter: Adapter, path: str | Path, *, to: str, any_positions: bool = False, overwrite: bool = False
) -> Path:
    """Writes an adapter in a format that others read.

    Args:
        to: `pyreft`, a folder for `ReftModel.load`; of an adapter that is a constant also `gguf`, a control vector for
            repeng and llama.cpp, or `safetensors`, one vector for each site.
        any_positions: write a control vector, which acts at every position, of an adapter that does not.

    Raises:
        UserError: another format, something that it cannot say, or a path that exists, unless `overwrite`.
    """
    if to not in EXPORTS:
        raise UserError(f"unknown format {to!r}; allowed: {', '.join(EXPORTS)}")
    path = Path(path).expanduser()
    if to == "pyreft":
        from .pyreft import write

        write(adapter, path, overwrite=overwrite)
        return path
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already; choose another file or pass overwrite=True (--overwrite)")
    if path.is_dir():
        raise UserError(f"{path} is a folder; --to {to} writes one file")
    if to == "gguf":
        from . import control_vector

        control_vector.write(adapter, path, any_positions=any_positions)
    else:
        from . import vectors

        vectors.write(adapter, path)
    return path
