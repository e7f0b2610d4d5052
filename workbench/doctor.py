"""What of this machine and of a model is fit for work: one line for each thing looked at, with what to do about it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .bundled import PREFIX, bundled_path
from .errors import UserError

if TYPE_CHECKING:
    from .models import Model

Status = Literal["OK", "WARN", "FAIL"]
SHOWN = ("torch", "transformers", "safetensors", "scikit-learn", "pyarrow")
LOW_DISK, FULL_DISK = 5 << 30, 200 << 20
LOW_MEMORY = 2 << 30


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `fix` says what to do where the status is not OK."""

    status: Status
    name: str
    found: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.status:<4}  {self.name:<14}  {self.found}" + (f"; {self.fix}" if self.fix else "")


def diagnose(model: str | None = None, *, folder: str | Path = ".") -> list[Check]:
    """Checks the installation, the devices and the disk under `folder`; with `model`, that it loads and is proved.

    model: as `load` takes it. Nothing is raised for what is wrong: it is a check with status FAIL.
    """
    checks = [_python(), *_packages(), *_devices(), _memory(), _disk(Path(folder)), _bundled()]
    return checks if model is None else [*checks, *_model(model)]


def _python() -> Check:
    return Check("OK", "python", f"Python {sys.version.split()[0]} at {sys.prefix}")


def _packages() -> Iterator[Check]:
    """Every requirement of the project: there, and of a version that it allows."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(r) for r in requires("workbench") or []]
    except PackageNotFoundError:
        yield Check(
            "WARN", "packages", "workbench runs from a source tree that is not installed", "run `pip install .`"
        )
        return
    versions = {"workbench": version("workbench")}
    good = True
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        fix = f"run `pip install '{requirement}'`"
        try:
            found = versions[requirement.name] = version(requirement.name)
        except PackageNotFoundError:
            good = False
            yield Check("FAIL", "packages", f"{requirement.name} is not installed", fix)
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            good = False
            yield Check("WARN", "packages", f"{requirement.name} {found} is not {requirement.specifier}", fix)
    if good:
        shown = ", ".join(f"{name} {versions[name]}" for name in ("workbench", *SHOWN) if name in versions)
        yield Check("OK", "packages", f"{shown}; all {len(versions) - 1} requirements are met")


def _devices() -> Iterator[Check]:
    import torch

    yield Check("OK", "cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            what = f"cuda:{i} {torch.cuda.get_device_name(i)}, {_size(free)} of {_size(total)} free"
            yield Check("OK", "gpu", what)
    elif shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build for the CPU alone"
        yield Check("WARN", "gpu", f"there is an NVIDIA driver and torch sees no GPU ({built})",
                    "install a torch for its CUDA version")  # fmt: skip
    else:
        yield Check("OK", "gpu", "none; everything runs on the CPU")


def _memory() -> Check:
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return Check("OK", "memory", "this system does not say how much there is")
    found = f"{_size(free)} of {_size(total)} unused"
    if total < LOW_MEMORY:
        return Check("WARN", "memory", found, f"the demo wants {_size(LOW_MEMORY)}")
    return Check("OK", "memory", found)


def _disk(folder: Path) -> Check:
    where = folder.resolve()
    free = shutil.disk_usage(where).free
    found = f"{_size(free)} free in {where}"
    if not os.access(where, os.W_OK):
        return Check("FAIL", "disk", f"{where} cannot be written to", "work in another folder, or give --out elsewhere")
    if free < FULL_DISK:
        return Check("FAIL", "disk", found, "make room: a run takes some hundred megabytes")
    if free < LOW_DISK:
        return Check("WARN", "disk", found, "profiles of large models need more; `workbench profile` says how much")
    return Check("OK", "disk", found)


def _bundled() -> Check:
    try:
        for name in ("donor", "recipient"):
            bundled_path(PREFIX + name, "models")
    except (UserError, ModuleNotFoundError) as err:
        return Check("WARN", "bundled pair", str(err), "install the project again; `workbench demo` needs the pair")
    return Check("OK", "bundled pair", f"{PREFIX}donor and {PREFIX}recipient are there")


def _model(source: str) -> Iterator[Check]:
    from .models import load

    try:
        model = load(source, prove=False)
    except UserError as err:
        yield Check("FAIL", "model", str(err))
        return
    size = f"{model.n_layers} layers, width {model.width}, {model.parameters:,} parameters"
    dtype = str(model.dtype).removeprefix("torch.")
    yield Check("OK", "model", f"{model.name}: {model.family}, {size}, {dtype} on {model.device}")
    yield _sites(model)
    yield from _tokenizer(model)
    yield Check("OK", "fingerprint", f"{model.fingerprint_id} (weights {model.fingerprint['weights'][:12]})")


def _sites(model: Model) -> Check:
    from .anatomy import INNER

    try:
        model.prove(range(model.n_layers))
    except UserError as err:
        return Check("FAIL", "sites", str(err))
    proved = f"resid_post.0 to resid_post.{model.n_layers - 1} proved at {model.blocks_path}"
    inner = [f"{p} not everywhere ({model.missing[p]})" if p in model.missing else p for p in INNER]
    return Check("OK", "sites", f"{proved}: what is written is read back and changes the logits; so {', '.join(inner)}")


def _tokenizer(model: Model) -> Iterator[Check]:
    tokenizer = model.tokenizer
    if getattr(tokenizer, "chat_template", None):
        yield Check("OK", "chat template", "yes: chats are put through it")
    else:
        yield Check("WARN", "chat template", "no: a chat of one user turn is read as plain text",
                    "use an instruct model for chats")  # fmt: skip
    rows = int(model.module.get_input_embeddings().weight.shape[0])
    if len(tokenizer) > rows:
        yield Check("FAIL", "tokenizer", f"it has {len(tokenizer)} tokens and the model {rows} embeddings",
                    "give the tokenizer that belongs to the model")  # fmt: skip
    else:
        bos = "no BOS" if tokenizer.bos_token_id is None else f"BOS {tokenizer.bos_token!r}"
        yield Check("OK", "tokenizer", f"{len(tokenizer)} tokens, {bos}, {len(model.end_ids)} end tokens")


def _size(n: int) -> str:
    """
    >>> _size(3 << 30), _size(5 << 20)
    ('3.0 GiB', '5 MiB')
    """
    return f"{n / 2**30:.1f} GiB" if n >= 1 << 30 else f"{n / 2**20:.0f} MiB"
