"""When artefacts were written last: what caches of what was read from them are keyed by."""

from __future__ import annotations

from pathlib import Path

from workbench.store import Store

Stamp = tuple[int, ...]


def stamp(*files: Path) -> Stamp:
    """When files were written last, in nanoseconds; 0 for one that is not there."""
    return tuple(map(_written, files))


def store_stamp(store: Store | Path) -> Stamp:
    """Changes where the store of a path is another."""
    return stamp((store.path if isinstance(store, Store) else store) / "manifest.json")


def adapter_stamp(folder: Path) -> Stamp:
    """Changes where the adapter in a folder is another."""
    return stamp(folder / "adapter.json", folder / "adapter.safetensors")


def lens_stamp(folder: Path) -> Stamp:
    """Changes where the lens in a folder is another."""
    return stamp(folder / "config.json", folder / "params.safetensors", folder / "params.pt")


def probe_stamp(folder: Path) -> Stamp:
    """Changes where the probe in a folder is another."""
    return stamp(folder / "probe.json", folder / "probe.safetensors")


def fits_stamp(run: Path) -> Stamp:
    """Changes where the converters of a transfer run would be others."""
    return stamp(run / "job.toml", *(run / "profiles" / side / "manifest.json" for side in ("donor", "recipient")))


def _written(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:  # it may go at any moment
        return 0
