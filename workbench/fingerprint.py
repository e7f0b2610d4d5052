"""What a model is: hashes of its config, its weights and its tokenizer, the same on every backend."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checkpoints import TWINS
from .errors import UserError
from .hashes import tensor_bytes, weights_hash

if TYPE_CHECKING:
    from .models import Model

WRAPPED = "_original_component."
"""what TransformerLens puts into the names of parameters"""


def fingerprint_of(model: Model) -> dict[str, str]:
    """Name, revision, and the sha256 of config, weights and tokenizer, and the dtype.

    Weights are hashed from their files where the folder is known, else from the tensors themselves. Raises UserError
    for a model without either, whose weights are on another machine.
    """
    config = model.module.config.to_dict()
    for volatile in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(volatile, None)
    tokenizer = getattr(model.tokenizer, "backend_tokenizer", None)
    words = tokenizer.to_str() if tokenizer is not None else json.dumps(model.tokenizer.get_vocab(), sort_keys=True)
    words += str(getattr(model.tokenizer, "chat_template", None))
    return {
        "name": model.name,
        "revision": model.revision,
        "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        "weights": _weights(model),
        "tokenizer": hashlib.sha256(words.encode()).hexdigest(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _weights(model: Model) -> str:
    files = sorted(model.folder.glob("*.safetensors")) if model.folder else []
    if files:
        return hashlib.sha256("".join(weights_hash(f) for f in files).encode()).hexdigest()
    offloaded = any(hasattr(m, "_hf_hook") for m in model.module.modules())  # by accelerate: they are on this machine
    if not offloaded and all(p.is_meta for p in model.module.parameters()):
        return _on_the_hub(model)
    digest = hashlib.sha256()
    for key, value in _tensors(model.module):
        digest.update(key.replace("_orig_mod.", "").encode())  # a compiled part is the same model
        for part in tensor_bytes(value):
            digest.update(part)
    return digest.hexdigest()


def _on_the_hub(model: Model) -> str:
    """The same hash for weights that were not fetched: the hub knows the sha256 of each of its files."""
    from huggingface_hub import HfApi

    try:
        siblings = HfApi().model_info(model.name, revision=model.revision or None, files_metadata=True).siblings or []
    except Exception as err:  # the hub client has dozens of errors; each means the same to the user
        raise UserError(f"the weights of {model.name} are not on this machine and the hub does not tell the hashes of its "
                        f"weights ({type(err).__name__}); profile it where the hub can be reached") from err  # fmt: skip
    files = {s.rfilename: s.lfs["sha256"] for s in siblings if s.lfs and s.rfilename.endswith(".safetensors")}
    kept = [files[name] for name in sorted(files) if not any(fnmatch(name, twin) for twin in TWINS) and "/" not in name]
    return hashlib.sha256("".join(kept).encode()).hexdigest()


def _tensors(module: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state dict, under the names that they have before TransformerLens wraps the model."""
    state = module.state_dict()
    if not any(WRAPPED in key for key in state):
        yield from state.items()
        return
    plain = {key.replace(WRAPPED, ""): value for key, value in state.items()}
    with torch.device("meta"):
        skeleton = type(module)(module.config).state_dict()
    for key in skeleton:
        yield key, plain[key]


def difference_of(a: Mapping[str, str], b: Mapping[str, str]) -> str | None:
    """Why two fingerprints are of different models, by the strongest evidence that both hold; None where they agree.

    >>> difference_of({"name": "x/tiny"}, {"name": "/models/tiny/"}), difference_of({"name": "a"}, {"name": "b"})
    (None, 'name a and b differ')
    """
    for key in ("weights", "config", "name"):
        if a.get(key) and b.get(key):
            same = a[key] == b[key] if key != "name" else _last(a[key]) == _last(b[key])
            return None if same else f"{key} {a[key][:40]} and {b[key][:40]} differ"
    return None


def _last(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1].lower()
