"""This machine: the versions that are installed, the devices, the memory, the disks and the way to the hub."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from ..bundled import PREFIX, bundled_path
from ..errors import UserError
from ..store.views import size_text
from .check import Check

SHOWN = ("torch", "transformers", "safetensors", "scikit-learn", "pyarrow")
LOW_DISK, FULL_DISK = 5 << 30, 200 << 20
LOW_MEMORY = 2 << 30
FEW_INODES = 1000
MOST_CLASHES = 5


def look_at_machine(folder: Path) -> list[Check]:
    """Python, packages, torch's build, devices, memory, the disks that are written to, the hub and what is bundled."""
    checks = [_python(), *_packages(), *_clashes(), *_devices(), _memory(), *_disks(folder), _hub(), _bundled()]
    return checks


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


def _clashes() -> Iterator[Check]:
    """Whether what our requirements ask of one another is met too: pip lets a later install break it."""
    from packaging.requirements import Requirement

    seen, left, broken = set[str](), ["workbench"], list[str]()
    while left:
        name = left.pop()
        try:
            asked = [Requirement(r) for r in requires(name) or []]
        except (PackageNotFoundError, ValueError):  # absent, which _packages says of our own, or of an odd version
            continue
        for requirement in asked:
            key = requirement.name.lower().replace("_", "-")
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            try:
                there = version(requirement.name)
            except PackageNotFoundError:
                if name != "workbench":
                    broken.append(f"{name} asks for {requirement}, which is not installed")
                continue
            if name != "workbench" and not requirement.specifier.contains(there, prereleases=True):
                broken.append(f"{name} {version(name)} asks for {requirement} and {there} is installed")
            if key not in seen:
                seen.add(key)
                left.append(requirement.name)
    for line in broken[:MOST_CLASHES]:
        yield Check("WARN", "versions", line, "run `pip install --upgrade` for both together, or make a new environment "
                    "with `pip install -c constraints.txt .`")  # fmt: skip
    if not broken:
        yield Check("OK", "versions", f"what {len(seen)} packages ask of one another is met")


def _devices() -> Iterator[Check]:
    import torch

    yield Check("OK", "cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            yield _gpu(i)
    elif _has_driver():
        yield _unseen(torch.__version__, torch.version.cuda)
    else:
        yield Check("OK", "gpu", "none; everything runs on the CPU")


def _gpu(i: int) -> Check:
    """A GPU that torch sees; it may still have no kernels for it."""
    import torch

    free, total = torch.cuda.mem_get_info(i)
    what = f"cuda:{i} {torch.cuda.get_device_name(i)}, {size_text(free)} of {size_text(total)} free"
    major, minor = torch.cuda.get_device_capability(i)
    built = sorted(torch.cuda.get_arch_list())
    if built and not _has_kernels(built, 10 * major + minor):
        return Check("FAIL", "torch build", f"{what}: this torch has no kernels for its compute capability {major}.{minor} "
                     f"(it has {', '.join(built)})", "install a torch that is built for this GPU")  # fmt: skip
    return Check("OK", "gpu", what)


def _has_kernels(built: list[str], capability: int) -> bool:
    """Whether kernels of `sm_XY` (for X.Y and later X.Z) or code of `compute_XY` (for all that is later) are there.

    >>> _has_kernels(["sm_80", "sm_90a"], 86), _has_kernels(["sm_80"], 90), _has_kernels(["sm_80", "compute_80"], 90)
    (True, False, True)
    """
    for name in built:
        kind, _, digits = name.partition("_")
        number = int("".join(c for c in digits if c.isdigit()) or 0)
        same = number // 10 == capability // 10 and number <= capability
        if (kind == "sm" and same) or (kind == "compute" and number <= capability):
            return True
    return False


def _has_driver() -> bool:
    return bool(shutil.which("nvidia-smi")) or Path("/proc/driver/nvidia").exists()


def _unseen(torch_version: str, cuda: str | None) -> Check:
    """Why torch sees no GPU although there is a driver: its build, a variable that hides it, or the driver itself."""
    if cuda is None:
        return Check("FAIL", "torch build", f"there is an NVIDIA driver and torch {torch_version} is built for the CPU alone",
                     "install a torch that is built for CUDA; see \"With a GPU\" in the README")  # fmt: skip
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        return Check("WARN", "gpu", f"torch sees none: CUDA_VISIBLE_DEVICES is {hidden!r}",
                     "unset it, or name the GPUs to use: CUDA_VISIBLE_DEVICES=0")  # fmt: skip
    return Check("WARN", "gpu", f"there is an NVIDIA driver and torch, built for CUDA {cuda}, sees no GPU",
                 "see whether nvidia-smi lists one (a container needs --gpus all) and whether its driver is as new as that "
                 "CUDA")  # fmt: skip


def _memory() -> Check:
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return Check("OK", "memory", "this system does not say how much there is")
    found = f"{size_text(free)} of {size_text(total)} unused"
    if total < LOW_MEMORY:
        return Check("WARN", "memory", found, f"the demo wants {size_text(LOW_MEMORY)}")
    return Check("OK", "memory", found)


def _disks(folder: Path) -> Iterator[Check]:
    """The disk that is worked on, and those of temporary files and of the hub's cache where they are others."""
    from huggingface_hub.constants import HF_HUB_CACHE

    yield _disk("disk", folder, "work in another folder, or give --out elsewhere")
    seen = {_device(folder)}
    for name, where, variable in (
        ("temporary", Path(tempfile.gettempdir()), "TMPDIR"), ("hub cache", Path(HF_HUB_CACHE), "HF_HOME"),
    ):  # fmt: skip
        if _device(where) not in seen:
            seen.add(_device(where))
            yield _disk(name, where, f"set {variable} to a folder that has room")


def _device(folder: Path) -> int:
    return _existing(folder).stat().st_dev


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    folder = folder.expanduser().absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _disk(name: str, folder: Path, elsewhere: str) -> Check:
    where = _existing(folder).resolve()
    free = shutil.disk_usage(where).free
    found = f"{size_text(free)} free in {where}"
    if not os.access(where, os.W_OK) or os.statvfs(where).f_flag & os.ST_RDONLY:
        return Check("FAIL", name, f"{where} cannot be written to", elsewhere)
    if free < FULL_DISK:
        return Check("FAIL", name, found, f"make room: a run takes some hundred megabytes; or {elsewhere}")
    inodes = os.statvfs(where)
    if inodes.f_files and inodes.f_favail < FEW_INODES:
        return Check(
            "FAIL", name, f"{found}, and room for {inodes.f_favail} files more", f"remove files; or {elsewhere}"
        )
    if free < LOW_DISK:
        return Check(
            "WARN", name, found, "profiles of large models need more; `workbench profile --dry-run` says how much"
        )
    return Check("OK", name, found)


def _hub() -> Check:
    """Whether models may be fetched; the hub itself is asked only when a model is."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    there = sorted(p.name.removeprefix("models--").replace("--", "/") for p in cache.glob("models--*"))
    held = f"{len(there)} model{'' if len(there) == 1 else 's'} in {cache}"
    if constants.HF_HUB_OFFLINE:
        return Check("WARN", "hub", f"HF_HUB_OFFLINE is set: only what is in the cache is found ({held})",
                     "unset it to fetch models")  # fmt: skip
    return Check("OK", "hub", held)


def _bundled() -> Check:
    try:
        for name in ("donor", "recipient"):
            bundled_path(PREFIX + name, "models")
    except (UserError, ModuleNotFoundError) as err:
        return Check("WARN", "bundled pair", str(err), "install the project again; `workbench demo` needs the pair")
    return Check("OK", "bundled pair", f"{PREFIX}donor and {PREFIX}recipient are there")
