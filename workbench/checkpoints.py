"""A model's files: found in a folder, among what is bundled, or on the hub, and opened without running anyone's code."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import torch

from .bundled import PREFIX, bundled_path
from .errors import UserError

TWINS = ["original/*", "consolidated*"]  # the same weights once more, in the publisher's own format


def folder_of(source: str, revision: str | None, weights: bool = True) -> Path:
    """The local folder of a source, fetched from the hub where need be; without its weights where they are not wanted."""
    if not source.strip():
        raise UserError(
            f"model {source!r}: the name is empty; give a model folder, a hub id (owner/name), or {PREFIX}donor"
        )
    if source.startswith(PREFIX):
        return bundled_path(source, "models")
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UserError(f"{source} has no config.json: it is not a Hugging Face model folder")
        return path
    if path.is_absolute() or source.startswith(".") or source.count("/") > 1 or path.exists():
        raise UserError(
            f"model {source!r} is not a folder; give a model folder, a hub id (owner/name), or {PREFIX}donor"
        )
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.model", "*.txt", "*.jinja", *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=wanted, ignore_patterns=TWINS))
    except Exception as err:  # the hub client has dozens of errors; those that say what to do are told apart
        raise UserError(_not_given(source, revision, err)) from err


def _not_given(source: str, revision: str | None, err: Exception) -> str:
    """Why the hub did not give a model, and what to do about it."""
    from huggingface_hub import constants, errors

    if isinstance(err, errors.GatedRepoError):  # first: it is a kind of RepositoryNotFoundError
        return (f"model {source!r} is gated: the hub gives it only to those who accepted its conditions; accept them on the "
                "page of the model, then log in with `hf auth login` or set HF_TOKEN")  # fmt: skip
    if isinstance(err, errors.RevisionNotFoundError):
        return f"model {source!r} has no revision {revision!r} on the hub; give a branch, a tag or a commit that it has"
    if isinstance(err, errors.RepositoryNotFoundError):
        return (f"model {source!r} is neither a local folder nor on the hub, or it is private; check the name, log in with "
                f"`hf auth login` for a private one, or use {PREFIX}donor or {PREFIX}recipient")  # fmt: skip
    if isinstance(err, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)):
        if constants.HF_HUB_OFFLINE:
            return (f"model {source!r} is neither a local folder nor in the hub's cache, and HF_HUB_OFFLINE is set; unset it, "
                    f"or fetch the model where there is a network: `hf download {source}`")  # fmt: skip
        return (f"model {source!r} is neither a local folder nor in the hub's cache, and the hub cannot be reached "
                f"({_reason(err)}); check the network, give a model folder, or use {PREFIX}donor or "
                f"{PREFIX}recipient")  # fmt: skip
    if isinstance(err, OSError) and err.errno in (errno.ENOSPC, errno.EDQUOT):
        return (f"model {source!r} does not fit the disk of the hub's cache ({constants.HF_HUB_CACHE}); make room, or set "
                "HF_HOME to a folder that has some")  # fmt: skip
    return (f"model {source!r} is neither a local folder nor a model that the hub gave: {_reason(err)}; check the name, or "
            f"use {PREFIX}donor or {PREFIX}recipient")  # fmt: skip


def quiet() -> None:
    """Silences transformers' own progress bars and warnings."""
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()


def open_config(source: str | Path, folder: Path) -> Any:
    """The configuration in a folder; UserError where it cannot be read."""
    from transformers import AutoConfig

    from .folding.architecture import register_folder

    quiet()
    register_folder(folder)  # of our own types transformers has to be told
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as err:  # each family's config checks itself in its own way; each error means the same to the user
        raise UserError(
            f"cannot read the config of {source}: {_reason(err)}; config.json must be as transformers writes it for a "
            "family that it knows"
        ) from err


def open_tokenizer(source: str | Path, folder: Path) -> Any:
    """The tokenizer in a folder; UserError where it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as err:  # the tokenizers library raises a plain Exception for a damaged tokenizer.json
        raise UserError(f"{source} has no tokenizer that can be loaded ({_reason(err)}); "
                        "pass tokenizer=...") from err  # fmt: skip


def open_weights(source: str | Path, folder: Path, dtype: Any, device_map: Any) -> Any:
    """The causal language model in a folder, from safetensors.

    Raises UserError where it cannot be loaded, and where the files lack a tensor or hold it in another shape:
    transformers would fill it with random numbers.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = dict(dtype=dtype, device_map=device_map, use_safetensors=True)
    loader: Any = AutoModelForCausalLM  # its annotations leave out what output_loading_info adds
    try:
        # other shapes are let through here, since the error for them would name none
        module, loading = loader.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except SafetensorError as err:
        raise UserError(f"cannot load the weights of {source}: a .safetensors file is damaged or cut short "
                        f"({_reason(err)}); fetch it again") from err  # fmt: skip
    except Exception as err:  # an impossible config fails anywhere in a family's own code
        raise UserError(f"cannot load the weights of {source}: {_reason(err)}; only safetensors of a causal language "
                        "model are read, and config.json must fit them") from err  # fmt: skip
    _check_complete(source, loading)
    return module


def open_skeleton(source: str | Path, config: Any, dtype: Any) -> Any:
    """The causal language model of a configuration on the meta device: its modules and shapes, and no weights."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as err:  # an impossible config fails anywhere in a family's own code
        raise UserError(f"cannot make the model of {source} from its config: {_reason(err)}") from err


def _check_complete(source: str | Path, loading: dict[str, Any]) -> None:
    """UserError naming the first few tensors that the weights lack or hold in another shape; tied ones are not listed."""
    missing = sorted(loading["missing_keys"])
    other = [f"{name} is {list(held)}, not {list(wanted)}" for name, held, wanted in sorted(loading["mismatched_keys"])]
    faults = [
        *([f"{len(missing)} missing ({_few(missing)})"] if missing else []),
        *([f"{len(other)} of another shape ({_few(other)})"] if other else []),
        *(" ".join(str(message).split())[:200] for message in loading.get("error_msgs", [])),
    ]
    if faults:
        raise UserError(f"the weights of {source} are not complete: tensors {' and '.join(faults)}; fetch the model "
                        "again, or give the config.json that belongs to them")  # fmt: skip


def _few(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _reason(err: Exception) -> str:
    """An error in one line; with its type where the message alone says too little."""
    text = " ".join(str(err).split())[:200]
    if not text:
        return type(err).__name__
    return f"{type(err).__name__} {text}" if isinstance(err, (LookupError, TypeError, AttributeError)) else text


def place(device: str) -> tuple[str, str | None]:
    """(device, device_map) for what the user asked."""
    if device == "map":
        return "cuda" if torch.cuda.is_available() else "cpu", "auto"
    if device != "auto":
        try:
            placed = torch.device(device)
        except RuntimeError as err:
            raise UserError(f"unknown device {device!r}; allowed: auto, cpu, cuda, cuda:N, mps, map") from err
        if placed.type == "cuda" and not torch.cuda.is_available():
            raise UserError(
                f"device {device!r} was asked for and torch sees no GPU; use cpu, or install torch with CUDA"
            )
        return str(placed), None
    if torch.cuda.is_available():
        return "cuda", "auto" if torch.cuda.device_count() > 1 else None
    return "cpu", None
