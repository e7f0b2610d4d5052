"""A damaged store made whole again, without a byte that is not the one that was there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import sync
from ..errors import UserError
from ..hashes import file_hash
from ..store.checks import MANIFEST, TABLES
from ..store.checkup import SHOWN, Damage, check_place, checked_manifest, find_damage
from ..store.folder import Folder
from ..store.leftovers import target_of
from ..store.locks import held, hold
from ..store.tables import Tables

if TYPE_CHECKING:
    from ..models import Model
    from ..prompts import PromptSet
    from .plan import Plan

PLANNED = ("tokens", "max_length", "stride", "batch_tokens")  # of a manifest's options: what a plan is made with


@dataclass(frozen=True)
class Repair:
    """What was mended of a store, line by line, and what still is not as it should be."""

    path: Path
    done: list[str] = field(default_factory=list)
    left: Damage | None = None

    @property
    def whole(self) -> bool:
        """Whether nothing is left to mend."""
        return not self.left


def repair_store(
    path: str | Path,
    *,
    model: Model | Callable[[], Model] | None = None,
    prompts: Any = None,
    remove_foreign: bool = False,
) -> Repair:
    """Mends the store in folder `path`, as far as that can be done without guessing.

    A replacement that was interrupted is finished, or what was there before is put back. Files that are not the
    store's are removed where `remove_foreign` says so. Damaged and missing shards and tables are computed again.

    model: the model of the store, or a function that loads it (called only where something must be computed); without
        it nothing is computed, and `left` says what is damaged. It must make the very plan that the manifest names.
    prompts: the prompts that were profiled, needed only where prompts.parquet is damaged.
    Every file that is computed again must have the sha256 that the manifest says, and takes its place by one rename;
    one that has not (another device or version gives other bits) is thrown away, and the store stays as it was.
    Raises UserError where there is no store, another run is writing it, its manifest is damaged (nothing else says what
    the store held), the model or the prompts are others, and for bytes that came out otherwise.
    """
    path = Path(path).expanduser()
    done = _settle(path)
    check_place(path)
    damage = find_damage(path)
    if damage.unreadable or MANIFEST in damage.damaged:  # first: it alone says which files are the store's
        why = damage.unreadable or f"store {path}: its {MANIFEST} was changed (its checksum is another)"
        raise UserError(f"{why.split('; profile again')[0]}; nothing else says what the store held: restore it from a copy "
                        "or profile again")  # fmt: skip
    if damage.foreign and remove_foreign:
        _remove(path, damage.foreign)
        done.append(f"removed {_names(damage.foreign)}, which were not the store's")
    broken = [*damage.damaged, *damage.missing]
    if broken and model is not None:
        done += _recompute(path, broken, model, prompts)
    left = find_damage(path) if done else damage
    return Repair(path, done, left if left else None)


# -- an interrupted commit --------------------------------------------------------------------------------------------


def _settle(path: Path) -> list[str]:
    """Ends a replacement that was killed between its renames; says what it did."""
    partial = path.parent / f".{path.name}.partial"
    if os.path.lexists(path) or target_of(partial) is None:
        return []
    handle = hold(partial)
    if handle is None:
        raise UserError(f"{path} is being written by another run; wait for it")
    try:
        if (partial / "store" / MANIFEST).is_file() and not find_damage(partial / "store"):
            os.rename(partial / "store", path)
            sync(path.parent)
            shutil.rmtree(partial, ignore_errors=True)
            return ["gave the finished store its name: its run was stopped one step before"]
        if (partial / "old").is_dir():
            os.rename(partial / "old", path)
            sync(path.parent)
            return ["put back the store that was about to be replaced"]
    finally:
        os.close(handle)
    raise UserError(f"store {path}: is unfinished; run the same profile again to go on")


def _remove(path: Path, names: list[str]) -> None:
    for name in names:
        (path / name).unlink(missing_ok=True)
    for root, folders, files in os.walk(path, topdown=False):
        if not folders and not files and Path(root) not in (path, path / "shards"):
            Path(root).rmdir()


# -- computing again --------------------------------------------------------------------------------------------------


def _recompute(path: Path, broken: list[str], model: Model | Callable[[], Model], prompts: Any) -> list[str]:
    from ..models import Model

    manifest = checked_manifest(path)
    if not manifest.get("plan"):
        kind = manifest.get("source", {}).get("kind", "another program")
        raise UserError(f"store {path}: {_names(broken)} cannot be computed again: the store was made by {kind} and not by "
                        "one profile; make it again from its sources or restore it from a copy")  # fmt: skip
    known = _prompts(path, manifest, broken, prompts)
    loaded = model if isinstance(model, Model) else model()
    plan = _plan(path, manifest, loaded, known)
    return [f"computed {name} again" for name in _replaced(path, manifest, broken, loaded, plan)]


def _prompts(path: Path, manifest: dict[str, Any], broken: list[str], prompts: Any) -> PromptSet:
    from ..prompts import PromptSet

    if TABLES[1] not in broken:
        return Tables(Folder(path), manifest).prompt_set()
    about = manifest["prompts"]
    if prompts is None:
        raise UserError(f"store {path}: {TABLES[1]} is damaged, which held the prompts; give those that were profiled "
                        f"({about['name']!r}, {about['count']} of them): --prompts SOURCE")  # fmt: skip
    found = PromptSet.load(prompts)
    if found.hash != about["hash"]:
        raise UserError(f"store {path}: was made of {about['count']} prompts with the hash "
                        f"{about['hash'][:12]}; {found.name} has {len(found)} with {found.hash[:12]}; give "
                        "the very ones, in their order")  # fmt: skip
    return PromptSet(found.prompts, about["name"])


def _plan(path: Path, manifest: dict[str, Any], model: Model, prompts: PromptSet) -> Plan:
    from .plan import make_plan

    options = {key: value for key, value in manifest.get("options", {}).items() if key in PLANNED and value is not None}
    sites = list(manifest["sites"])
    plan = make_plan(model, prompts, sites=sites, dtype=manifest["dtype"], **{"tokens": manifest["tokens"], **options})
    if plan.hash == manifest["plan"]:
        return plan
    differ = sorted(_differences("", plan.manifest, manifest))
    more = f" and {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""
    what = f"differs in {', '.join(differ[:SHOWN])}{more}" if differ else (
        f"runs on another kind of device (here {model.device.type}), or this version cuts its blocks otherwise")  # fmt: skip
    raise UserError(f"store {path}: {model.name} would make another profile: it {what}; give the model, the versions and "
                    "the device that it was made with, or profile again")  # fmt: skip


NAMES = ("model.name", "model.fingerprint.name", "model.fingerprint.revision")
"""of the model, which say where it was found and not what it is"""


def _differences(where: str, a: Any, b: Any) -> Iterator[str]:
    """The places where two manifests say something else, by their path."""
    if where in ("plan", "shards", "tables", "checksum", *NAMES):
        return
    if isinstance(a, dict) and isinstance(b, dict):
        for key in {*a, *b}:
            yield from _differences(f"{where}.{key}" if where else str(key), a.get(key), b.get(key))
    elif a != b and where not in ("prompts.name", "template.text"):
        yield f"{where} ({str(b)[:20]}, now {str(a)[:20]})"


def _replaced(path: Path, manifest: dict[str, Any], broken: list[str], model: Model, plan: Plan) -> Iterator[str]:
    """Computes each broken file beside the store, and renames those that came out as they were."""
    wrong: list[str] = []
    sha256 = {name: entry["sha256"] for name, entry in manifest["tables"].items()}
    sha256 |= {shard["file"]: shard["sha256"] for shard in manifest["shards"]}
    (path / "shards").mkdir(exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.repair-", dir=path.parent))
    try:
        with held(beside):
            for name, file in _made(beside, manifest, broken, model, plan):
                if name not in broken:
                    continue
                if file_hash(file) != sha256[name]:
                    wrong.append(name)
                    continue
                os.chmod(file, 0o644)
                sync(file)
                if (path / name).is_dir() and not (path / name).is_symlink():
                    shutil.rmtree(path / name)
                os.replace(file, path / name)
                sync((path / name).parent)
                yield name
    except OSError as err:
        raise UserError(f"cannot write {path}: {err.strerror or err}; each file is as it was or whole: make room and run "
                        "the same again") from err  # fmt: skip
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    if wrong:
        raise UserError(f"store {path}: {_names(wrong)} came out with other bytes than the manifest's, as they do on another "
                        "device or with other versions; left as it was: restore it from a copy or profile again")  # fmt: skip


def _made(
    beside: Path, manifest: dict[str, Any], broken: list[str], model: Model, plan: Plan
) -> Iterator[tuple[str, Path]]:
    from ..store.shards import write_shard
    from .run import run_blocks
    from .tables import write_tables

    if set(TABLES) & set(broken):
        write_tables(plan, model.tokenizer, beside)
        yield from ((name, beside / name) for name in TABLES)
    numbers = [i for i, shard in enumerate(manifest["shards"]) if shard["file"] in broken]
    for number, rows, _ in run_blocks(model, plan, numbers) if numbers else ():
        file = beside / "shard"
        write_shard(file, {str(site): values for site, values in rows.items()})
        yield manifest["shards"][number]["file"], file


def _names(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
