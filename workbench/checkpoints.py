"""A model's files: found in a folder, among what is bundled, or on the hub, and opened without running anyone's code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from .bundled import PREFIX, bundled_path
from .errors import UserError

TWINS = ["original/*", "consolidated*"]  # the same weights once more, in the publisher's own format


def folder_of(source: str, revision: str | None) -> Path:
    """The local folder of a source, fetched from the hub where need be."""
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

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=wanted, ignore_patterns=TWINS))
    except Exception as err:  # the hub client has dozens of errors; each means the same to the user
        reason = str(err).strip().splitlines()[0][:160] if str(err).strip() else type(err).__name__
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise UserError(
            f"model {source!r} is neither a local folder nor a model that the hub gave{offline}: {reason}; "
            f"check the name, log in for a gated model, or use {PREFIX}donor or {PREFIX}recipient"
        ) from err


def quiet() -> None:
    """Silences transformers' own progress bars and warnings."""
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()


def open_config(source: str | Path, folder: Path) -> Any:
    """The configuration in a folder; UserError where it cannot be read."""
    from transformers import AutoConfig

    quiet()
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as err:
        raise UserError(f"cannot read the config of {source}: {str(err).strip().splitlines()[0][:200]}") from err


def open_tokenizer(source: str | Path, folder: Path) -> Any:
    """The tokenizer in a folder; UserError where it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as err:
        raise UserError(f"{source} has no tokenizer that can be loaded ({str(err).strip().splitlines()[0][:160]}); "
                        "pass tokenizer=...") from err  # fmt: skip


def open_weights(source: str | Path, folder: Path, dtype: Any, device_map: Any) -> Any:
    """The causal language model in a folder, from safetensors; UserError where it cannot be loaded."""
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device_map, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError) as err:
        raise UserError(f"cannot load the weights of {source}: {str(err).strip().splitlines()[0][:200]}; only "
                        "safetensors of a causal language model are read") from err  # fmt: skip


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
