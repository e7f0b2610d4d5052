"""Folders of stores, adapters, lenses, probes and runs: whole, finished, and of the model that they name."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundled import PREFIX, located
from ..catalogue import Entry, catalogue
from ..errors import UserError
from ..fingerprint import difference_of
from ..hashes import weights_hash
from ..store.views import size_text
from .check import Check, failed

if TYPE_CHECKING:
    from ..models import Model

SHOWN = 4
READ = 4 << 30
"""bytes of a store that are read for what was damaged; of a larger one the sizes of its files are looked at"""
HASHED = 4 << 30
"""bytes of weights that are read to tell whether a model is still the one of a store; a larger one is to be named"""


def look_at_artefacts(folder: Path, models: Sequence[Model] = ()) -> list[Check]:
    """One check or more for every artefact below a folder; `models`: those to compare with."""
    try:
        found = catalogue(folder)
    except UserError as err:
        return [failed("artefacts", err, "give a folder of stores, adapters or runs, or a model")]
    weights = dict[str, str]()
    checks = [check for entry in found.entries for check in _entry(entry, models, weights)]
    if found.cut:
        checks.append(Check("WARN", "artefacts", f"{folder} holds too many folders: not all were looked at",
                            "name the folders of stores and runs themselves"))  # fmt: skip
    return _few_lines(checks, folder) or [
        Check("WARN", "artefacts", f"{folder} holds no store, adapter or run", "give the folder that does")
    ]


def _few_lines(checks: list[Check], folder: Path) -> list[Check]:
    """What is fine, of a kind, in one line where it would be many."""
    counts = Counter(check.name for check in checks if check.status == "OK")
    kept = [c for c in checks if c.status != "OK" or counts[c.name] <= SHOWN]
    return [*kept, *(Check("OK", name, f"{count} below {folder} are as they should be")
                     for name, count in counts.items() if count > SHOWN)]  # fmt: skip


def _entry(entry: Entry, models: Sequence[Model], weights: dict[str, str]) -> Iterator[Check]:
    name = "store" if entry.kind == "unfinished" else entry.kind
    if entry.state == "damaged":
        yield failed(name, UserError(f"{entry.path}: {entry.note}"), "make it again")
    elif entry.state in ("unfinished", "stopped"):
        yield Check("WARN", name, f"{entry.path} is not finished", entry.note)
    elif entry.kind == "store":
        yield from _store(entry, models, weights)
    elif (base := _base(entry)) is not None:
        yield _of_its_model(name, entry.path, base, models, weights) or Check(
            "OK", name, f"{entry.path}: {entry.state}"
        )
    else:
        yield Check("OK", name, f"{entry.path}: {entry.state}")


def _base(entry: Entry) -> Mapping[str, str] | None:
    """The fingerprint of the model that an adapter, lens or probe belongs to."""
    about: Mapping[str, Any] = entry.facts.get("about", entry.facts)
    base = about.get("base")
    return base if isinstance(base, dict) and base else None


def _store(entry: Entry, models: Sequence[Model], weights: dict[str, str]) -> Iterator[Check]:
    from ..store import Store
    from ..store.checkup import find_damage

    read = entry.facts.get("bytes", 0) <= READ
    if damage := find_damage(entry.path, quick=not read):
        yield Check("FAIL", "store", str(damage), f"run `workbench stores repair {entry.path}`")
        return
    with Store.open(entry.path) as store:
        stale = _of_its_model("stale store", entry.path, store.fingerprint, models, weights)
        stale = stale or _prompts(store)
        checked = (
            "every byte as it was written" if read else "its sizes alone were looked at: `workbench stores verify`"
        )
        yield stale or Check("OK", "store", f"{store}: {checked}; of the model and the prompts that it names, as far as they "
                             "are here")  # fmt: skip
        if models and all(difference_of(store.fingerprint, m.fingerprint) for m in models) and stale is None:
            yield Check("WARN", "store", f"{entry.path} is of {store.name}, which was not named, and was compared with nothing",
                        f"name it too: `workbench doctor {store.name} {entry.path}`")  # fmt: skip
        yield from _basis(store, [m for m in models if not difference_of(store.fingerprint, m.fingerprint)])


def _of_its_model(
    name: str, path: Path, base: Mapping[str, str], models: Sequence[Model], weights: dict[str, str]
) -> Check | None:
    """That it is of another model than the one of its name is now; None where it is not, or where that cannot be told."""
    fix = "make it again with this model, or give the model that it was made with"
    said = base.get("name", "")
    named = [model for model in models if not difference_of({"name": said}, {"name": model.name})]
    for model in named:
        if difference := difference_of(base, model.fingerprint):
            return Check(
                "FAIL", name, f"{path} was made with another {said} than {model.name} is now: {difference}", fix
            )
        if base.get("tokenizer") and base["tokenizer"] != model.fingerprint["tokenizer"]:
            return Check("WARN", name, f"{path} was made with another tokenizer or chat template of {said} than it has now",
                         "make it again, so that prompts are read as they are now")  # fmt: skip
    if named or not base.get("weights"):
        return None
    now = _weights_of(said, weights)
    if not now or now == base["weights"]:
        return None
    if now.startswith("!"):
        return Check("WARN", name, f"{path} is of {said}, whose {now[1:]} of weights were not read to compare",
                     f"run `workbench doctor {said} {path}`")  # fmt: skip
    return Check("FAIL", name, f"{path} was made with other weights than {said} has now", fix)


def _weights_of(source: str, known: dict[str, str]) -> str:
    """The hash of the weights of a model on this machine, as fingerprints have it; "" where there is none, and its size
    after a ! where it is too large to read in passing."""
    if source not in known:
        try:
            folder = located(source, "models")
        except UserError:
            folder = Path()
        local = source.startswith(PREFIX) or Path(source).expanduser().is_absolute() or "/" in source
        files = sorted(folder.glob("*.safetensors")) if source and local and folder.is_dir() else []
        n_bytes = sum(file.stat().st_size for file in files)
        if n_bytes > HASHED:
            known[source] = f"!{size_text(n_bytes)}"
        else:
            hashes = "".join(weights_hash(file) for file in files)
            known[source] = hashlib.sha256(hashes.encode()).hexdigest() if files else ""
    return known[source]


def _prompts(store: Any) -> Check | None:
    """That the bundled prompts of a store are others now; None where they are not. Of a file only its name is kept."""
    from ..prompts import PromptSet

    name = str(store.manifest["prompts"]["name"])
    if not name.startswith(PREFIX):
        return None
    try:
        now = PromptSet.load(name)
    except UserError:
        return None
    count = store.manifest["prompts"]["count"]
    if store.prompt_hash in (now.hash, now[:count].hash):
        return None
    return Check("WARN", "stale store", f"{store.path}: {name} holds other prompts now than were profiled",
                 "profile again")  # fmt: skip


def _basis(store: Any, models: Sequence[Model]) -> Iterator[Check]:
    """What its rows are: as its manifest says and, with its model, as they come out."""
    from ..basis import RAW, bases_of

    said = store.manifest["basis"]
    told = Check("OK", "basis", f"{store.path}: {said}")
    if said != RAW:
        told = Check("WARN", "basis", f"{store.path} does not say that its rows are as the model has them (basis {said})",
                     "name its model too, so that its rows are compared: `workbench doctor MODEL STORE`")  # fmt: skip
    for model in models:
        try:
            found = bases_of(store, model)
        except UserError as err:
            yield failed("basis", err, "profile again")
            return
        other = [one for one in found if one.found != RAW]
        rows = f"{found[0].rows} rows of {', '.join(str(one.site) for one in found)} computed again"
        told = Check(
            "OK", "basis", f"{store.path}: raw; {rows}, at most {max(one.difference for one in found):.1e} apart"
        )
        if other:
            what = ", ".join(f"{one.site} {one.found}" for one in other)
            told = Check("FAIL", "basis", f"{store.path} holds other states than {model.name} has: {what} ({rows})",
                         "profile the model again with `workbench profile`")  # fmt: skip
    yield told
