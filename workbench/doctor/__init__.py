"""What of this machine, of a model and of stored artefacts is fit for work: a line for each thing, with what to do."""

from __future__ import annotations

from pathlib import Path

from ..bundled import PREFIX
from .artefacts import look_at_artefacts
from .check import Check, Status
from .machine import look_at_machine
from .model import look_at_model

__all__ = ["Check", "Status", "diagnose"]


def diagnose(*sources: str | Path, folder: str | Path = ".") -> list[Check]:
    """Checks the installation, the devices and the disk under `folder`; then each of `sources`.

    sources: models as `load` takes them, which are loaded and proved at every site, and folders of stores, adapters, lenses,
        probes and runs, which are looked through: whole, finished, and of the model that they name. With models, each
        store of a model of that name is compared with it: by its fingerprint, and a few of its rows by computing them
        again, which tells states that were centred, normed, scaled or taken one layer off (the basis).
    Nothing is raised for what is wrong: it is a check with status FAIL.

    >>> for check in diagnose("bundled:recipient", "runs"): print(check)                        # doctest: +SKIP
    """
    checks = look_at_machine(Path(folder))
    named = [(str(source), _is_model(str(source))) for source in sources]
    models = []
    for source in (source for source, is_model in named if is_model):
        model, found = look_at_model(source)
        checks += found
        models += [] if model is None else [model]
    for source in (source for source, is_model in named if not is_model):
        checks += look_at_artefacts(Path(source).expanduser(), models)
    return checks


def _is_model(source: str) -> bool:
    path = Path(source).expanduser()
    if source.startswith(PREFIX) or not path.is_dir():
        return True
    # a fitted lens keeps a config.json too, beside its parameters
    lens = (path / "params.safetensors").exists() or (path / "params.pt").exists()
    return (path / "config.json").exists() and not lens
