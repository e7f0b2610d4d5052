"""A Ray cluster for the time of a block: the one at an address, the one that is connected already, or one of our own."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..store.locks import hold

TOKEN = secrets.token_hex(32)
"""of the clusters that this process starts: whoever reaches their ports has to know it"""
LONGEST = 40
"""characters of the folder of a cluster: the names of its sockets in it are limited"""
REACHED = 5.0
"""seconds that an address is given to answer"""
OWN = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # a cluster of one machine, which listens on the loopback address alone
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": TOKEN,
}


def check_installed() -> None:
    """Raises UserError where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise UserError("the engine ray needs Ray, which is not installed: pip install 'workbench[ray]', or use the local "
                        "engine (leave --engine out)")  # fmt: skip


@contextmanager
def connected(address: str | None, n_cpus: int | None = None) -> Iterator[Any]:
    """The module `ray`, connected to a cluster, which is left, and ended where it was started here.

    n_cpus: of a cluster that is started here; as many as the machine has unless given. Raises UserError where there is no
    Ray, or no cluster at the address.
    """
    check_installed()
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        ray, at = sys.modules["ray"], sys.modules["ray"].get_runtime_context().gcs_address
        if address not in (None, "auto", at):
            raise UserError(f"this process is connected to Ray at {at} already, not to {address}; leave the address out, or "
                            "call ray.shutdown() first")  # fmt: skip
        yield ray
        return
    with _environment({"RAY_USAGE_STATS_ENABLED": "0", **({} if address or not _reads_environment() else OWN)}):
        import ray

        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        folder, lock = (None, None) if address else _folder()
        try:
            if address:
                _join(ray, address, quiet)
            else:
                ray.init(address="local", num_cpus=n_cpus, include_dashboard=False, _temp_dir=str(folder), **quiet)
            yield ray
        finally:
            ray.shutdown()
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            if lock is not None:
                os.close(lock)


_IMPORTED_HERE: list[bool] = []


def _reads_environment() -> bool:
    """Whether Ray learns of `OWN`: it reads that when it is imported, which somebody else may have done before."""
    if not _IMPORTED_HERE:
        _IMPORTED_HERE.append("ray" not in sys.modules)
    return _IMPORTED_HERE[0]


def _join(ray: Any, address: str, options: dict[str, Any]) -> None:
    reached = False
    try:
        reached = _reach(address)
        ray.init(address=address, **options)
    except Exception as err:  # of many kinds, by how far it came
        reason = " ".join(str(err).split())[:200] or type(err).__name__
        if reached:
            raise UserError(f"the Ray cluster at {address!r} does not take this process in ({reason}); where it was started "
                            "with a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN as they were there, and use its "
                            "versions of Python and Ray") from err  # fmt: skip
        raise UserError(f"no Ray cluster answers at {address!r} ({reason}); start one with `ray start --head` and give its "
                        "address (HOST:6379), or leave --address out for one of this machine alone") from err  # fmt: skip


def _reach(address: str) -> bool:
    """Tries HOST:PORT for some seconds, where Ray itself would for minutes; OSError where nobody listens there. False for an
    address of another form, which is Ray's to find."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return False
    socket.create_connection((host.strip("[]"), int(port)), timeout=REACHED).close()
    return True


def _folder() -> tuple[Path, int | None]:
    """A folder for a cluster of our own, with its lock: a handle to be closed. Those of killed processes are removed."""
    found = tempfile.gettempdir()
    place = Path(found if len(found) <= LONGEST else "/tmp")
    for left in place.glob("wb-ray-*"):
        with suppress(OSError):  # gone meanwhile
            if not left.is_symlink() and left.stat().st_uid == os.getuid() and (handle := hold(left)) is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(handle)
    folder = Path(tempfile.mkdtemp(prefix="wb-ray-", dir=place))
    return folder, hold(folder)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in values}
    os.environ.update({key: value for key, value in values.items() if before[key] is None})
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
