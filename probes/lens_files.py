"""Lenses on disk: config.json as tuned-lens writes it, with what it lacks under one key, and params.safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from workbench.adapters.torch_archive import read_tensors
from workbench.atomic import staged_folder
from workbench.errors import UserError
from workbench.maps.headers import damaged, read_header
from workbench.maps.linear_map import LinearMap, read_safetensors
from workbench.sites import Site
from workbench.small_files import read_json

from .lens import Lens

if TYPE_CHECKING:
    from workbench.models import Model

CONFIG, PARAMS, PICKLED = "config.json", "params.safetensors", "params.pt"
FORMAT, VERSION = "workbench.lens", 1
LENS_TYPES = {"linear_tuned_lens": "tuned", "linear_jacobian_lens": "jacobian"}
FLAT = torch.contiguous_format
OWN = "workbench"
"""the key of config.json under which stands what tuned-lens does not know"""


def write_lens(lens: Lens, folder: Path, model: Model, *, overwrite: bool = False) -> None:
    """Writes a lens beside its place and renames it.

    Translator i is that of hidden_states[i]: 0 the embeddings, i the output of block i - 1; a torch `Linear` of what is
    added to the state, {i}.weight [out, in] and {i}.bias. One that the lens does not have is zeros, which adds nothing.

    Raises UserError for a logit lens, which has nothing to save, for one of another model or of the last block, and where
    `folder` exists, unless `overwrite`.
    """
    if lens.kind == "logit":
        raise UserError("a logit lens has nothing to save: it is the model's own norm and head")
    lens.check(model)
    slots = _sites(model.n_layers)
    if beyond := [str(site) for site in lens.translators if site not in slots]:
        raise UserError(
            f"a lens is saved with translators of {slots[0]} to {slots[-1]}; this one has {', '.join(beyond)}"
        )
    tensors: dict[str, Tensor] = {}
    for i, site in enumerate(slots):
        one = lens.translators.get(site) or LinearMap.zeros(model.width, model.width)
        tensors |= {f"{i}.weight": one.weight.T.clone(memory_format=FLAT).cpu(), f"{i}.bias": one.bias.clone().cpu()}
    lens_type = next(name for name, kind in LENS_TYPES.items() if kind == lens.kind)
    config = {
        "base_model_name_or_path": model.name, "base_model_revision": model.revision or None, "bias": True,
        "d_model": model.width, "lens_type": lens_type, "num_hidden_layers": model.n_layers, "unembed_hash": None,
        OWN: {"format": FORMAT, "version": VERSION, "base": dict(lens.base), "meta": dict(lens.meta),
              "sites": [str(site) for site in lens.translators]},
    }  # fmt: skip
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    with staged_folder(folder, marker=PARAMS, overwrite=overwrite) as made:
        (made / CONFIG).write_text(text, encoding="utf-8")
        (made / PARAMS).write_bytes(to_bytes(tensors))


def read_lens(folder: Path) -> Lens:
    """Reads a folder of `write_lens`, or one of tuned-lens with its params.pt, of which tensors alone are read.

    A folder of tuned-lens names its model and holds no hashes: the name alone is then compared.

    Raises UserError for anything else, and for files that are damaged or do not fit together.
    """
    folder = folder.expanduser()
    config = _config(folder)
    width, layers = config["d_model"], config["num_hidden_layers"]
    own, slots = config.get(OWN), _sites(layers)
    named = config.get("base_model_name_or_path")
    base: dict[str, str] = {"name": str(named)} if named else {}
    meta: dict[str, Any] = {"source": "tuned-lens"}
    kept = slots
    if own is not None:
        fields = {"base": dict, "meta": dict, "sites": list}
        header = read_header(
            json.dumps(own), folder / CONFIG, "a saved lens", format=FORMAT, version=VERSION, fields=fields
        )
        base, meta = {str(key): str(value) for key, value in header["base"].items()}, header["meta"]
        kept = [Site.parse(str(site)) for site in header["sites"]]
        if not set(kept) <= set(slots):
            raise damaged(folder / CONFIG, f"its sites {', '.join(map(str, kept))} are not those of {layers} layers")
    file = folder / PARAMS
    tensors = read_safetensors(file)[0] if file.is_file() else read_tensors(file := folder / PICKLED)
    wanted = {f"{i}.{part}" for i in range(layers) for part in ("weight", *(["bias"] if config["bias"] else []))}
    if set(tensors) != wanted:
        odd = sorted(set(tensors) ^ wanted)
        raise damaged(
            file, f"it does not hold a weight and a bias of each of {layers} layers (see {', '.join(odd[:4])})"
        )
    translators = {}
    for i, site in enumerate(slots):
        if site not in kept:
            continue
        weight, bias = tensors[f"{i}.weight"], tensors.get(f"{i}.bias", torch.zeros(width))
        if list(weight.shape) != [width, width] or list(bias.shape) != [width]:
            raise damaged(file, f"{i}.weight and {i}.bias have shapes {list(weight.shape)} and {list(bias.shape)}, not of "
                                f"width {width}")  # fmt: skip
        if not all(one.is_floating_point() and bool(torch.isfinite(one).all()) for one in (weight, bias)):
            raise damaged(file, f"{i}.weight or {i}.bias holds what is no finite number")
        translators[site] = LinearMap(weight.T.contiguous().float(), bias.float())
    return Lens(LENS_TYPES[config["lens_type"]], translators, base, meta)


def is_lens(names: set[str]) -> bool:
    """Whether files of these names make a folder of a lens."""
    return CONFIG in names and bool({PARAMS, PICKLED} & names)


def _sites(layers: int) -> list[Site]:
    """Those of the translators of tuned-lens: all but the output of the last block, which is the end itself."""
    return [Site(0, "resid_pre"), *(Site(layer) for layer in range(layers - 1))]


def _config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not is_lens({p.name for p in folder.iterdir()} if folder.is_dir() else set()):
        raise UserError(f"{folder} is not a lens: it holds no {CONFIG} with {PARAMS} or {PICKLED}; fit one with `workbench "
                        "lens MODEL --fit`")  # fmt: skip
    try:
        config = read_json(file)
    except (OSError, ValueError) as err:
        raise UserError(f"{file} cannot be read as JSON; make the lens again or restore it from a copy") from err
    if not isinstance(config, dict):
        raise damaged(file, "it is no JSON object")
    config = {"bias": True, "lens_type": "linear_tuned_lens", **config}
    if not isinstance(config["lens_type"], str) or config["lens_type"] not in LENS_TYPES:
        raise UserError(f"{file} is a lens of type {str(config['lens_type'])[:80]!r}; read are {', '.join(LENS_TYPES)}")
    for name in ("d_model", "num_hidden_layers"):
        if type(config.get(name)) is not int or not 0 < config[name] < 1 << 20:
            raise damaged(file, f"its {name} is no count")
    if not isinstance(config["bias"], bool) or not isinstance(config.get(OWN), dict | None):
        raise damaged(file, f"its bias or its {OWN} is of another type")
    return config
